"""Rows that repeat, contradict or hide each other, against plain loops and real files."""

import json
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.records import PreferenceGroup, read_rows
from dpo_lightning.data.texts import Message
from dpo_lightning.run.inspect.oddities import SAID, count_oddities, told_rows
from tests.support.properties import examples


def row(prompt, *responses, ranks=None, place="rows.jsonl:1") -> PreferenceGroup:
    ranks = tuple(range(1, len(responses) + 1)) if ranks is None else ranks
    return PreferenceGroup(prompt, responses, ranks, 1.0, None, place)


def counts(*rows: PreferenceGroup) -> dict[str, int]:
    """Counts of the kinds that there are."""
    found = count_oddities(told_rows(rows))
    assert list(found) == list(SAID)
    return {name: oddity.count for name, oddity in found.items() if oddity.count}


def test_a_pair_that_two_rows_order_both_ways_is_one_contradiction():
    """A over B in rows 1 and 2, B over A in rows 3 and 4: one pair, however often it is ordered.

    Row 2 repeats row 1 and row 4 repeats row 3: two duplicates, and three repeated prompts.
    """
    found = counts(row("p", "A", "B"), row("p", "A", "B"), row("p", "B", "A"), row("p", "B", "A"))
    assert found == {"contradictions": 1, "duplicates": 2, "repeated_prompts": 3}
    assert counts(row("p", "A", "B"), row("q", "B", "A")) == {}


def test_a_contradiction_hides_inside_of_longer_rankings_and_not_in_ties():
    """A > B > C beside C > A: the pair (A, C) alone; beside the tie A = C: nothing."""
    longer = row("p", "A", "B", "C")
    assert counts(longer, row("p", "C", "A"))["contradictions"] == 1
    assert counts(longer, row("p", "C", "A", ranks=(1, 1))) == {"repeated_prompts": 1, "tied": 1}


def test_a_duplicate_has_the_same_responses_in_the_same_order():
    assert counts(row("p", "A", "B"), row("p", "A", "B"))["duplicates"] == 1
    tied = row("p", "A", "B", "C", ranks=(1, 2, 2)), row("p", "A", "C", "B", ranks=(1, 2, 2))
    assert counts(*tied)["duplicates"] == 1
    assert "duplicates" not in counts(row("p", "A", "B", "C"), row("p", "A", "B"))


@pytest.mark.parametrize(
    ("responses", "expected"),
    [
        (("A.", "A."), {"identical_pairs": 1}),
        (("A.", "a"), {"near_identical_pairs": 1}),
        (("A.", "A"), {"near_identical_pairs": 1, "prefixes": 1}),
        (("A", "B", "A"), {"identical_pairs": 1, "contradictions": 1}),
        (("?", "!"), {}),
        (("Yes, it is", "Yes"), {"prefixes": 1}),
        (("Yes", "B", "Yesterday"), {"prefixes": 1}),
        (("A", " \n"), {"empty_responses": 1}),
    ],
)
def test_responses_of_one_row_that_say_the_same(responses, expected):
    assert counts(row("p", *responses)) == expected


def test_responses_that_go_on_and_prompts_of_several_turns():
    hh = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert counts(row(hh, " x", " y")) == {"long_conversations": 1}
    assert counts(row("\n\nHuman: a\n\nAssistant:", " x\n\nHuman: z", " y")) == {"several_turns": 1}
    user, answer = Message("user", "a"), Message("assistant", "b")
    assert counts(row((user,), (answer,), (answer, user, answer)))["several_turns"] == 1
    assert counts(row((user, answer, user), (answer,), (user,)))["long_conversations"] == 1


def test_places_are_the_first_ones():
    rows = [row("p", "A", "A", place=f"rows.jsonl:{n}") for n in range(1, 9)]
    found = count_oddities(told_rows(rows))["identical_pairs"].as_dict()
    assert found == {"count": 8, "places": [f"rows.jsonl:{n}" for n in range(1, 6)]}


TEXT = st.sampled_from(["", "a", "ab", "abc", "b", "ba", "A"])
ROWS = st.lists(
    st.tuples(st.sampled_from(["p", "q"]), st.lists(TEXT, min_size=2, max_size=4)), max_size=8
)


@settings(max_examples=examples(60))
@given(ROWS)
def test_counts_are_those_of_plain_loops(rows):
    """Every pair of responses, and every two rows, compared one by one."""
    expected = dict.fromkeys(("identical_pairs", "prefixes", "duplicates", "contradictions"), 0)
    orders = defaultdict(set)
    for number, (prompt, texts) in enumerate(rows):
        pairs = [(a, b) for i, a in enumerate(texts) for b in texts[i + 1 :]]
        expected["identical_pairs"] += sum(a == b for a, b in pairs)
        both = [(a, b) for a in texts for b in texts]
        expected["prefixes"] += any(a.strip() and a != b and b.startswith(a) for a, b in both)
        own = {(text, rank) for rank, text in enumerate(texts)}
        earlier = [{(t, r) for r, t in enumerate(o)} for p, o in rows[:number] if p == prompt]
        expected["duplicates"] += own in earlier
        for a, b in pairs:
            orders[prompt, a, b].add(number)
    both_ways = {
        (prompt, frozenset((a, b)))
        for prompt, a, b in orders
        if a != b and (prompt, b, a) in orders
    }
    # A row with a response twice may order a pair both ways by itself.
    expected["contradictions"] = len(both_ways)
    found = count_oddities(told_rows(row(prompt, *texts) for prompt, texts in rows))
    assert {name: found[name].count for name in expected} == expected


def oddities_of(path: Path) -> tuple[list[PreferenceGroup], dict[str, int]]:
    rows = read_rows(
        str(path), format="auto", columns={}, split=None, subset=None, revision=None
    ).groups
    return rows, counts(*rows)


def test_the_dirt_of_politeness(shared):
    """6 pairs are identical and 3 responses begin another, as its README says.

    It speaks of 3 contradictions too. No two rows of the file order the same two texts both ways,
    by the loop below, not even in the letters alone; 3 further pairs differ in signs alone.
    """
    path = shared / "data" / "politeness.jsonl"
    _, found = oddities_of(path)
    assert found == {
        "identical_pairs": 6,
        "near_identical_pairs": 3,
        "repeated_prompts": 25,
        "prefixes": 3,
    }
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    chosen = {(line["prompt"], line["chosen"]) for line in lines}
    again = [x for x in lines if (x["prompt"], x["rejected"]) in chosen]
    assert len(again) == 6
    assert all(line["chosen"] == line["rejected"] for line in again)


def test_the_dirt_of_the_other_files(shared):
    """Multi-turn dialogues and an empty answer; 5 duplicates; 2 to 9 responses, not all sorted.

    The README of the dialogues says that some differ before the last turn. All 400 are the same up
    to the last ``Assistant:`` of each, by the loop below.
    """
    folder = shared / "data"
    _, found = oddities_of(folder / "hh_harmless_raw.jsonl")
    assert found == {"near_identical_pairs": 1, "empty_responses": 1, "long_conversations": 282}
    for line in map(json.loads, (folder / "hh_harmless_raw.jsonl").read_text().splitlines()):
        chosen, rejected = (line[k].rpartition("\n\nAssistant:")[0] for k in ("chosen", "rejected"))
        assert chosen == rejected
    _, found = oddities_of(folder / "sharegpt_dpo.json")
    assert found == {"duplicates": 5, "repeated_prompts": 5, "long_conversations": 106}
    rows, _ = oddities_of(folder / "openassistant_ranked.jsonl")
    sizes = {len(group.responses) for group in rows}
    assert (min(sizes), max(sizes)) == (2, 9)
    lines = (folder / "openassistant_ranked.jsonl").read_text().splitlines()
    ranks = [json.loads(line)["ranks"] for line in lines]
    assert sum(group.moved for group in rows) == sum(r != sorted(r) for r in ranks)
    assert {group.form for group in rows} == {"ranks"}
