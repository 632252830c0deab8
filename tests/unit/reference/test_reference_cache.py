"""The reference cache: the parts of a key, damage, full disks, several processes at once."""

import errno
import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.reference.cache import ReferenceCache, response_key
from dpo_lightning.reference.kinds import CachedReference
from tests.support.reference_caches import (
    FACTS,
    GROUPS,
    MANY,
    CountingScorer,
    check,
    empty,
    expected,
    fill,
    flip,
    ids,
    only_part,
    other_file,
    pair,
    poison,
    positive,
    rewrite,
    truncate,
)
from tests.support.waiting import until


def test_all_that_the_numbers_depend_on_tells_caches_apart(tmp_path, monkeypatch):
    from dpo_lightning.run.identity import reference_facts

    given = {
        "weights": "w", "config": "c", "dtype": "float32", "precision": "32-true", "device": "cpu",
        "kernel": "flat",
    }  # fmt: skip

    def path(**changes: str) -> Path:
        return ReferenceCache(tmp_path, reference_facts(**(given | changes))).path

    paths = [path(), *(path(**{name: "another"}) for name in given)]
    for module in ("torch", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(f"dpo_lightning.run.identity.{module}.__version__", "0.0")
            paths.append(path())
    assert len(set(paths)) == 1 + len(given) + 2
    assert path() == paths[0]


def test_every_different_response_is_computed_once_and_read_ever_after(tmp_path):
    scorer = CountingScorer()
    parts, reference = fill(ReferenceCache(tmp_path, FACTS), GROUPS[:2], GROUPS[2:], scorer=scorer)
    check(parts)
    assert [len(part) for part in parts] == [2, 1]
    assert (reference.rows, reference.computed) == (3, 3)
    assert len(scorer.seen) == len(set(scorer.seen)) == 6

    scorer = CountingScorer()
    parts, reference = fill(ReferenceCache(tmp_path, FACTS), GROUPS[::-1], scorer=scorer)
    check(parts)
    assert (reference.rows, reference.computed, scorer.seen) == (3, 0, [])


def test_one_more_row_computes_that_row(tmp_path):
    cache = ReferenceCache(tmp_path, FACTS)
    fill(cache, GROUPS)
    scorer = CountingScorer()
    parts, reference = fill(cache, [*GROUPS, pair((1, 2), (3, 0), (7, 0))], scorer=scorer)
    check(parts)
    assert (reference.rows, reference.computed) == (4, 1)
    assert scorer.seen == [((1, 2), (7, 0))]


def test_the_values_go_with_a_micro_batch(tmp_path):
    from dpo_lightning.data.packing import collate_groups

    batch = collate_groups(fill(ReferenceCache(tmp_path, FACTS), GROUPS)[0][0], [0, 1, 2])
    values = CachedReference(rows=3, computed=0).logps(batch, None)
    np.testing.assert_allclose(values, [v for g in GROUPS for v in expected(g)], rtol=1e-6)
    assert collate_groups(GROUPS, [0, 1, 2]).reference_logps is None


@pytest.mark.parametrize("key", FACTS)
def test_each_fact_has_numbers_of_its_own(tmp_path, key):
    fill(ReferenceCache(tmp_path, FACTS), GROUPS)
    other = ReferenceCache(tmp_path, FACTS | {key: "another"})
    assert fill(other, GROUPS)[1].computed == 3
    assert fill(other, GROUPS)[1].computed == 0


def test_the_order_of_the_facts_does_not_matter(tmp_path):
    fill(ReferenceCache(tmp_path, FACTS), GROUPS)
    assert fill(ReferenceCache(tmp_path, dict(reversed(FACTS.items()))), GROUPS)[1].computed == 0
    [about] = tmp_path.glob("*/about.json")
    assert json.loads(about.read_text()) == FACTS


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (((1, 2), (3,)), ((1,), (2, 3))),  # the same ids, cut elsewhere
        (((1, 2), (3,)), ((2, 1), (3,))),
        (((1, 2), (3,)), ((1, 2), (3, 0))),
        (((1, 2), (3, 4)), ((1, 2), (4, 3))),
        (((1,), (0,)), ((1,), (0, 0))),
    ],
)
def test_a_key_is_of_both_texts_and_where_they_meet(one, other):
    keys = [response_key(ids(*prompt), ids(*response)) for prompt, response in (one, other)]
    assert keys[0] != keys[1]
    assert len(keys[0]) == 16


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty,
        flip,
        other_file,
        poison,
        positive,
        lambda path: rewrite(path, logps=np.full(6, -1, dtype=np.float32)),
        lambda path: rewrite(path, logps=np.full(5, -1, dtype=np.float32)),
        lambda path: rewrite(path, logps=np.full(6, -1, dtype=np.float64)),
        lambda path: rewrite(path, lengths=np.zeros(6, dtype=np.int32)),
    ],
)
def test_a_damaged_file_is_computed_again_and_never_used(tmp_path, caplog, damage):
    cache = ReferenceCache(tmp_path, FACTS)
    fill(cache, GROUPS)
    damage(only_part(cache))
    parts, reference = fill(cache, GROUPS)
    check(parts)
    assert reference.computed == 3
    assert "is damaged" in caplog.text
    caplog.clear()
    assert fill(cache, GROUPS)[1].computed == 0
    assert caplog.text == ""


def test_a_value_of_another_length_is_none(tmp_path):
    cache = ReferenceCache(tmp_path, FACTS)
    keys = np.zeros((1, 16), dtype=np.uint8)
    cache.publish(keys, np.full(1, -2, dtype=np.float32), np.full(1, 3, dtype=np.int32))
    assert cache.read(keys, np.array([3], dtype=np.int32)).tolist() == [-2]
    assert np.isnan(cache.read(keys, np.array([4], dtype=np.int32))).all()


def test_a_reference_that_gives_no_numbers_is_refused_by_row(tmp_path):
    class Broken(CountingScorer):
        def logps(self, model, batch, plan=None):
            return super().logps(model, batch) * float("nan")

    with pytest.raises(UserError, match="f:1"):
        fill(ReferenceCache(tmp_path, FACTS), GROUPS, scorer=Broken())
    assert list(tmp_path.glob("*/*.safetensors")) == []


def failing(code: int, *, attribute: str, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(ReferenceCache, attribute, fail)


@pytest.mark.parametrize(
    ("attribute", "code"),
    [("lock", errno.EROFS), ("publish", errno.ENOSPC), ("lock", errno.ENOTSUP)],
)
def test_a_cache_that_cannot_be_written_is_said_once(
    tmp_path, caplog, monkeypatch, attribute, code
):
    failing(code, attribute=attribute, monkeypatch=monkeypatch)
    parts, reference = fill(ReferenceCache(tmp_path, FACTS), GROUPS, budget=1)
    check(parts)
    assert reference.computed == 3
    assert caplog.text.count(os.strerror(code)) == 1
    assert "for this run alone" in caplog.text


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no folder that nobody may write to")
def test_a_read_only_folder(caplog):
    parts, reference = fill(ReferenceCache(Path("/proc/self"), FACTS), GROUPS)
    check(parts)
    assert reference.computed == 3
    assert caplog.text.count("for this run alone") == 1


def test_a_file_where_the_folder_should_be(tmp_path, caplog):
    (tmp_path / "cache").touch()
    parts, _ = fill(ReferenceCache(tmp_path / "cache", FACTS), GROUPS)
    check(parts)
    assert "for this run alone" in caplog.text


def test_an_interrupted_publish_leaves_nothing(tmp_path, monkeypatch):
    cache = ReferenceCache(tmp_path, FACTS)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (cache.path).mkdir()
    (cache.path / "about.json").touch()
    arrays = np.zeros((1, 16), np.uint8), np.full(1, -1, np.float32), np.ones(1, np.int32)
    with pytest.raises(OSError, match="No space"):
        cache.publish(*arrays)
    assert [path.name for path in cache.path.iterdir()] == ["about.json"]


def _fill_in_process(folder: Path, log: Path, results, most: int | None = None) -> None:
    scorer = CountingScorer(log, most=most)
    parts, reference = fill(ReferenceCache(folder, FACTS), MANY, scorer=scorer)
    check(parts)
    results.put(reference.computed)


def test_four_processes_at_once_compute_each_row_once(tmp_path):
    context = multiprocessing.get_context("fork")
    results, log = context.Queue(), tmp_path / "log"
    workers = [
        context.Process(target=_fill_in_process, args=(tmp_path / "cache", log, results))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    computed = sorted(results.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert computed == [0, 0, 0, 40]
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 80


def test_a_killed_filler_leaves_no_lock_and_what_it_published(tmp_path, monkeypatch):
    """It is killed in the middle, with at most 20 of 40 rows done; nobody is waited for then."""
    from dpo_lightning.reference import fill as reference

    def wait() -> None:
        raise AssertionError("a lock that nobody holds is waited for")

    monkeypatch.setattr(reference, "_PUBLISH_SECONDS", 0.0)
    context = multiprocessing.get_context("fork")
    log, folder = tmp_path / "log", tmp_path / "cache"
    filler = context.Process(target=_fill_in_process, args=(folder, log, context.Queue(), 40))
    filler.start()
    until(lambda: len(list(folder.glob("*/*.safetensors"))) >= 2)
    os.kill(filler.pid, signal.SIGKILL)
    filler.join()
    monkeypatch.setattr(reference, "_say_waiting", wait)
    parts, filled = fill(ReferenceCache(folder, FACTS), MANY)
    check(parts)
    assert 20 <= filled.computed < 40
