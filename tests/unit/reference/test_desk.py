"""Blocks handed out to processes that share them: each once, none waited for in vain."""

import os
import threading
from typing import Any

import numpy as np
import pytest
import torch

from dpo_lightning.errors import UserError
from dpo_lightning.reference import blocks, desk
from dpo_lightning.reference.blocks import Responses, plan_blocks
from dpo_lightning.reference.cache import ReferenceCache
from dpo_lightning.reference.desk import BlockDesk
from tests.support.reference_caches import (
    FACTS,
    MANY,
    CountingScorer,
    check,
    fill,
    values_in,
)

SOME = MANY[:16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Sixteen rows of eight tokens in blocks of four or less."""
    monkeypatch.setattr(blocks, "_LEAST_BLOCK_TOKENS", 32)
    monkeypatch.setattr(desk, "_LOOK_SECONDS", 0.0)


@pytest.fixture
def cache(tmp_path) -> ReferenceCache:
    return ReferenceCache(tmp_path / "cache", FACTS)


def desk_of(cache: ReferenceCache) -> BlockDesk:
    plan = plan_blocks(Responses.of(SOME), shared=True, micro_batch_tokens=1)
    return BlockDesk(plan, cache, range(len(plan.blocks)))


def values_of(number: int) -> dict[int, np.ndarray]:
    """Values that fit a block; its number tells whose they are."""
    plan = plan_blocks(Responses.of(SOME), shared=True, micro_batch_tokens=1)
    return {number: np.full(len(plan.members(number)), -1.0 - number, np.float32)}


def test_two_that_go_on_in_turn_compute_each_block_once(cache):
    one, other = desk_of(cache), desk_of(cache)
    computed: list[int] = []
    found: list[dict[int, np.ndarray]] = [{}, {}]
    for turn in range(200):
        here = (one, other)[turn % 2]
        handed = here.hand_out(1)
        found[turn % 2] |= handed.read
        for number in handed.compute:
            computed.append(number)
            found[turn % 2] |= values_of(number)
            here.publish(values_of(number))
    assert sorted(computed) == [*range(len(computed))]
    assert len(computed) == len(values_in(cache.path)) >= 4
    for own in found:
        assert own.keys() == {*computed}
        assert {number: values[0] for number, values in own.items()} == {
            number: -1.0 - number for number in computed
        }


def test_what_another_has_claimed_is_left_to_it(cache):
    one, other = desk_of(cache), desk_of(cache)
    taken = one.hand_out(1000).compute
    assert len(taken) >= 4
    assert other.hand_out(1000) == ([], {})
    one.publish(values_of(taken[0]))
    handed = other.hand_out(1000)
    assert (handed.compute, [*handed.read]) == ([], [taken[0]])
    one.close()  # with the others undone
    assert sorted(other.hand_out(1000).compute) == sorted(taken[1:])
    other.close()
    assert [*cache.path.glob(".*")] == []


def test_whoever_is_killed_leaves_its_blocks_to_the_others(cache):
    one, other = desk_of(cache), desk_of(cache)
    taken = one.hand_out(1000).compute
    for claim in one._claims.values():
        os.close(claim._handle)  # as the system does
    assert sorted(other.hand_out(1000).compute) == sorted(taken)
    one._claims.clear()
    other.close()


def test_a_block_that_never_comes_is_computed_here_as_well(cache, monkeypatch, caplog):
    monkeypatch.setattr(desk, "_PATIENCE_SECONDS", 0.0)
    one, other = desk_of(cache), desk_of(cache)
    taken = one.hand_out(1000).compute
    handed = other.hand_out(1000)
    assert len(handed.compute) == 1
    assert {*handed.compute} < {*taken}
    assert f"process {os.getpid()} on " in caplog.text
    assert "computed here as well" in caplog.text
    other.publish(values_of(handed.compute[0]))
    one.publish(values_of(handed.compute[0]))  # the same bytes once more
    assert len(values_in(cache.path)) == 1
    one.close()


def test_a_block_published_between_look_and_claim_is_read(cache, monkeypatch):
    one, other = desk_of(cache), desk_of(cache)
    real = ReferenceCache.claim

    def late(self: ReferenceCache, name: str) -> Any:
        monkeypatch.setattr(ReferenceCache, "claim", real)
        [number] = one.hand_out(1).compute
        one.publish(values_of(number))
        return real(self, name)

    one._open = dict(other._open)  # both begin at the same place
    monkeypatch.setattr(ReferenceCache, "claim", late)
    handed = other.hand_out(1)
    assert len(handed.read) == len(handed.compute) == 1
    other.close()
    assert [*cache.path.glob(".*")] == []


# Ranks that share a model -------------------------------------------------------------------------


class Thread:
    """One of several ranks in threads of this process, which meet at a barrier."""

    def __init__(self, rank: int, size: int, meeting: threading.Barrier, said: list[Any]) -> None:
        self.rank, self.size = rank, size
        self._meeting, self._said = meeting, said

    def gather(self, value: Any) -> list[Any]:
        self._said[self.rank] = value
        self._meeting.wait(30)
        found = [*self._said]
        self._meeting.wait(30)
        return found

    def from_first(self, function: Any) -> Any:
        return self.gather(function() if self.rank == 0 else None)[0]


def fill_on(size: int, cache: ReferenceCache, **more: Any) -> list[Any]:
    """The results of ranks, or their errors, and what each scorer saw."""
    meeting, said = threading.Barrier(size), [None] * size
    scorers = [more.get("scorer", CountingScorer)() for _ in range(size)]
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        team = Thread(rank, size, meeting, said)
        try:
            results[rank] = fill(cache, SOME, scorer=scorers[rank], budget=1, ranks=team)
        except UserError as error:
            results[rank] = error

    workers = [threading.Thread(target=work, args=[rank]) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return [results, scorers]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_that_share_a_model_give_the_same_bytes(cache, tmp_path, size):
    """A rank with fewer micro-batches repeats one, so that all make as many passes."""
    fill(ReferenceCache(tmp_path / "alone", FACTS), SOME, budget=1)
    results, scorers = fill_on(size, cache)
    assert values_in(cache.path) == values_in(tmp_path / "alone")
    for parts, _ in results:
        check(parts)
    assert [reference.computed for _, reference in results] == [16] + [0] * (size - 1)
    # They check what was read together, so it is the same on all.
    assert [reference.read for _, reference in results] == [[]] * size
    assert len({len(scorer.seen) for scorer in scorers}) == 1
    assert len({response for scorer in scorers for response in scorer.seen}) == 32
    if size > 1:
        assert len(scorers[0].seen) < 32
    results, scorers = fill_on(size, cache)
    assert [(r.rows, r.computed, len(r.read)) for _, r in results] == [(16, 0, 16)] * size
    assert [scorer.seen for scorer in scorers] == [[]] * size


def test_ranks_that_share_a_model_wait_for_others_in_short_turns(cache, monkeypatch):
    """Rank 0 looks for another's blocks and comes back: no rank waits in a message for long."""
    other = desk_of(cache)
    [number] = other.hand_out(1).compute
    turns: list[int] = []
    real = BlockDesk.hand_out

    def counted(self: BlockDesk, count: int) -> Any:
        if self is not other and len(turns) > 30 and number in other._claims:
            other.close()
        turns.append(count)
        return real(self, count)

    monkeypatch.setattr(BlockDesk, "hand_out", counted)
    results, _ = fill_on(2, cache)
    for parts, _ in results:
        check(parts)
    assert len(turns) > 30
    assert {*turns} == {2}


class Broken(CountingScorer):
    def token_logps(self, model, batch, plan):
        values = super().token_logps(model, batch, plan)
        return torch.full_like(values, float("nan"))


def test_an_error_is_that_of_all_ranks(cache):
    results, _ = fill_on(2, cache, scorer=Broken)
    assert [type(error) for error in results] == [UserError, UserError]
    assert str(results[0]) == str(results[1])
    assert values_in(cache.path) == {}
    assert [*cache.path.glob(".*.claim")] == []
