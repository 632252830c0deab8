"""The flat layout against a slow loop, and the plan of a step by its promises."""

import doctest
import pickle
from collections import Counter
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch.utils.data import DataLoader

from dpo_lightning.data import gathers, packing
from dpo_lightning.data.packing import (
    Bucket,
    GroupBatch,
    collate_groups,
    epoch_order,
    make_step_batch,
    plan_step,
)
from dpo_lightning.data.tokens import TokenGroup
from tests.support.batches import random_groups
from tests.support.properties import examples


def test_the_examples_are_true():
    result = doctest.testmod(packing)
    assert result.attempted > 3
    assert result.failed == 0


# Groups of any shape ------------------------------------------------------------------------------


def _ids(most):
    return st.lists(st.integers(0, 30), min_size=1, max_size=most).map(
        lambda values: np.array(values, dtype=np.int32)
    )


@st.composite
def token_groups(draw, most=9):
    responses = draw(st.lists(_ids(most), min_size=2, max_size=5))
    ranks = [1]
    for _ in responses[1:]:
        ranks.append(ranks[-1] + draw(st.booleans()))
    if ranks[-1] == 1:
        ranks[-1] = 2
    weight = draw(st.sampled_from([1.0, 0.5, 3.0]))
    return TokenGroup(
        *(draw(_ids(most)), tuple(responses), tuple(ranks), weight, "row", "key"),
        target_margin=draw(st.sampled_from([0.0, 0.5, -2.0])),
    )


MANY = st.lists(token_groups(), min_size=1, max_size=8)


# The flat layout ----------------------------------------------------------------------------------


def slow_layout(groups):
    """The row of tokens, one token and one pair at a time."""
    out = {name: [] for name in ("input_ids", "position_ids", "score_from", "targets", "response")}
    out |= {name: [] for name in ("lengths", "group", "rank", "pairs", "owner", "segment")}
    for g, group in enumerate(groups):
        for place, token in enumerate(group.prompt.tolist()):
            out["input_ids"].append(token)
            out["position_ids"].append(place)
            out["owner"].append(g)
            out["segment"].append(0)
        last_of_prompt = len(out["input_ids"]) - 1
        first = len(out["lengths"])
        for k, (response, rank) in enumerate(zip(group.responses, group.ranks, strict=True)):
            before = last_of_prompt
            for place, token in enumerate(response.tolist()):
                out["score_from"].append(before)
                out["targets"].append(token)
                out["response"].append(first + k)
                before = len(out["input_ids"])
                out["input_ids"].append(token)
                out["position_ids"].append(len(group.prompt) + place)
                out["owner"].append(g)
                out["segment"].append(k + 1)
            out["lengths"].append(len(response))
            out["group"].append(g)
            out["rank"].append(rank)
        for i in range(len(group.ranks)):
            for j in range(len(group.ranks)):
                if group.ranks[i] < group.ranks[j]:
                    out["pairs"].append((first + i, first + j))
    return out


@settings(max_examples=examples(80))
@given(MANY)
def test_the_layout_is_that_of_a_slow_loop(groups):
    batch = collate_groups(groups, range(10, 10 + len(groups)))
    slow = slow_layout(groups)
    for name in ("input_ids", "position_ids", "score_from", "targets", "response"):
        assert getattr(batch, name).tolist() == slow[name], name
    for name in ("lengths", "group", "rank"):
        assert getattr(batch, name).tolist() == slow[name], name
    pairs = list(zip(batch.chosen.tolist(), batch.rejected.tolist(), strict=True))
    assert Counter(pairs) == Counter(slow["pairs"])
    assert len(pairs) == sum(group.pairs for group in groups)
    assert batch.weight.tolist() == [group.weight for group in groups]
    assert batch.target_margin.tolist() == [group.target_margin for group in groups]
    assert batch.rows == tuple(range(10, 10 + len(groups)))
    assert batch.segments == tuple(
        (len(group.prompt), *map(len, group.responses)) for group in groups
    )
    assert len(batch.input_ids) == sum(group.tokens for group in groups)
    for name in (f.name for f in fields(GroupBatch)):
        value = getattr(batch, name)
        if isinstance(value, torch.Tensor):
            floating = name in ("weight", "target_margin", "pair_share")
            assert value.dtype == (torch.float32 if floating else torch.int64)


# Attention's buckets ------------------------------------------------------------------------------


def seen(batch) -> dict[int, set[int]]:
    """The flat tokens that the buckets let each flat token see."""
    found: dict[int, set[int]] = {}
    offset = 0
    places = {}
    for bucket in batch.buckets:
        count, width = bucket.queries.shape
        for row in range(count):
            for column in range(width):
                places[offset + row * width + column] = (bucket, row, column)
        offset += count * width
    for token, place in enumerate(batch.inverse.tolist()):
        bucket, row, column = places[place]
        assert bucket.queries[row, column] == token
        visible = bucket.key_positions[row] <= bucket.query_positions[row, column]
        keys = bucket.keys[row][visible].tolist()
        assert len(set(keys)) == len(keys)
        found[token] = set(keys)
    return found


def should_see(groups) -> dict[int, set[int]]:
    """The prompt and the own response before each token, written as a loop over tokens."""
    slow = slow_layout(groups)
    tokens = range(len(slow["input_ids"]))
    return {
        i: {
            j
            for j in tokens
            if slow["owner"][j] == slow["owner"][i]
            and slow["segment"][j] in (0, slow["segment"][i])
            and slow["position_ids"][j] <= slow["position_ids"][i]
        }
        for i in tokens
    }


@settings(max_examples=examples(80))
@given(st.lists(token_groups(most=20), min_size=1, max_size=8))
def test_buckets_let_each_token_see_what_it_should(groups):
    batch = collate_groups(groups, range(len(groups)))
    assert seen(batch) == should_see(groups)
    for bucket in batch.buckets:
        # An unused query sees one key at least: a softmax over nothing is NaN.
        # Even through the smallest of sliding windows, which leaves it the key at its own position.
        own = bucket.query_positions[:, :, None] == bucket.key_positions[:, None, :]
        assert own.any(2).all()


def test_a_call_is_not_larger_than_allowed(monkeypatch):
    groups = random_groups(30)
    few = collate_groups(groups, range(30))
    monkeypatch.setattr(gathers, "_CALL_SCORES", 1500)
    many = collate_groups(groups, range(30))
    assert len(few.buckets) < len(many.buckets)
    for bucket in many.buckets:
        count, queries = bucket.queries.shape
        assert count == 1 or count * queries * bucket.keys.shape[1] <= 1500
    assert seen(few) == seen(many)


def test_sequences_of_like_lengths_are_one_call(monkeypatch):
    """If a call costs nothing, prompts of 40 and responses of 3 are apart, each kind together."""
    groups = [
        TokenGroup(np.arange(p, dtype=np.int32), (np.zeros(3, np.int32),) * 2, (1, 2), 1.0, "", "")
        for p in (40, 40, 40)
    ]
    batch = collate_groups(groups, range(3))
    assert len(batch.buckets) == 1
    monkeypatch.setattr(gathers, "_CALL_COST", 0)
    batch = collate_groups(groups, range(3))
    shapes = [(*bucket.queries.shape, bucket.keys.shape[1]) for bucket in batch.buckets]
    assert shapes == [(6, 3, 43), (3, 40, 40)]


# The plan of a step -------------------------------------------------------------------------------

COSTS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


def first_fit(costs: list[int], budget: int) -> int:
    """Number of bins that first-fit needs, longest first."""
    room: list[int] = []
    for cost in costs:
        place = next((i for i, left in enumerate(room) if cost <= left), None)
        if place is None:
            room.append(budget - cost)
        else:
            room[place] -= cost
    return len(room)


@settings(max_examples=examples(300))
@given(costs=COSTS, world_size=st.integers(1, 6), budget=st.integers(1, 120))
def test_ranks_may_be_asked_for_as_many_micro_batches(costs, world_size, budget):
    """The same groups on the same ranks; only who shares a pass changes, and never over budget."""
    plain = plan_step(costs, world_size=world_size, micro_batch_tokens=budget)
    equal = plan_step(costs, world_size=world_size, micro_batch_tokens=budget, equal_counts=True)
    assert {len(rank) for rank in equal} == {max(map(len, plain))}
    for one, other in zip(equal, plain, strict=True):
        assert sorted(i for m in one for i in m) == sorted(i for m in other for i in m)
        assert not [m for m in one if len(m) > 1 and sum(costs[i] for i in m) > budget]
        # Empty ones only where there is nothing left to split.
        assert [] not in one or max(map(len, one)) <= 1


@settings(max_examples=examples(200))
@given(
    n=st.integers(1, 60), batch=st.integers(1, 9), seed=st.integers(0, 9), epoch=st.integers(0, 4)
)
def test_the_groups_of_a_step_are_the_same_at_any_world_size(n, batch, seed, epoch):
    groups = random_groups(n)
    order = epoch_order(n, seed=seed, epoch=epoch)
    seen = []
    for start in range(0, n, batch):
        rows = order[start : start + batch]
        by_world = set()
        for world_size in (1, 2, 3):
            steps = [
                make_step_batch(
                    groups,
                    rows,
                    rank=rank,
                    world_size=world_size,
                    micro_batch_tokens=64,
                    shared=True,
                )
                for rank in range(world_size)
            ]
            here = sorted(row for s in steps for m in s.micro_batches for row in m.rows)
            by_world.add(tuple(here))
        assert len(by_world) == 1
        seen += by_world.pop()
    assert sorted(seen) == list(range(n))


def test_micro_batches_of_a_rank_are_even():
    """400 tokens in a budget of 300: two of 200, not one of 300 and one of 100."""
    [plan] = plan_step([100] * 4, world_size=1, micro_batch_tokens=300)
    assert [len(micro) for micro in plan] == [2, 2]


@settings(max_examples=examples(300))
@given(costs=COSTS, world_size=st.integers(1, 6), budget=st.integers(1, 120))
def test_any_plan(costs, world_size, budget):
    plan = plan_step(costs, world_size=world_size, micro_batch_tokens=budget)
    assert len(plan) == world_size
    micro_batches = [micro for rank in plan for micro in rank]
    # Every group once, at any world size.
    assert sorted(i for micro in micro_batches for i in micro) == list(range(len(costs)))
    for micro in micro_batches:
        assert micro
        assert micro == sorted(micro)
        assert sum(costs[i] for i in micro) <= budget or len(micro) == 1
    for rank in plan:
        assert len(rank) <= first_fit(
            sorted((costs[i] for m in rank for i in m), reverse=True), budget
        )
    # Ranks differ by less than their longest group, and none is idle for want of sharing.
    loads = [sum(costs[i] for micro in rank for i in micro) for rank in plan]
    assert max(loads) - min(loads) <= max(costs)
    assert sum(load > 0 for load in loads) == min(world_size, len(costs))
    assert plan == plan_step(list(costs), world_size=world_size, micro_batch_tokens=budget)


def test_a_plan_is_balanced_better_than_dealing_in_turn():
    costs = np.random.default_rng(0).integers(20, 500, 64).tolist()
    plan = plan_step(costs, world_size=4, micro_batch_tokens=2048)
    loads = [sum(costs[i] for micro in rank for i in micro) for rank in plan]
    assert max(loads) <= 1.02 * sum(costs) / 4


# One rank's part of a step ------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_a_step(world_size, shared):
    groups = random_groups(20)
    rows = [3, 19, 0, 7, 12, 5]
    steps = [
        make_step_batch(
            groups, rows, rank=rank, world_size=world_size, micro_batch_tokens=70, shared=shared
        )
        for rank in range(world_size)
    ]
    # All ranks divide by the same totals, which are those of the groups.
    assert {(s.total_weight, s.pairs, s.tokens) for s in steps} == {
        (
            sum(groups[i].weight for i in rows),
            len(rows),
            sum(groups[i].tokens if shared else groups[i].padded_tokens for i in rows),
        )
    }
    micro_batches = [micro for step in steps for micro in step.micro_batches]
    assert sorted(row for micro in micro_batches for row in micro.rows) == sorted(rows)
    assert sum(float(micro.weight.sum()) for micro in micro_batches) == steps[0].total_weight
    assert sum(len(micro.chosen) for micro in micro_batches) == steps[0].pairs
    if shared:
        assert sum(len(micro.input_ids) for micro in micro_batches) == steps[0].tokens
    for micro in micro_batches:
        again = collate_groups([groups[i] for i in micro.rows], micro.rows)
        assert again.input_ids.tolist() == micro.input_ids.tolist()
        costs = [groups[i].tokens if shared else groups[i].padded_tokens for i in micro.rows]
        assert sum(costs) <= 70 or len(costs) == 1
    empty = [step for step in steps if not step.micro_batches]
    assert len(empty) == max(0, world_size - len(rows))


def test_a_prompt_that_is_repeated_costs_more():
    groups = random_groups(8)
    rows = range(8)
    shared, repeated = (
        make_step_batch(groups, rows, rank=0, world_size=1, micro_batch_tokens=40, shared=shared)
        for shared in (True, False)
    )
    assert shared.tokens < repeated.tokens
    assert len(shared.micro_batches) < len(repeated.micro_batches)


def tensors(value, path=""):
    """Every tensor of nested dataclasses and tuples, by its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            yield from tensors(item, f"{path}[{number}]")


def a_step():
    step = make_step_batch(
        random_groups(9), range(9), rank=0, world_size=1, micro_batch_tokens=80, shared=True
    )
    assert len(step.micro_batches) > 1
    return step


@pytest.mark.parametrize(
    "move",
    [
        lambda step: step.to("meta"),
        lambda step: step.to(torch.device("meta"), non_blocking=True),
        # What the trainer does with a batch.
        lambda step: move_data_to_device(step, torch.device("meta")),
    ],
)
def test_a_step_moves_with_all_its_tensors(move):
    step = a_step()
    before = dict(tensors(step))
    moved = move(step)
    after = dict(tensors(moved))
    assert type(moved) is type(step)
    assert after.keys() == before.keys()
    assert any(".buckets[0].keys" in path for path in after)
    assert {tensor.device.type for tensor in after.values()} == {"meta"}
    assert {tensor.device.type for tensor in before.values()} == {"cpu"}
    assert all(after[path].shape == before[path].shape for path in before)
    assert [m.rows for m in moved.micro_batches] == [m.rows for m in step.micro_batches]
    assert [m.segments for m in moved.micro_batches] == [m.segments for m in step.micro_batches]
    assert (moved.total_weight, moved.pairs, moved.tokens) == (
        step.total_weight,
        step.pairs,
        step.tokens,
    )
    assert isinstance(moved.micro_batches[0].buckets[0], Bucket)


@pytest.mark.parametrize(
    "carry",
    [
        lambda step: pickle.loads(pickle.dumps(step)),
        # What a worker process of the loader does with it, and the loader itself.
        lambda step: next(iter(DataLoader([step], batch_size=None))),
    ],
)
def test_a_step_is_carried_unchanged(carry):
    step = a_step()
    carried = carry(step)
    assert type(carried) is type(step)
    after = dict(tensors(carried))
    for path, tensor in tensors(step):
        assert torch.equal(after[path], tensor), path
        assert after[path].dtype == tensor.dtype
    assert carried.total_weight == step.total_weight
