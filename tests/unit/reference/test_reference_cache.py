"""The reference cache: the parts of a key, damage, full disks, several processes at once."""

import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.reference import blocks
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
    values_in,
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
    turned = (GROUPS[1::-1], GROUPS[2:])
    parts, reference = fill(ReferenceCache(tmp_path, FACTS), *turned, scorer=scorer)
    check(parts)
    assert (reference.rows, reference.computed, scorer.seen) == (3, 0, [])


def test_one_more_row_computes_its_block(tmp_path, monkeypatch):
    """The row has eight tokens: in a block of 32 it comes beside three others or less."""
    monkeypatch.setattr(blocks, "_LEAST_BLOCK_TOKENS", 32)
    cache = ReferenceCache(tmp_path, FACTS)
    fill(cache, MANY)
    scorer = CountingScorer()
    parts, reference = fill(cache, [pair((1, 40), (2, 0, 0), (3, 0, 0)), *MANY], scorer=scorer)
    check(parts)
    assert reference.rows == 41
    assert 1 <= reference.computed <= 4
    assert len(scorer.seen) == 2 * reference.computed
    assert ((1, 40), (2, 0, 0)) in scorer.seen


def test_rows_that_are_not_needed_are_neither_read_nor_given_values(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_LEAST_BLOCK_TOKENS", 32)
    needed = np.zeros(40, dtype=bool)
    needed[[7, 19]] = True
    scorer = CountingScorer()
    [found], reference = fill(ReferenceCache(tmp_path, FACTS), MANY, scorer=scorer, needed=needed)
    check([[found[7], found[19]]])
    assert (reference.rows, reference.computed) == (2, 2)
    assert len(scorer.seen) <= 2 * 2 * 4  # two blocks of four rows or less
    assert [g.reference_logps is None for g in found] == (~needed).tolist()
    # The blocks are those of the whole data set: what was read is what a whole pass computes.
    part = values_in(tmp_path)
    fill(ReferenceCache(tmp_path / "whole", FACTS), MANY)
    whole = values_in(tmp_path / "whole")
    assert len(part) <= 2 < len(whole)
    assert part.items() <= whole.items()
    [found], reference = fill(ReferenceCache(tmp_path, FACTS), MANY)
    check([found])
    assert reference.rows == 40
    assert 32 <= reference.computed < 40


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
    assert json.loads(about.read_text()) == FACTS | {"layout": "blocks of parts", "values": "sums"}


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
    keys, lengths = np.zeros((1, 16), dtype=np.uint8), np.full(1, 3, dtype=np.int32)
    cache.publish("block", keys, lengths, np.full(1, -2, dtype=np.float32))
    assert cache.read("block", keys, lengths).tolist() == [-2]
    assert cache.read("block", keys, lengths + 1) is None


def test_a_cache_of_an_earlier_layout_is_said_and_not_read(tmp_path, caplog):
    """Its values were computed beside what was missing then, so they may differ in a last bit."""
    caplog.set_level("INFO")
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier/about.json").write_text(json.dumps(FACTS))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/about.json").write_text('{"by": "hand"}')
    assert fill(ReferenceCache(tmp_path, FACTS), GROUPS)[1].computed == 3
    [said] = [line for line in caplog.messages if "earlier" in line]
    assert said.startswith(
        f"reference: {tmp_path / 'earlier'} is from an earlier version and not used"
    )
    caplog.clear()
    fill(ReferenceCache(tmp_path, FACTS), GROUPS)
    assert caplog.messages == []


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
    [("claim", errno.EROFS), ("publish", errno.ENOSPC), ("claim", errno.EDQUOT)],
)
def test_a_cache_that_cannot_be_written_is_said_once(
    tmp_path, caplog, monkeypatch, attribute, code
):
    failing(code, attribute=attribute, monkeypatch=monkeypatch)
    parts, reference = fill(ReferenceCache(tmp_path, FACTS), GROUPS)
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

    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    (cache.path).mkdir()
    (cache.path / "about.json").touch()
    arrays = np.zeros((1, 16), np.uint8), np.ones(1, np.int32), np.full(1, -1, np.float32)
    with pytest.raises(OSError, match="No space"):
        cache.publish("block", *arrays)
    assert [path.name for path in cache.path.iterdir()] == ["about.json"]


def _fill_in_process(folder: Path, log: Path, results, most: int | None = None) -> None:
    scorer = CountingScorer(log, most=most)
    parts, reference = fill(ReferenceCache(folder, FACTS), MANY, scorer=scorer)
    check(parts)
    results.put(reference.computed)


def test_four_processes_at_once_compute_each_row_once(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_LEAST_BLOCK_TOKENS", 32)
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
    assert sum(computed) == 40
    lines = log.read_text().splitlines()
    assert len(lines) == len(set(lines)) == 80
    fill(ReferenceCache(tmp_path / "alone", FACTS), MANY)
    assert values_in(tmp_path / "cache") == values_in(tmp_path / "alone")
    assert [*(tmp_path / "cache").rglob("*.claim")] == []


def test_a_killed_fillers_block_is_taken_over_at_once(tmp_path, monkeypatch, caplog):
    """It is killed in a block, with 20 of 40 rows done or up to three more; nobody waits."""

    def is_stuck() -> bool:
        claims = [*folder.rglob("*.claim")]
        time.sleep(0.1)
        return len(claims) == 1 and claims == [*folder.rglob("*.claim")]

    caplog.set_level("INFO")
    monkeypatch.setattr(blocks, "_LEAST_BLOCK_TOKENS", 32)
    context = multiprocessing.get_context("fork")
    log, folder = tmp_path / "log", tmp_path / "cache"
    filler = context.Process(target=_fill_in_process, args=(folder, log, context.Queue(), 40))
    filler.start()
    until(lambda: log.exists() and len(log.read_text().splitlines()) >= 40)
    until(is_stuck)
    os.kill(filler.pid, signal.SIGKILL)
    filler.join()
    [claim] = folder.rglob("*.claim")
    claim.with_name(f"{claim.stem}.safetensors.{filler.pid}").write_bytes(b"half")
    parts, filled = fill(ReferenceCache(folder, FACTS), MANY)
    check(parts)
    assert 16 < filled.computed <= 20
    assert "waiting" not in caplog.text
    fill(ReferenceCache(tmp_path / "alone", FACTS), MANY)
    assert values_in(folder) == values_in(tmp_path / "alone")
    assert [path.name for path in folder.rglob(".*")] == []
