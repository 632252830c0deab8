"""Labels of single answers: what is desirable, what is not, and what nobody rated."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.labels import LabelCounts, LabelReader, imbalance
from dpo_lightning.data.texts import RowError
from dpo_lightning.errors import UserError
from tests.support.properties import examples


def read(*values, threshold=None):
    """The labels of a column, one row after the other."""
    reader = LabelReader(threshold)
    found = [reader.read(value, "label", f"a.jsonl:{n}") for n, value in enumerate(values, start=1)]
    reader.check()
    return found


@pytest.mark.parametrize(
    ("up", "down"),
    [
        (True, False),
        (1, 0),
        (1, -1),
        (1.0, 0.0),
        ("true", "false"),
        ("True", "FALSE"),
        ("up", "down"),
        ("thumbs_up", "thumbs_down"),
        ("Thumbs up", "thumbs-down"),
        ("THUMBS_UP", "THUMBS_DOWN"),
        ("👍", "👎"),
        ("👍🏽", "👎️"),
        ("like", "dislike"),
        ("upvote", "downvote"),
        ("good", "bad"),
        ("yes", "no"),
        ("desirable", "undesirable"),
        ("1", "0"),
        ("+1", "-1"),
    ],
)
def test_a_label_is_up_or_down(up, down):
    assert read(up, down, up) == [True, False, True]


@pytest.mark.parametrize("value", [None, "", " ", "\n"])
def test_what_nobody_rated_is_neither(value):
    """A null counts as no thumb down, with a threshold and without one."""
    assert read(value) == [None]
    assert read(value, threshold=4) == [None]


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("meh", "the text 'meh', expected true or false, 1 or 0"),
        ("neutral", "the text 'neutral', expected true or false"),
        ("5", "the text '5', expected true or false"),
        ("up down", "the text 'up down', expected true or false"),
        ([], "a list of 0, expected true or false"),
        ({"score": 1}, "an object of 'score', expected true or false"),
        (math.nan, "the number nan, expected a finite number"),
        (10**400, "expected a finite number"),
    ],
)
def test_what_is_unclear_is_refused_by_its_name(value, problem):
    with pytest.raises(RowError) as caught:
        read(value)
    assert caught.value.field == "label"
    assert problem in caught.value.problem


def test_stars_need_the_least_that_is_desirable():
    """1 to 5: without a threshold the 1 would be a thumb up. With 4: 4 and 5 are, 3 is not."""
    with pytest.raises(UserError) as caught:
        read(1, 5, 3)
    assert str(caught.value) == (
        "a.jsonl:2: label: the number 5; ratings from 1 to 5 do not say which of them is "
        "desirable: name the least one that is, such as data.threshold=4"
    )
    assert read(1, 2, 3, 4, 5, 3.5, threshold=4) == [False, False, False, True, True, False]
    assert read(0, 1, -1, threshold=0) == [True, True, False]


@pytest.mark.parametrize(
    ("low", "high", "shown"), [(1, 5, "4"), (1, 10, "8"), (0, 100, "70"), (0.1, 0.9, "0.66")]
)
def test_the_threshold_that_is_named_separates_the_ratings(low, high, shown):
    """0.7 of the way up, rounded up where ratings are far apart: 1 + 0.7 * 9 = 7.3, so 8."""
    with pytest.raises(UserError, match=rf"data\.threshold={shown}$"):
        read(low, high)
    assert read(low, high, threshold=float(shown)) == [False, True]


def test_zero_beside_minus_one_is_not_clear():
    """Of -1, 0 and 1 the 0 may be a thumb down, or none."""
    assert read(0, 1) == [False, True]
    assert read(-1, 1) == [False, True]
    with pytest.raises(UserError, match=r"^a\.jsonl:3: label: the number 0, and -1 in a\.jsonl:1"):
        read(-1, 1, 0)
    assert read(-1, 1, 0, threshold=1) == [False, True, False]


@settings(max_examples=examples(100))
@given(st.lists(st.none() | st.integers(-5, 5) | st.floats(-5, 5)), st.integers(-4, 4))
def test_a_threshold_parts_numbers_and_leaves_nulls(values, threshold):
    expected = [None if value is None else value >= threshold for value in values]
    assert read(*values, threshold=threshold) == expected
    reader = LabelReader(threshold)
    for value in values:
        reader.read(value, "label", "a.jsonl:1")
    assert reader.by_threshold == sum(value is not None for value in values)


# Both kinds together ------------------------------------------------------------------------------


def test_counts_leave_out_what_is_compared():
    counts = LabelCounts.of([True, None, False, True])
    assert counts == LabelCounts(2, 1)
    assert str(LabelCounts(1200, 3)) == "1,200 desirable, 3 undesirable"


def test_four_to_one_is_balance_enough():
    assert imbalance(LabelCounts(400, 100), (1.0, 1.0)) == ""
    assert imbalance(LabelCounts(100, 400), (1.0, 1.0)) == ""
    assert imbalance(LabelCounts(), (1.0, 1.0)) == ""


def test_the_advice_is_the_rule_of_one_to_one_to_four_to_three():
    """Desirable to undesirable by their weights between 1:1 and 4:3.

    900 and 100: the weight w of the undesirable ones has 900 / (100 w) = 1 at w = 9 and 4/3 at
    w = 6.75. 100 and 900: (100 w) / 900 = 1 at w = 9 and 4/3 at w = 12.
    """
    line = imbalance(LabelCounts(900, 100), (1.0, 1.0))
    assert line.startswith("data.train: 900 desirable and 100 undesirable answers, 9 to 1:")
    assert line.endswith("loss.undesirable_weight=6.75 to 9")
    assert imbalance(LabelCounts(100, 900), (1.0, 1.0)).endswith("loss.desirable_weight=9 to 12")


def test_weights_and_pairs_count_for_the_balance():
    """900 and 100 with 9 for each undesirable one are in balance; so are they with 300 pairs.

    300 pairs make 1,200 and 400, which is 3 to 1. With 2 for each desirable one it is 18 to 1, and
    the rule asks for 1800 / (100 w) between 1 and 4/3: w from 13.5 to 18.
    """
    assert imbalance(LabelCounts(900, 100), (1.0, 9.0)) == ""
    assert imbalance(LabelCounts(900, 100), (1.0, 1.0), pairs=300) == ""
    line = imbalance(LabelCounts(900, 100), (2.0, 1.0))
    assert "18 to 1 by their weights" in line
    assert line.endswith("loss.undesirable_weight=13.5 to 18")


def test_a_loss_without_weights_is_told_the_numbers_alone():
    line = imbalance(LabelCounts(900, 100), None)
    assert line == "data.train: 900 desirable and 100 undesirable answers, 9 to 1"


def test_one_kind_alone_is_said():
    line = imbalance(LabelCounts(7, 0), (1.0, 1.0))
    assert line == (
        "data.train: all 7 labelled answers are desirable: nothing shows the policy what is "
        "undesirable"
    )
