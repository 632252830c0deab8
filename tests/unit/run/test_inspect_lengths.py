"""Histograms, length bias and what truncation takes, against counts by hand."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.tokens import TokenGroup, tokenize_groups
from dpo_lightning.run.inspect.lengths import length_bias, lengths_of, summary, truncation
from tests.support.properties import examples
from tests.support.tokens import make_group, make_tokenizer


def group(prompt: int, *responses: int, ranks=None) -> TokenGroup:
    """A group of so many tokens."""
    ids = [np.full(length, 7, dtype=np.int32) for length in (prompt, *responses)]
    ranks = tuple(range(1, len(responses) + 1)) if ranks is None else ranks
    return TokenGroup(ids[0], tuple(ids[1:]), ranks, 1.0, "rows.jsonl:1", "p")


def test_length_bias_counts_each_ranked_pair_of_training_groups():
    """(5, 3): +2. Ranks 1, 2, 2 of (4, 4, 9): 0 and -5; the tied two are no pair.

    Three pairs, one with a longer chosen response: a third; mean (2 + 0 - 5) / 3 = -1.
    """
    found = length_bias([group(2, 5, 3), group(9, 4, 4, 9, ranks=(1, 2, 2))])
    assert found == {
        "pairs": 3,
        "chosen_longer": 1,
        "rejected_longer": 1,
        "equal": 1,
        "share": pytest.approx(1 / 3),
        "mean_difference": -1.0,
    }
    assert length_bias([])["share"] is None


def test_lengths_are_of_prompts_responses_and_groups():
    """Groups of 2 + 5 + 3 and 4 + 1 + 1 tokens: prompts 2 and 4, responses 5, 3, 1, 1."""
    found = lengths_of([group(2, 5, 3), group(4, 1, 1)])
    assert (found["prompt"]["min"], found["prompt"]["max"]) == (2, 4)
    assert found["response"] | {"histogram": None, "p95": None} == {
        "count": 4,
        "min": 1,
        "median": 2.0,
        "mean": 2.5,
        "max": 5,
        "p95": None,
        "histogram": None,
    }
    assert found["group"]["mean"] == 8.0
    assert lengths_of([])["prompt"] is None


def test_bars_have_a_round_width():
    """3 to 40 are 38 lengths, more than 12 bars of 2: the next round width is 5."""
    bars = summary([3, 4, 5, 40])["histogram"]
    assert bars[0] == {"from": 0, "to": 5, "count": 2}
    assert bars[1] == {"from": 5, "to": 10, "count": 1}
    assert bars[-1] == {"from": 40, "to": 45, "count": 1}


@settings(max_examples=examples(60))
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40))
def test_each_length_is_in_one_bar(lengths):
    bars = summary(lengths)["histogram"]
    assert 1 <= len(bars) <= 13
    for bar, after in pairwise(bars):
        assert bar["to"] == after["from"]
    for bar in bars:
        assert bar["count"] == sum(bar["from"] <= length < bar["to"] for length in lengths)


ROWS = [
    make_group("xxxx", "yyyy", "zz", source="rows.jsonl:1"),
    make_group("x" * 20, "yyyy", "zz", source="rows.jsonl:2"),
    make_group("xxxx", "y" * 30, "zz", source="rows.jsonl:3"),
    make_group("xxxx", "same", "same", source="rows.jsonl:4"),
    make_group("xxxx", "y" * 7, "zz", source="rows.jsonl:5"),
]


def taken(how: str) -> dict[str, int]:
    """The entry of those rows with 13 tokens, a token a letter, BOS before and EOS behind.

    Whole, prompt + longest response: 5 + 5 = 10; 21 + 5 = 26; 5 + 31 = 36; the fourth row compares
    nothing; 5 + 8 = 13, which is just as long as it may be.
    """
    tokenizer = make_tokenizer()
    used = tokenize_groups(ROWS, tokenizer, max_length=13, truncation=how).groups
    return truncation(ROWS, used, tokenizer, max_length=13, how=how, options=None)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        # 21 + 5 + 3 and 5 + 31 + 3 tokens.
        ("drop", (0, 0, 2, 29 + 39)),
        # The prompt of the second row loses 13; the third would lose more than its prompt.
        ("prompt", (1, 13, 1, 39)),
        # The second has no room for a response; the third's first one keeps 8 of 31.
        ("response", (1, 23, 1, 29)),
    ],
)
def test_truncation_is_counted_by_rows_and_tokens(how, expected):
    found = taken(how)
    names = ("groups_cut", "tokens_cut", "groups_dropped", "tokens_dropped")
    assert tuple(found[name] for name in names) == expected
    assert found["whole"] | {"histogram": 0, "p95": 0} == {
        "count": 4,
        "min": 10,
        "median": 19.5,
        "mean": 85 / 4,
        "p95": 0,
        "max": 36,
        "histogram": 0,
    }


def test_a_file_that_is_named_twice_is_counted_twice():
    rows = [*ROWS, *ROWS]
    tokenizer = make_tokenizer()
    used = tokenize_groups(rows, tokenizer, max_length=13, truncation="response").groups
    found = truncation(rows, used, tokenizer, max_length=13, how="response", options=None)
    assert (found["groups_cut"], found["tokens_cut"], found["groups_dropped"]) == (2, 46, 2)
