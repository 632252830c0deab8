"""Slices of held-out groups: every group is in one slice of each kind, and numbers add up."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.items import GroupItems
from dpo_lightning.objectives.comparison import SUMS
from dpo_lightning.run.evaluate.slices import (
    MOST_SLICES,
    entry_of,
    prompts_of,
    slices_by_column,
    slices_by_length,
)
from tests.support.properties import examples


def group(number: int, *, prompt: int = 1, chosen: int = 1, key: str | None = None) -> TokenGroup:
    ids = [np.ones(count, dtype=np.int32) for count in (prompt, chosen, 2)]
    return TokenGroup(ids[0], (ids[1], ids[2]), (1, 2), 1.0, f"f:{number}", key or f"s:{number}")


def items(accuracies: list[float], losses: list[float], beta: float = 0.5) -> GroupItems:
    """Pairs whose chosen log-ratio is twice the loss, and whose rejected one is 0."""
    rows = []
    for accuracy, loss in zip(accuracies, losses, strict=True):
        known = {"loss": loss, "weight": 1.0, "groups": 1.0, "accuracy": accuracy, "best": 1.0}
        known |= {"rest": 1.0, "best_logratios": 2 * loss}
        rows.append([known.get(name, 0.0) for name in SUMS])
    count = len(rows)
    pairs = np.array([2 * loss for loss in losses])
    return GroupItems(np.array(rows), pairs, np.arange(count), np.ones(count), beta)


def by_column(groups, values, column="source"):
    found = {group.source: value for group, value in zip(groups, values, strict=True)}
    return slices_by_column(groups, column, found)


def told(slices) -> list[tuple[str, list[int]]]:
    return [(own.value, own.groups.tolist()) for own in slices]


def test_texts_are_values_and_what_is_missing_comes_last():
    groups = [group(n) for n in range(5)]
    found = by_column(groups, ["b", None, "a", "b", True])
    assert told(found) == [("True", [4]), ("a", [2]), ("b", [0, 3]), ("(none)", [1])]


def test_many_numbers_are_ranges_and_few_are_values():
    """Eight numbers in four ranges of two; three numbers as they are."""
    groups = [group(n) for n in range(8)]
    found = by_column(groups, [8, 1, 2, 3, 4, 5, 6, 7.5])
    assert told(found) == [
        ("1 to 2", [1, 2]),
        ("3 to 4", [3, 4]),
        ("5 to 6", [5, 6]),
        ("7.5 to 8", [0, 7]),
    ]
    few = by_column(groups[:4], [10, 9, 10, 2])
    assert told(few) == [("2", [3]), ("9", [1]), ("10", [0, 2])]


def test_of_many_texts_the_frequent_ones_are_shown():
    count = MOST_SLICES + 5
    groups = [group(n) for n in range(2 * MOST_SLICES + 5)]
    values = [f"v{n:02}" for n in range(MOST_SLICES)] * 2 + [f"w{n}" for n in range(5)]
    found = by_column(groups, values)
    assert len({*values}) == count
    assert len(found) == MOST_SLICES + 1
    assert (found[-1].value, len(found[-1].groups)) == ("(all others)", 5)


def test_lists_are_no_values():
    with pytest.raises(UserError) as caught:
        by_column([group(0)], [["x"]])
    assert str(caught.value).startswith("--slice source: f:0 has a list there; name a column")


values = st.none() | st.integers(-3, 40) | st.floats(-1, 1) | st.sampled_from(["x", "y", ""])


@given(st.lists(values, min_size=1, max_size=30))
@settings(max_examples=examples(15))
def test_each_group_is_in_one_slice(found):
    groups = [group(n, prompt=1 + n % 7, chosen=1 + n % 3) for n in range(len(found))]
    for slices in (by_column(groups, found), slices_by_length(groups)):
        for by in {own.by for own in slices}:
            numbers = [n for own in slices if own.by == by for n in own.groups.tolist()]
            assert sorted(numbers) == list(range(len(groups)))


def test_lengths_are_those_of_prompt_and_better_response():
    groups = [group(0, prompt=3, chosen=5), group(1, prompt=4, chosen=5)]
    assert [(own.by, *told([own])[0]) for own in slices_by_length(groups)] == [
        ("prompt_tokens", "3", [0]),
        ("prompt_tokens", "4", [1]),
        ("chosen_tokens", "5", [0, 1]),
    ]


def test_a_slice_has_the_metrics_of_its_groups():
    """Groups 0 and 2: loss (0.25 + 0.75) / 2, margin 1.0, reward 0.5 of it, one of two right.

    Wilson of 1 in 2: z^2 = 3.8415, middle 1/2, half 1.96 sqrt(1/8 + z^2/16) / (1 + z^2/2) = 0.4055.
    """
    found = items([1.0, 1.0, 0.0], [0.25, 9.0, 0.75])
    groups = [group(n) for n in range(3)]
    entry = entry_of(found, prompts_of(groups), np.array([0, 2]))
    assert (entry["groups"], entry["prompts"]) == (2, 2)
    metrics = entry["metrics"]
    assert metrics["eval/loss"] == 0.5
    assert metrics["eval/logratios/margins"] == 1.0
    assert metrics["eval/rewards/margins"] == 0.5
    assert metrics["eval/rewards/accuracies"] == 0.5
    low, high = entry["intervals"]["eval/rewards/accuracies"]
    assert (low, high) == pytest.approx((0.5 - 0.4055, 0.5 + 0.4055), abs=1e-3)
    assert entry["intervals"]["eval/loss"] == pytest.approx([0.25, 0.75])


def test_pairs_of_one_prompt_have_no_binomial_interval():
    """Two prompts, each all right or all wrong: a draw is 0, 1/2 or 1."""
    found = items([1.0, 1.0, 0.0, 0.0], [0.1] * 4)
    groups = [group(n, key=f"s:{n // 2}") for n in range(4)]
    entry = entry_of(found, prompts_of(groups), np.arange(4))
    assert entry["prompts"] == 2
    assert entry["intervals"]["eval/rewards/accuracies"] == [0.0, 1.0]
    alone = entry_of(found, prompts_of(groups), np.array([0, 1]))
    assert alone["intervals"]["eval/rewards/accuracies"] is None
