"""Groups of marked answers: who is compared with whom, labels, ties, and draws."""

import math
from collections import Counter
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.marked import (
    WHY_DROPPED,
    MarkedGroup,
    MarkedPrompt,
    make_groups,
    mark_groups,
    pair_numbers,
    text_behind,
)
from tests.support.properties import examples


def prompt_of(*marks, answers=None, key="s:p", source="rows.jsonl:1") -> MarkedPrompt:
    """A prompt whose n-th answer is the token n + 1, if none are given."""
    answers = [[number + 1] for number in range(len(marks))] if answers is None else answers
    ids = tuple(np.array(answer, dtype=np.int32) for answer in answers)
    texts = tuple(f"text {answer}" for answer in answers)
    return MarkedPrompt(key, np.array([7, 8], dtype=np.int32), ids, texts, marks, source)


def made(*prompts, how="pairs", min_margin=0.0, noise="none", seed=0, round=1):
    return mark_groups(prompts, how=how, min_margin=min_margin, noise=noise, seed=seed, round=round)


def told(groups) -> list[tuple]:
    """Numbers and ranks of each group."""
    return [(own.numbers, own.group.ranks) for own in groups]


def test_the_best_is_chosen_over_the_worst():
    [group], dropped = made(prompt_of(0.5, -1.0, 2.0, 0.0), how="best_worst")
    assert [ids.tolist() for ids in group.group.responses] == [[3], [2]]
    assert (group.numbers, group.marks, group.group.ranks) == ((2, 1), (2.0, -1.0), (1, 2))
    assert (group.texts, group.asked) == (("text [3]", "text [2]"), "rows.jsonl:1")
    assert (group.group.prompt.tolist(), group.group.prompt_key) == ([7, 8], "s:p")
    assert dropped == {}


def test_a_ranking_has_all_answers_and_equal_marks_share_a_rank():
    """Marks 1, 3, 1, 2: first the second answer, then the fourth, then the other two together."""
    groups, dropped = made(prompt_of(1.0, 3.0, 1.0, 2.0), how="ranking")
    assert told(groups) == [((1, 3, 0, 2), (1, 2, 3, 3))]
    assert dropped == {}


def test_every_pair_that_differs_enough_is_one_by_a_margin():
    """Marks 0, 1, 1.5: differences 1, 1.5 and 0.5, of which one is below 1; 1 is not."""
    groups, dropped = made(prompt_of(0.0, 1.0, 1.5), how="margin", min_margin=1.0)
    assert told(groups) == [((1, 0), (1, 2)), ((2, 0), (1, 2))]
    assert dropped == {"below_margin": 1}


def test_answers_stand_in_disjoint_pairs_whatever_their_marks():
    one = prompt_of(0.0, 1.0, 2.0, 3.0, 4.0)
    groups, dropped = made(one)
    assert len({number for own in groups for number in own.numbers}) == 4
    assert dropped == {"alone": 1}
    other = replace(one, marks=(9.0, -5.0, 0.5, 0.25, 1.0))
    pairs = [{*own.numbers} for own in groups]
    assert [{*own.numbers} for own in made(other)[0]] == pairs
    assert [{*pair} for pair in pair_numbers([one], seed=0, round=1)[0]] == pairs
    assert all(own.marks[0] > own.marks[1] for own in groups)


def test_each_pairing_is_as_likely_as_another():
    """Four answers have 3 pairings: 200 of 600 each, with a deviation of sqrt(600 · 2 / 9) = 11.5;
    46 is four of them."""
    found = Counter(
        frozenset(frozenset(own.numbers) for own in made(prompt_of(0, 1, 2, 3), round=round)[0])
        for round in range(1, 601)
    )
    assert len(found) == 3
    assert all(abs(count - 200) < 46 for count in found.values())


def test_ties_are_dropped_and_counted():
    alike = prompt_of(1.0, 1.0)
    for how in ("pairs", "best_worst", "ranking", "margin"):
        assert made(alike, how=how) == ([], {"tie": 1})
        assert made(alike, how=how, min_margin=1.0) == ([], {"tie": 1})


def test_what_differs_too_little_is_dropped_in_each_way():
    """A ranking is as wide as its best and its worst: 0.5 here."""
    for how in ("pairs", "best_worst", "ranking"):
        assert made(prompt_of(1.0, 1.5), how=how, min_margin=0.75) == ([], {"below_margin": 1})
        assert len(made(prompt_of(1.0, 1.5), how=how, min_margin=0.5)[0]) == 1


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf, -math.inf])
def test_an_answer_without_a_mark_is_in_no_group(nothing):
    marked = prompt_of(nothing, 1.0, 0.0)
    groups, dropped = made(marked, how="ranking")
    assert told(groups) == [((1, 2), (1, 2))]
    assert dropped == {"unmarked": 1}
    assert made(prompt_of(nothing, 1.0), how="pairs") == ([], {"unmarked": 1, "alone": 1})
    assert made(prompt_of(nothing, 1.0), how="margin") == ([], {"unmarked": 1, "alone": 1})


def test_an_answer_that_is_there_twice_counts_once():
    twice = prompt_of(1.0, 1.0, 0.0, answers=[[5, 0], [5, 0], [6, 0]])
    for how in ("pairs", "best_worst", "ranking", "margin"):
        groups, dropped = made(twice, how=how)
        assert told(groups) == [((0, 2), (1, 2))]
        assert dropped == {"duplicate_answer": 1}


def test_labels_are_drawn_by_bradley_and_terry():
    """Marks 1 and 0: the first is better in sigma(1) = 0.7311 of 2,000 rounds, with a deviation of
    sqrt(0.7311 · 0.2689 / 2000) = 0.0099; 0.04 is four of them."""
    for how in ("pairs", "best_worst", "margin", "ranking"):
        found = [
            made(prompt_of(1.0, 0.0), how=how, noise="bradley_terry", round=round)[0][0].numbers
            for round in range(1, 2001)
        ]
        assert found.count((0, 1)) / 2000 == pytest.approx(1 / (1 + math.exp(-1)), abs=0.04)


def test_a_tie_is_drawn_by_a_fair_coin():
    """1,000 rounds: half of them, with a deviation of 0.0158; 0.063 is four."""
    draws = [
        made(prompt_of(1.0, 1.0), noise="bradley_terry", round=round)[0][0].numbers
        for round in range(1, 1001)
    ]
    assert draws.count((0, 1)) / 1000 == pytest.approx(0.5, abs=0.063)


def test_rankings_are_drawn_by_plackett_and_luce():
    """Marks log 1, log 2, log 3: weights a = 1, b = 2, c = 3. First one in 1/6, 2/6, 3/6, and then
    of those that are left: abc 1/6 · 2/5 = 1/15, acb 1/10, bac 1/12, bca 1/4, cab 1/6, cba 1/3.
    Of 3,000 rounds the widest deviation is sqrt(2/9 / 3000) = 0.0086; 0.035 is four of them."""
    marked = prompt_of(0.0, math.log(2), math.log(3))
    found = Counter(
        made(marked, how="ranking", noise="bradley_terry", round=round)[0][0].numbers
        for round in range(1, 3001)
    )
    expected = dict(zip(permutations(range(3)), (4, 6, 5, 15, 10, 20), strict=True))
    for order, sixtieths in expected.items():
        assert found[order] / 3000 == pytest.approx(sixtieths / 60, abs=0.035)


def test_prompts_that_are_alike_in_everything_draw_for_themselves():
    """400 copies of one prompt with equal marks: were there one draw, all had the same label. Half
    of 400 is 200, with a deviation of 10."""
    groups, _ = made(*[prompt_of(0.0, 0.0)] * 400, noise="bradley_terry")
    assert abs(sum(own.numbers == (0, 1) for own in groups) - 200) < 40


def test_seed_and_round_decide_draws_and_nothing_else_does():
    copies = [prompt_of(*[0.0] * 4, key=f"s:{i}") for i in range(40)]

    def labels(**more):
        return told(made(*copies, noise="bradley_terry", **more)[0])

    assert labels() == labels()
    assert labels(seed=1) != labels()
    assert labels(round=2) != labels()


def test_a_group_has_its_line_of_the_rounds_file_as_its_source():
    prompts = [prompt_of(0.0, 1.0), prompt_of(1.0, 1.0, key="s:q"), prompt_of(1.0, 0.0, key="s:r")]
    groups, dropped = made(*prompts, round=3)
    assert [own.group.source for own in groups] == ["rounds/3.jsonl:1", "rounds/3.jsonl:2"]
    assert dropped == {"tie": 1}


def test_groups_alone_are_the_same():
    prompts = [prompt_of(0.0, 1.0, 2.0, 3.0)]
    whole, dropped = made(*prompts)
    alone, again = make_groups(prompts, how="pairs", min_margin=0.0, noise="none", seed=0, round=1)
    assert [group.source for group in alone] == [own.group.source for own in whole]
    assert dropped == again


def test_a_prompt_with_a_mark_too_few_is_refused():
    with pytest.raises(ValueError, match=r"rows.jsonl:1: 2 answers, 2 texts and 1 marks"):
        replace(prompt_of(0.0, 1.0), marks=(0.0,))


def test_the_space_before_an_answer_is_part_of_it():
    """The bundled tokenizer joins words by spaces, so that the first word of an answer has one
    where it follows a prompt, and none where it stands alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    prompt, answer = np.array([0, 1, 5]), np.array([2, 3, 0])
    assert text_behind(tokenizer, prompt, answer) == " rain wind"
    assert tokenizer.decode(answer.tolist(), skip_special_tokens=True) == "rain wind"


# For all of them ----------------------------------------------------------------------------------

MARKS = st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf]), st.floats(-9, 9))
PROMPTS = st.lists(
    st.builds(
        lambda key, own: prompt_of(
            *[mark for mark, _ in own],
            answers=[ids for _, ids in own],
            # A judge gives equal answers equal marks.
            key=f"s:{key}{[mark for mark, _ in own]}",
        ),
        st.integers(0, 3),
        st.lists(st.tuples(MARKS, st.lists(st.integers(1, 3), min_size=1, max_size=3)), max_size=6),
    ),
    max_size=6,
)
HOWS = st.sampled_from(["pairs", "best_worst", "ranking", "margin"])
NOISES = st.sampled_from(["none", "bradley_terry"])


def content(own: MarkedGroup) -> tuple:
    group = own.group
    answers = tuple(tuple(ids.tolist()) for ids in group.responses)
    return group.prompt_key, own.numbers, own.marks, group.ranks, answers


@settings(max_examples=examples(200))
@given(PROMPTS, HOWS, NOISES, st.floats(0, 2), st.integers(0, 3))
def test_no_answer_is_lost_and_no_draw_depends_on_the_order(prompts, how, noise, margin, seed):
    groups, dropped = made(*prompts, how=how, noise=noise, min_margin=margin, seed=seed)
    assert dropped.keys() <= WHY_DROPPED.keys()
    for line, own in enumerate(groups, start=1):
        assert own.group.source == f"rounds/1.jsonl:{line}"
        assert len({ids.tobytes() for ids in own.group.responses}) == len(own.numbers) >= 2
        assert all(map(math.isfinite, own.marks))
        assert max(own.marks) - min(own.marks) >= margin
        steps = np.diff(own.group.ranks)
        assert own.group.ranks[0] == 1
        assert set(steps.tolist()) <= {0, 1}
        if noise == "none":
            # One step down in rank is one down in marks, and a shared rank an equal mark.
            falls = np.diff(own.marks)
            assert all((falls < 0) == (steps == 1))
            assert all(falls <= 0)
    if how == "pairs":
        used = 2 * (len(groups) + dropped.get("tie", 0) + dropped.get("below_margin", 0))
        lost = sum(dropped.get(name, 0) for name in ("unmarked", "duplicate_answer", "alone"))
        # An answer that repeats another one and has no mark is counted as unmarked alone.
        assert used + lost == sum(len(prompt.marks) for prompt in prompts)
    turned, again = made(*prompts[::-1], how=how, noise=noise, min_margin=margin, seed=seed)
    assert Counter(map(content, turned)) == Counter(map(content, groups))
    assert again == dropped
