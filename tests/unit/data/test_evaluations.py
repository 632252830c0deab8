"""Batches of held-out sets and their sample, and samples of so many tokens."""

from dataclasses import replace
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.evaluations import HeldOut
from dpo_lightning.data.held_out import choose_evaluated, in_lots, within_tokens
from dpo_lightning.data.tokens import TokenGroup
from tests.support.properties import examples
from tests.support.reference_caches import pair


def group(key: str) -> TokenGroup:
    return replace(pair((1, 2), (3, 4), (5,)), prompt_key=key)


def test_batches_of_two_sets():
    """Rows 0 to 4 are the first set, 5 to 7 the second; 1, 4 and 6 are sampled, by two."""
    found = HeldOut((5, 3), ("a", "b"), (1, 4, 6)).batches(2)
    assert [(batch.set, batch.sampled, [*batch.rows]) for batch in found] == [
        (0, True, [1, 4]),
        (1, True, [6]),
        (0, False, [0, 2]),
        (0, False, [3]),
        (1, False, [5, 7]),
    ]


def test_the_first_set_is_what_has_no_name_too():
    held_out = HeldOut((1, 1), ("a", "b"))
    assert [held_out.metrics_of(number) for number in (0, 1)] == [["", "a/"], ["b/"]]
    assert HeldOut((3,)).metrics_of(0) == [""]


@settings(max_examples=examples(50))
@given(st.data())
def test_each_row_is_in_one_batch_of_its_set(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    rows = [*range(sum(sizes))]
    sample = data.draw(st.none() | st.sets(st.sampled_from(rows)) if rows else st.none())
    held_out = HeldOut(
        tuple(sizes), ("a", "b", "c")[: len(sizes)], None if sample is None else tuple(sample)
    )
    size = data.draw(st.integers(1, 4))
    batches = held_out.batches(size)
    assert sorted(row for batch in batches for row in batch.rows) == rows
    for batch in batches:
        assert 0 < len(batch.rows) <= size
        start = sum(sizes[: batch.set])
        assert all(start <= row < start + sizes[batch.set] for row in batch.rows)
        assert all((sample is None or row in sample) is batch.sampled for row in batch.rows)
    assert all(one.sampled or not other.sampled for one, other in pairwise(batches))


@settings(max_examples=examples(30))
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(0, 60))
def test_a_sample_is_the_longest_beginning_by_lots_within_its_tokens(
    costs: list[int], budget: int
) -> None:
    """And so it is one of the samples that a number of rows gives."""
    groups = [group(f"prompt {i}") for i in range(len(costs))]
    chosen = within_tokens(groups, costs, budget)
    assert sum(costs[number] for number in chosen) <= budget
    order = in_lots(groups)
    assert sorted(order[: len(chosen)]) == chosen
    if len(chosen) < len(groups):
        following = order[len(chosen)]
        assert sum(costs[number] for number in [*chosen, following]) > budget
        assert choose_evaluated(groups, len(chosen)) == chosen
