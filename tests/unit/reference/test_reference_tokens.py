"""Reference log-probabilities per token: apart from the sums, checked, and equal to live ones."""

import contextlib

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.errors import UserError
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.reference.cache import ReferenceCache
from dpo_lightning.reference.fill import with_reference_logps
from dpo_lightning.reference.kinds import CachedReference, LiveReference, NoReference
from tests.support.batches import make_groups
from tests.support.models import make_model
from tests.support.reference_caches import (
    FACTS,
    GROUPS,
    CountingScorer,
    empty,
    expected,
    flip,
    only_part,
    other_file,
    poison,
    positive,
    publish_unchecked,
    rewrite,
    truncate,
)


def tokens_of(group) -> list[list[float]]:
    share = int(group.prompt.sum()) / 100
    return [[-int(t) - share / len(r) for t in r] for r in group.responses]


def fill(cache: ReferenceCache, *parts, scorer=None, budget: int = 8, per_token: bool = True):
    return with_reference_logps(
        parts,
        cache,
        load=lambda: torch.nn.Linear(1, 1),
        scorer=scorer or CountingScorer(),
        device=torch.device("cpu"),
        precision=contextlib.nullcontext,
        micro_batch_tokens=budget,
        per_token=per_token,
    )


def check(parts) -> None:
    for group in (group for part in parts for group in part):
        for own, wanted in zip(group.reference_token_logps, tokens_of(group), strict=True):
            assert own.dtype == np.float32
            np.testing.assert_allclose(own, wanted, atol=1e-6)
        assert group.reference_logps.dtype == np.float32
        np.testing.assert_allclose(group.reference_logps, expected(group), rtol=1e-6)


@pytest.fixture
def cache(tmp_path):
    return ReferenceCache(tmp_path, FACTS)


# The cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 8, 100])
def test_every_different_response_is_computed_once_and_read_ever_after(cache, budget):
    scorer = CountingScorer()
    parts, reference = fill(cache, GROUPS[:2], GROUPS[2:], scorer=scorer, budget=budget)
    check(parts)
    assert [len(part) for part in parts] == [2, 1]
    assert (reference.rows, reference.computed) == (3, 3)
    assert len(scorer.seen) == len(set(scorer.seen)) == 6

    scorer = CountingScorer()
    parts, reference = fill(cache, GROUPS[1::-1], GROUPS[2:], scorer=scorer, budget=budget)
    check(parts)
    assert (reference.rows, reference.computed, scorer.seen) == (3, 0, [])


def test_sums_and_tokens_do_not_mix(cache):
    assert fill(cache, GROUPS)[1].computed == 3
    parts, reference = fill(cache, GROUPS, per_token=False)
    assert reference.computed == 3
    assert {group.reference_token_logps for group in parts[0]} == {None}
    for per_token in (False, True):
        assert fill(cache, GROUPS, per_token=per_token)[1].computed == 0
    assert load_file(only_part(cache))["logps"].shape == (6,)
    tokens = cache.of_tokens()
    assert tokens.path != cache.path
    assert tokens.of_tokens().path == tokens.path
    assert load_file(only_part(tokens))["logps"].shape == (2 * 5 + 3,)


def test_a_file_of_sums_among_those_of_tokens_is_not_used(cache, caplog):
    fill(cache, GROUPS, per_token=False)
    part = only_part(cache)
    tokens = cache.of_tokens()
    tokens.path.mkdir()
    part.rename(tokens.path / part.name)
    parts, reference = fill(cache, GROUPS)
    check(parts)
    assert reference.computed == 3
    assert "is damaged" in caplog.text


def shorter(path) -> None:
    """A file whose name fits, whose last response has a token less than it says."""
    part = load_file(path)
    publish_unchecked(path, part | {"logps": part["logps"][:-1]})


def no_tokens(path) -> None:
    part = load_file(path)
    part["lengths"][:2] = [0, part["lengths"][:2].sum()]
    publish_unchecked(path, part)


def rectangle(path) -> None:
    part = load_file(path)
    publish_unchecked(path, part | {"logps": part["logps"][:, None]})


def more_keys(path) -> None:
    part = load_file(path)
    publish_unchecked(path, part | {"keys": np.zeros((7, 16), dtype=np.uint8)})


def one_length(path) -> None:
    part = load_file(path)
    publish_unchecked(path, part | {"lengths": np.array(13, dtype=np.int32)})


def infinite(path) -> None:
    part = load_file(path)
    part["logps"][-1] = -np.inf
    publish_unchecked(path, part)


@pytest.mark.parametrize(
    "damage",
    [
        truncate, empty, flip, other_file, poison, positive, infinite, shorter, no_tokens,
        lambda path: rewrite(path, logps=np.full(13, -1, dtype=np.float32)),
        lambda path: rewrite(path, logps=np.full(13, -1, dtype=np.float64)),
        rectangle, more_keys, one_length,
    ],
)  # fmt: skip
def test_a_damaged_file_is_computed_again_and_never_used(cache, caplog, damage):
    fill(cache, GROUPS)
    damage(only_part(cache.of_tokens()))
    parts, reference = fill(cache, GROUPS)
    check(parts)
    assert reference.computed == 3
    assert "is damaged" in caplog.text
    caplog.clear()
    assert fill(cache, GROUPS)[1].computed == 0
    assert caplog.text == ""


def test_values_come_back_for_the_very_responses_they_are_of(cache, caplog):
    cache = cache.of_tokens()
    keys = np.arange(32, dtype=np.uint8).reshape(2, 16)
    lengths = np.array([3, 2], np.int32)
    values = np.array([-1, -2, -3, -4, -5], dtype=np.float32)
    cache.publish("block", keys, lengths, values)
    assert cache.read("other", keys, lengths) is None
    assert cache.read("block", keys, lengths).tolist() == [-1, -2, -3, -4, -5]
    assert caplog.text == ""
    assert cache.read("block", keys, lengths[::-1]) is None
    assert "is of other responses" in caplog.text


def test_a_file_that_does_not_fit_is_not_written(cache):
    cache = cache.of_tokens()
    with pytest.raises(ValueError, match="different lengths"):
        cache.publish(
            "block",
            *(np.zeros((1, 16), np.uint8), np.array([2], np.int32), np.full(1, -1, np.float32)),
        )
    assert not cache.path.exists()


def test_a_reference_that_gives_no_numbers_is_refused_by_row(cache, tmp_path):
    class Broken(CountingScorer):
        def token_logps(self, model, batch, plan):
            values = super().token_logps(model, batch, plan)
            values[-1] = float("nan")
            return values

    with pytest.raises(UserError, match=r"f:1 is nan"):
        fill(cache, GROUPS, scorer=Broken())
    assert list(tmp_path.glob("*/*.safetensors")) == []


def test_a_cache_that_cannot_be_written_still_gives_values(tmp_path, caplog):
    (tmp_path / "cache").touch()
    parts, reference = fill(ReferenceCache(tmp_path / "cache", FACTS), GROUPS)
    check(parts)
    assert reference.computed == 3
    assert "for this run alone" in caplog.text


# The batch and the references ---------------------------------------------------------------------


def test_the_values_go_with_a_micro_batch_in_the_order_of_its_targets(cache):
    [groups], _ = fill(cache, GROUPS)
    batch = collate_groups(groups, [0, 1, 2])
    values = CachedReference(rows=3, computed=0).token_logps(batch, None)
    wanted = [value for g in GROUPS for tokens in tokens_of(g) for value in tokens]
    assert values.dtype == torch.float32
    assert values.shape == batch.targets.shape
    np.testing.assert_allclose(values, wanted, atol=1e-6)
    assert collate_groups([groups[0], GROUPS[1]], [0, 1]).reference_token_logps is None
    assert batch.to("meta").reference_token_logps.device.type == "meta"


def test_without_a_reference_there_is_nothing():
    assert NoReference().token_logps(collate_groups(GROUPS, [0, 1, 2]), None) is None


def test_a_live_reference_counts_what_it_computes():
    scorer = Scorer("flat")
    model = make_model("llama")
    scorer.prepare(model)
    reference = LiveReference(model, scorer)
    values = reference.token_logps(collate_groups(make_groups(), [0, 1, 2]), None)
    assert not values.requires_grad
    assert (reference.rows, reference.computed) == (3, 3)


@pytest.mark.parametrize("path", ["flat", "padded"])
def test_prefixes_of_cached_responses_equal_live_ones(tmp_path, path):
    """Sums over min(lengths), as a loss over the first tokens of each response takes them."""
    groups = make_groups()
    scorer = Scorer(path)
    model = make_model("llama")
    scorer.prepare(model)
    cached = {}
    for per_token in (False, True):
        [filled], reference = with_reference_logps(
            [groups],
            ReferenceCache(tmp_path, FACTS),
            load=lambda: model,
            scorer=scorer,
            device=torch.device("cpu"),
            precision=contextlib.nullcontext,
            micro_batch_tokens=16,
            per_token=per_token,
        )
        cached[per_token] = collate_groups(filled, range(3)), reference
    batch, reference = cached[True]
    live = LiveReference(model, scorer)
    plan = scorer.plan(batch)
    own, other = reference.token_logps(batch, plan), live.token_logps(batch, plan)
    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)

    starts = batch.lengths.cumsum(0) - batch.lengths
    for most in (1, 2, 3, 100):
        inside = torch.arange(len(own)) - starts[batch.response] < most
        sums = [
            torch.zeros(len(starts)).index_add(0, batch.response[inside], values[inside])
            for values in (own, other)
        ]
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-5, atol=1e-5)
    # The sums beside them are those of the scorer, live and out of the cache of sums.
    for values in (live.logps(batch, plan), cached[False][0].reference_logps, sums[0]):
        torch.testing.assert_close(reference.logps(batch, plan), values, rtol=1e-5, atol=1e-5)
