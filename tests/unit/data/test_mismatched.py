"""Responses behind prompts that are not theirs: one fixed pairing, cut to fit, cached like all."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.mismatched import (
    ONE_GROUP,
    ONE_PROMPT,
    LaidOut,
    add_mismatched,
    mismatched_group,
    pair_up,
)
from dpo_lightning.data.packing import collate_groups, make_step_batch
from dpo_lightning.data.splits import PreparedData
from dpo_lightning.data.tokens import TokenGroup
from tests.support.groups import ids
from tests.support.properties import examples


def group(prompt: int, *responses: int, label: bool | None = None) -> TokenGroup:
    """A group of one-token texts with an end."""
    return TokenGroup(
        prompt=ids(prompt),
        responses=tuple(ids(response, 0) for response in responses),
        ranks=tuple(range(1, len(responses) + 1)),
        weight=1.0,
        source=f"rows:{prompt}",
        prompt_key=str(prompt),
        label=label,
    )


def rows(count: int = 6) -> list[TokenGroup]:
    """Three prompts with a good and a bad response each."""
    return [group(i % 3 + 1, 10 + i, label=i % 2 == 0) for i in range(count)]


def partner(groups: list[TokenGroup], own: TokenGroup) -> TokenGroup:
    """The group whose response is another one's mismatched one."""
    assert own.mismatched is not None
    [found] = [g for g in groups if any(np.array_equal(r, own.mismatched.ids) for r in g.responses)]
    return found


def test_each_group_gets_a_response_to_another_prompt():
    groups = rows()
    paired = pair_up(groups, max_length=8)
    for own, before in zip(paired, groups, strict=True):
        assert partner(groups, own).prompt.tolist() != own.prompt.tolist()
        assert replace(own, mismatched=None) == before


def test_the_pairing_is_of_the_content_and_not_of_the_order():
    groups = rows()
    forwards = {g.responses[0][0]: g.mismatched.ids.tolist() for g in pair_up(groups, max_length=8)}
    backwards = {
        g.responses[0][0]: g.mismatched.ids.tolist() for g in pair_up(groups[::-1], max_length=8)
    }
    assert forwards == backwards


def test_of_different_prompts_every_response_is_used_once():
    """A circle over the rows in the order of their hashes."""
    groups = [group(i, 20 + i, label=True) for i in range(1, 9)]
    used = [own.mismatched.ids.tolist() for own in pair_up(groups, max_length=8)]
    assert sorted(used) == [[20 + i, 0] for i in range(1, 9)]


def test_of_pairs_chosen_and_rejected_are_taken():
    groups = [group(i, 100 + i, 200 + i) for i in range(1, 41)]
    firsts = [int(own.mismatched.ids[0]) for own in pair_up(groups, max_length=8)]
    chosen = sum(first < 200 for first in firsts)
    assert 8 < chosen < 32


def test_what_does_not_fit_behind_a_prompt_is_cut_off():
    groups = [
        replace(group(1, 5, label=True), prompt=ids(1, 1, 1, 1)),
        replace(group(2, 6, label=False), responses=(ids(6, 7, 8, 9, 0),)),
    ]
    long, short = pair_up(groups, max_length=6)
    assert long.mismatched.ids.tolist() == [6, 7]
    assert short.mismatched.ids.tolist() == [5, 0]
    # Of a prompt that fills all but its own response a token is left.
    assert len(pair_up(groups, max_length=4)[0].mismatched.ids) == 1


def test_one_prompt_has_no_other_and_one_group_a_step_is_said():
    same = [group(1, 10 + i, label=True) for i in range(3)]
    data = PreparedData(train=same, eval=[])
    add_mismatched(data, max_length=8, batch_size=4)
    assert [own.mismatched for own in data.train] == [None] * 3
    assert data.notes == [ONE_PROMPT]
    data = PreparedData(train=rows(), eval=[])
    add_mismatched(data, max_length=8, batch_size=1)
    assert data.notes == [ONE_GROUP]
    data = PreparedData(train=rows(), eval=[])
    add_mismatched(data, max_length=8, batch_size=2)
    assert data.notes == []


def test_each_set_is_paired_within_itself():
    held_out = [group(50 + i, 60 + i, label=True) for i in range(4)]
    data = PreparedData(train=rows(), eval=held_out, sets={"a": 2, "b": 2})
    add_mismatched(data, max_length=8, batch_size=4)
    assert [int(own.mismatched.ids[0]) for own in data.eval] == [61, 60, 63, 62]
    assert all(int(own.mismatched.ids[0]) < 50 for own in data.train)


def test_the_reference_sees_it_as_a_group_of_its_own():
    """Before the groups, which stay as they are; values go back to where they are from."""
    paired, plain = pair_up(rows(2), max_length=8), [group(8, 9, 7), group(1, 2, 3)]
    parts = [[plain[0], *paired], [plain[1]]]
    needed = np.array([True, False, True, True])
    laid = LaidOut.of(parts, needed)
    assert laid.parts[2:] == parts
    assert [len(part) for part in laid.parts] == [2, 0, 3, 1]
    assert laid.wanted.tolist() == [False, True, *needed.tolist()]
    assert (laid.first, laid.rows) == (2, [1, 2])
    filled = [
        replace(own, reference_logps=np.arange(len(own.responses), dtype=np.float32) - number)
        if wanted
        else own
        for number, (own, wanted) in enumerate(zip(laid.groups, laid.wanted, strict=True))
    ]
    train, held_out = laid.put_together(filled)
    assert [own.reference_logps is None for own in train] == [False, True, False]
    assert train[1].mismatched.reference_logp is None
    assert train[2].mismatched.reference_logp == -1.0
    assert train[2].reference_logps.tolist() == [-4.0]
    assert held_out[0].reference_logps.tolist() == [-5.0, -4.0]


def test_without_mismatched_responses_nothing_is_laid_out():
    plain = [group(8, 9, 7)]
    laid = LaidOut.of([plain, []], None)
    assert (laid.parts, laid.wanted.tolist(), laid.first) == ([plain, []], [True], 0)
    assert laid.put_together(plain) == [plain, []]


def test_alone_it_is_a_group_of_which_nothing_is_compared():
    own = pair_up(rows(), max_length=8)[0]
    own = replace(own, mismatched=replace(own.mismatched, reference_logp=-7.5), weight=3.0)
    alone = mismatched_group(own)
    assert alone.prompt is own.prompt
    assert [r.tolist() for r in alone.responses] == [own.mismatched.ids.tolist()]
    assert alone.reference_logps.tolist() == [-7.5]
    assert (alone.pairs, alone.mismatched, alone.label) == (0, None, None)


# In steps -----------------------------------------------------------------------------------------


def test_labels_are_laid_out_and_pairs_have_theirs_by_rank():
    batch = collate_groups([group(1, 5, label=False), group(2, 6, 7)], [0, 1])
    assert batch.desirable.tolist() == [False, True, False]
    assert batch.desirable.dtype == torch.bool
    assert batch.chosen.tolist() == [1]
    assert batch.segments == ((1, 2), (1, 2, 2))
    assert collate_groups([group(2, 6, 7)], [0]).desirable is None


def test_single_responses_alone_have_no_pair():
    batch = collate_groups([group(1, 5, label=False)], [0])
    assert (batch.chosen.tolist(), batch.pair_share.tolist()) == ([], [])
    assert batch.input_ids.tolist() == [1, 5, 0]


@settings(max_examples=examples(25))
@given(
    st.integers(1, 3), st.integers(1, 20), st.booleans(), st.lists(st.integers(1, 3), max_size=6)
)
def test_ranks_share_the_mismatched_responses_of_a_step(ranks, tokens, equal, weights):
    """Each once over all ranks; with equal counts all ranks make as many forward passes."""
    groups = [
        replace(group(i + 1, 20 + i, label=True), weight=float(weight))
        for i, weight in enumerate([1, 2, *weights])
    ]
    paired = pair_up([*groups, group(90, 91, 92)], max_length=8)
    batches = [
        make_step_batch(
            paired,
            range(len(paired)),
            rank=rank,
            world_size=ranks,
            micro_batch_tokens=tokens,
            shared=True,
            equal_counts=equal,
        )
        for rank in range(ranks)
    ]
    seen = [row for batch in batches for micro in batch.counted_mismatched for row in micro.rows]
    assert sorted(seen) == list(range(len(paired)))
    for batch in batches:
        assert batch.mismatched_count == len(paired)
        assert batch.examples == len(paired) + 1
        assert batch.example_weight == sum(g.weight for g in groups) + 2
        assert batch.total_weight == sum(g.weight for g in groups) + 1
        assert batch.tokens == sum(g.tokens + len(g.prompt) + len(g.mismatched.ids) for g in paired)
    if equal:
        assert len({len(batch.mismatched) for batch in batches}) == 1
        assert len({len(batch.micro_batches) for batch in batches}) == 1


def test_a_step_travels_with_its_labels_and_mismatched_responses():
    paired = pair_up(rows(), max_length=8)
    step = make_step_batch(
        paired, range(6), rank=0, world_size=1, micro_batch_tokens=100, shared=True
    )
    kind, arguments = step.__reduce__()
    again = kind(*arguments)
    assert again.mismatched[0].input_ids.tolist() == step.mismatched[0].input_ids.tolist()
    assert again.micro_batches[0].desirable.tolist() == [True, False] * 3
    assert again.mismatched_count == 6


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_groups_are_left_as_they_are(count: int):
    groups = rows(count)
    assert pair_up(groups, max_length=8) == groups
