"""Outcomes of answers against others, and the intervals of their means; all by hand."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.win_rates import (
    normal,
    of_both_orders,
    of_marks,
    paired_by_prompt,
    why_withheld,
    wilson,
    win_rate,
)
from tests.support.properties import examples


@pytest.mark.parametrize(
    ("first", "swapped", "outcome"),
    [
        ("first", "second", 1.0),  # ours stood first, then second
        ("second", "first", 0.0),
        ("first", "first", 0.5),  # it follows the order
        ("second", "second", 0.5),
        ("tie", "tie", 0.5),
        ("first", "tie", 0.5),
        ("tie", "first", 0.5),
        (None, "second", None),
        ("first", None, None),
    ],
)
def test_a_win_needs_both_orders(first, swapped, outcome):
    assert of_both_orders(first, swapped) == outcome


def test_of_two_marks_the_higher_wins_and_a_missing_one_decides_nothing():
    assert [of_marks(2, 1), of_marks(1, 1), of_marks(1, 2)] == [1.0, 0.5, 0.0]
    assert (of_marks(None, 1), of_marks(1, None)) == (None, None)


def test_a_win_rate_with_its_interval():
    """Ten prompts: 7 wins, 1 tie, 2 losses. 7.5 of 10, so p = 0.75, n = 10, z = 1.959964.

    z² = 3.841459. Middle (0.75 + 3.841459/20) / (1 + 3.841459/10) = 0.942073/1.384146 = 0.680617.
    Half 1.959964 * sqrt(0.1875/10 + 3.841459/400) / 1.384146 = 1.959964 * 0.168383 / 1.384146 =
    0.238432. So 0.442185 to 0.919049.
    """
    outcomes = [1.0] * 7 + [0.5] + [0.0] * 2
    mean, (low, high) = win_rate(outcomes, range(10))
    assert mean == 0.75
    assert (low, high) == pytest.approx((0.442185, 0.919049), abs=5e-6)


def test_answers_to_one_prompt_are_one_item():
    """Four answers to each of 5 prompts are 5 items and not 20: the interval is that of 5."""
    outcomes, owners = [1.0, 1.0, 0.0, 1.0] * 5, [i // 4 for i in range(20)]
    mean, interval = win_rate(outcomes, owners)
    assert mean == 0.75
    assert interval == wilson(0.75, 5)
    assert interval[0] < wilson(0.75, 20)[0]


def test_missing_outcomes_count_in_no_mean():
    assert win_rate([1.0, None, 0.0, None], range(4)) == (0.5, wilson(0.5, 2))
    assert win_rate([None], [0]) is None
    assert normal([None], [0]) is None


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=40))
@settings(max_examples=examples(50))
def test_the_interval_holds_the_mean_and_stays_between_0_and_1(outcomes):
    mean, (low, high) = win_rate(outcomes, range(len(outcomes)))
    assert 0 <= low <= mean <= high <= 1
    assert low < high


def test_the_interval_of_a_mean_of_marks():
    """Prompt a: 1 and 3, prompt b: 6. Means of prompts 2 and 6, deviation 2·√2, error that / √2 =
    2. The mean of the three answers is 10/3; half the interval is 1.959964 · 2 = 3.919928.
    """
    mean, (low, high) = normal([1.0, 3.0, 6.0], ["a", "a", "b"])
    assert mean == pytest.approx(10 / 3)
    assert (low, high) == pytest.approx((10 / 3 - 3.919928, 10 / 3 + 3.919928))
    assert normal([1.0, 2.0], ["a", "a"]) == (1.5, (-math.inf, math.inf))


def test_above_a_tenth_missing_no_mean_is_given():
    assert why_withheld([1.0] * 9 + [None]) is None
    assert why_withheld([1.0] * 8 + [None]).startswith("1 of 9 answers have no mark, more than 10%")
    assert why_withheld([]) is None


def test_answers_are_paired_by_prompt_in_their_order():
    """The second answer to a prompt goes with the second one there."""
    assert paired_by_prompt(["a", "b", "a"], ["b", "a", "a"], key="--against") == [1, 0, 2]
    with pytest.raises(UserError, match=r"--against: no answer, or too few, to prompt 2 .*'a'"):
        paired_by_prompt(["a", "a"], ["b", "a"], key="--against")
