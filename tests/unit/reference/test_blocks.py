"""Blocks of responses: each in one, by content alone, within the budget, stable where rows come."""

import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.held_out import choose_evaluated
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.reference.blocks import BlockPlan, Responses, pass_tokens, plan_blocks
from tests.support.properties import examples
from tests.support.reference_caches import pair

BUDGET = 2048  # of a training micro-batch: passes and blocks of as many tokens


def plan_of(*parts, shared: bool = True, micro_batch_tokens: int = BUDGET) -> BlockPlan:
    return plan_blocks(Responses.of(*parts), shared=shared, micro_batch_tokens=micro_batch_tokens)


def some_groups(count: int, seed: int = 0) -> list[TokenGroup]:
    """Pairs and triples of ragged lengths; some prompts come again, some responses too."""
    draw = random.Random(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(1000) for _ in range(draw.randint(1, most)))

    groups: list[TokenGroup] = []
    for _ in range(count):
        group = pair(ids(120), *(ids(150) for _ in range(draw.choice([2, 2, 3]))))
        if groups and draw.random() < 0.2:
            other = draw.choice(groups)
            responses = (other.responses[0], *group.responses[1:])
            group = replace(group, prompt=other.prompt, responses=responses)
        groups.append(group)
    return groups


def names(plan: BlockPlan) -> list[str]:
    return [block.name for block in plan.blocks]


def content(plan: BlockPlan) -> dict[str, list[list[list[bytes]]]]:
    """Each micro-batch of each block as prompts and responses, as the model reads them."""
    return {
        block.name: [
            [
                [group.prompt.tobytes(), *(own.tobytes() for own in group.responses)]
                for group in plan.passes(number, micro)
            ]
            for micro in range(len(block.ends))
        ]
        for number, block in enumerate(plan.blocks)
    }


def test_every_different_response_is_in_one_block_with_its_prompt():
    groups = some_groups(300)
    plan = plan_of(groups, micro_batch_tokens=256)
    seen = [
        (prompt, response)
        for micros in content(plan).values()
        for micro in micros
        for prompt, *responses in micro
        for response in responses
    ]
    wanted = {(g.prompt.tobytes(), own.tobytes()) for g in groups for own in g.responses}
    assert len(seen) == len({*seen}) == len(wanted)
    assert {*seen} == wanted
    members = [i for number in range(len(plan.blocks)) for i in plan.members(number).tolist()]
    assert sorted(members) == [*range(len(wanted))]
    for number in range(len(plan.blocks)):
        assert {*plan.block_of[plan.members(number)].tolist()} == {number}


@pytest.mark.parametrize("shared", [True, False])
def test_micro_batches_keep_to_the_budget_and_blocks_to_theirs(shared):
    """Passes of 4 x 128 = 512 tokens in blocks of 1,024: no response here is longer alone."""
    plan = plan_of(some_groups(300), shared=shared, micro_batch_tokens=128)
    sizes = []
    for number, block in enumerate(plan.blocks):
        costs = [
            sum(g.tokens if shared else g.padded_tokens for g in plan.passes(number, micro))
            for micro in range(len(block.ends))
        ]
        assert max(costs) <= 512
        sizes.append(sum(costs))
    # A prompt that two micro-batches share counts once in each.
    assert max(sizes) <= 1024 + 120 * max(len(block.ends) for block in plan.blocks)
    assert sum(sizes) / len(sizes) > 500


def test_the_order_of_the_rows_does_not_matter():
    groups = some_groups(200)
    shuffled = random.Random(1).sample(groups, len(groups))
    again = [*shuffled, *groups[:20]]  # some rows twice
    first = content(plan_of(groups))
    assert content(plan_of(shuffled)) == first
    assert content(plan_of(again)) == first


@pytest.mark.parametrize("seed", range(3))
def test_a_row_more_touches_the_block_it_falls_into(seed):
    """That block changes, or is cut in two or a few; all others stay as they were."""
    groups = some_groups(400, seed)
    before = {*names(plan_of(groups))}
    assert len(before) > 8
    for more in some_groups(5, seed + 100):
        after = {*names(plan_of([*groups, more]))}
        assert len(before - after) <= 2
        assert len(after - before) <= 4
        assert len(before & after) >= len(before) - 2


def test_what_is_needed_changes_no_block():
    groups = some_groups(200)
    plan = plan_of(groups)
    wanted = np.zeros(len(groups), dtype=bool)
    wanted[3] = True
    needed = plan.needed(wanted)
    assert 1 <= len(needed) < len(plan.blocks)
    found = {i for number in needed for i in plan.members(number).tolist()}
    assert {*plan.responses.of_group(3).tolist()} <= found
    assert plan.needed(np.ones(len(groups), dtype=bool)) == [*range(len(plan.blocks))]
    assert plan.needed(np.zeros(len(groups), dtype=bool)) == []


def test_budgets_that_differ_a_little_have_the_same_blocks():
    """The largest power of two in a micro-batch, in four of them up to 1,024; at most 16,384."""
    assert [pass_tokens(n) for n in (1, 20, 200, 512, 2048, 3000, 4095, 4096, 1 << 20)] == [
        4, 64, 512, 1024, 2048, 2048, 2048, 4096, 16384,
    ]  # fmt: skip
    groups = some_groups(200)
    assert content(plan_of(groups, micro_batch_tokens=3000)) == content(plan_of(groups))
    assert names(plan_of(groups, micro_batch_tokens=1024)) != names(plan_of(groups))


def test_a_name_says_where_micro_batches_end():
    """The same four tiny rows are one block; in one micro-batch, or in several."""
    groups = [pair((1, i), (2, i), (3, i)) for i in range(4)]
    whole, cut = plan_of(groups), plan_of(groups, micro_batch_tokens=3)
    assert [len(plan.blocks) for plan in (whole, cut)] == [1, 1]
    assert len(whole.blocks[0].ends) == 1 < len(cut.blocks[0].ends)
    assert names(whole) != names(cut)


def test_many_responses_of_one_prompt_are_cut_into_passes_of_sixteen():
    """40 responses of 3 tokens behind 10: 16 + 16 + 8 in three passes, 3 x 10 + 40 x 3 tokens."""
    group = pair(tuple(range(10)), *((1, i, 0) for i in range(40)))
    plan = plan_of([group])
    [micros] = [*content(plan).values()]
    assert [len(own) - 1 for own in micros[0]] == [16, 16, 8]
    # 64 tokens hold a pass of sixteen (58), and not two: the bits of the keys decide which.
    small = plan_of([group], micro_batch_tokens=16)
    sizes = [
        [g.tokens for g in small.passes(0, micro)] for micro in range(len(small.blocks[0].ends))
    ]
    assert sum((total - 10) // 3 for own in sizes for total in own) == 40
    assert max(map(sum, sizes)) <= 64


def test_a_response_longer_than_the_budget_is_alone():
    long = pair(tuple(range(50)), (1,) * 5000, (2,) * 5000)
    plan = plan_of([long, *some_groups(20)], micro_batch_tokens=256)
    alone = [
        micro for micros in content(plan).values() for micro in micros if len(micro[0][1]) > 9999
    ]
    assert [len(micro) for micro in alone] == [1, 1]
    assert [len(micro[0]) - 1 for micro in alone] == [1, 1]


def test_like_lengths_are_computed_together():
    """Rows of 10 and of 1,000 tokens: no block of these has both, so none is mostly padding."""
    draw = random.Random(0)

    def row(length: int) -> TokenGroup:
        return pair((draw.randrange(1 << 20),) * length, (1,), (2,))

    plan = plan_of([row(length) for length in (10, 1000) for _ in range(60)])
    for number in range(len(plan.blocks)):
        lengths = {len(g.prompt) for g in plan.passes(number, 0)}
        assert len(lengths) == 1


# Parts of a data set ------------------------------------------------------------------------------


def test_no_block_is_of_two_parts_and_what_both_have_is_of_the_last():
    """Training rows need no block that held-out rows are in, but for the rows that both have."""
    train, held_out = some_groups(150), some_groups(30, seed=1)
    held_out = [*held_out, train[7]]
    plan = plan_of(train, held_out)
    sides = np.array([True] * len(train) + [False] * len(held_out))
    of_train, of_held_out = ({*plan.needed(own)} for own in (sides, ~sides))
    alone = {*plan.responses.of_group(7).tolist()}
    for number in of_train & of_held_out:
        assert {*plan.members(number).tolist()} & alone
    assert len(of_train & of_held_out) <= len(alone)
    assert of_train | of_held_out == {*range(len(plan.blocks))}
    # The held-out rows have the blocks that they have without any others.
    assert {plan.blocks[n].name for n in of_held_out} == {*names(plan_of(held_out))}
    assert {*names(plan_of(train, []))} == {*names(plan_of(train))}


def test_a_sample_of_the_held_out_rows_is_in_the_first_blocks_of_each_length():
    """2,000 pairs, each with a prompt of its own, some 45 tokens long, in blocks of 1,024.

    Of a sample of 500 each class of lengths has the lowest lots: one block of a class may be both
    of the sample and not, so that 500 / 2,000 of the blocks are needed and few more.
    """
    draw = random.Random(0)
    groups = [
        replace(
            pair((number, 1), *(tuple(draw.choices(range(99), k=k)) for k in (20, 23))),
            prompt_key=f"prompt {number}",
        )
        for number in range(2000)
    ]
    chosen = choose_evaluated(groups, 500)
    assert chosen is not None
    wanted = np.zeros(len(groups), dtype=bool)
    wanted[chosen] = True
    plan = plan_of([], groups, micro_batch_tokens=1024)
    needed = plan.needed(wanted)
    assert len(plan.blocks) > 80
    assert len(needed) <= len(plan.blocks) / 4 + 2
    sampled = {i for number in np.flatnonzero(wanted) for i in plan.responses.of_group(number)}
    whole = [n for n in needed if {*plan.members(n).tolist()} <= sampled]
    assert len(needed) - len(whole) <= 1


@settings(max_examples=examples(20))
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=4),
            st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=2, max_size=4),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 12),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_any_rows_have_one_plan_whatever_their_order(rows, tokens, shared, draw):
    groups = [pair(tuple(prompt), *map(tuple, responses)) for prompt, responses in rows]
    plan = plan_of(groups, shared=shared, micro_batch_tokens=tokens)
    counted = sorted(i for number in range(len(plan.blocks)) for i in plan.members(number))
    assert counted == [*range(len(plan.responses))]
    order = [*groups]
    draw.shuffle(order)
    other = plan_of(order, shared=shared, micro_batch_tokens=tokens)
    assert content(other) == content(plan)
    assert names(other) == names(plan)
