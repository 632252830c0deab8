"""Texts to token ids: the end of a prompt, the end of a response, and long groups."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dpo_lightning.data.tokens import DROP_REASONS
from tests.support.properties import examples
from tests.support.tokens import (
    ANY_TEXT,
    BEGIN,
    END,
    make_group,
    make_tokenizer,
    tokenize,
    tokenize_one,
)


def spell(ids, tokenizer=None):
    return (tokenizer or make_tokenizer()).convert_ids_to_tokens(ids)


@pytest.mark.parametrize(("asked", "given"), [(None, 0.0), (0.0, 0.0), (1.5, 1.5), (-0.5, -0.5)])
def test_the_margin_of_a_row_is_that_of_its_tokens(asked, given):
    [group] = tokenize(replace(make_group("q", "c", "d"), target_margin=asked)).groups
    assert group.target_margin == given
    assert isinstance(group.target_margin, float)


# Where the prompt ends ----------------------------------------------------------------------------


def test_the_prompt_ends_before_a_token_that_merges_with_any_response():
    tokenizer = make_tokenizer()
    assert spell(tokenizer("xab")["input_ids"]) == [BEGIN, "x", "ab"]
    prompt, responses, result = tokenize_one("xab", "d", "c", "x")
    assert spell(prompt) == [BEGIN, "x"]
    assert [spell(ids) for ids in responses] == [
        ["ab", "d", END],
        ["abc", END],
        ["ab", "x", END],
    ]
    assert result.notes == [
        "in 1 of 1 rows the tokenizer merged prompt and response; those tokens count as response"
    ]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_a_merge_is_said_once_over_all_chunks(chunk, ends):
    groups = [make_group("xab", "c", "d"), make_group("xy", "c", "d"), make_group("a", "bc", "d")]
    result = tokenize(*groups, tokenizer=make_tokenizer(ends=ends), chunk=chunk)
    assert [len(group.prompt) for group in result.groups] == [2, 3, 1]
    [note] = result.notes
    assert "2 of 3 rows" in note


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("prompt", ["", "q: "])
def test_a_prompt_that_does_not_merge_says_nothing(prompt, begins, ends):
    tokenizer = make_tokenizer(begins=begins, ends=ends)
    assert tokenize(make_group(prompt, "c", "d"), tokenizer=tokenizer).notes == []


@pytest.mark.parametrize("begins", [False, True])
def test_an_empty_prompt_is_bos(begins):
    prompt, responses, _ = tokenize_one("", "ab", "d", tokenizer=make_tokenizer(begins=begins))
    assert spell(prompt) == [BEGIN]
    assert [spell(ids) for ids in responses] == [["ab", END], ["d", END]]


def test_an_empty_prompt_is_eos_where_there_is_no_bos():
    tokenizer = make_tokenizer(begins=False, has_bos=False)
    prompt, responses, _ = tokenize_one("", "ab", "d", tokenizer=tokenizer)
    assert spell(prompt, tokenizer) == [END]
    assert [spell(ids, tokenizer) for ids in responses] == [["ab", END], ["d", END]]


def test_a_prompt_that_merges_whole_is_bos():
    prompt, responses, _ = tokenize_one("ab", "c", "d", tokenizer=make_tokenizer(begins=False))
    assert spell(prompt) == [BEGIN]
    assert [spell(ids) for ids in responses] == [["abc", END], ["ab", "d", END]]


def test_a_text_that_brings_its_own_bos_does_not_double_it():
    prompt, responses, result = tokenize_one(f"{BEGIN}q", "c", "d")
    assert spell(prompt) == [BEGIN, "q"]
    assert [spell(ids) for ids in responses] == [["c", END], ["d", END]]
    assert result.notes == []


def test_ids_are_int32_and_the_row_is_kept():
    result = tokenize(make_group("q", "c", "d", source="file.jsonl:7"))
    [group] = result.groups
    assert {str(ids.dtype) for ids in (group.prompt, *group.responses)} == {"int32"}
    assert (group.source, group.prompt_key, group.weight) == ("file.jsonl:7", "s:q", 1.0)
    assert (group.tokens, group.padded_tokens, group.pairs) == (6, 8, 1)


# How a response ends ------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["yes", f"yes{END}", f"yes{END}\n\n", f"yes{END} {END}{END}"])
@pytest.mark.parametrize("ends", [False, True])
def test_a_response_ends_with_one_eos(ends, text):
    _, [first, second], _ = tokenize_one("q", text, "no", tokenizer=make_tokenizer(ends=ends))
    assert spell(first) == ["y", "e", "s", END]
    assert spell(second) == ["n", "o", END]


def test_an_eos_in_the_middle_is_not_the_end():
    _, [first, _], _ = tokenize_one("q", f"a{END}c", "d")
    assert spell(first) == ["a", END, "c", END]


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("length", range(3, 6))
def test_truncation_forges_no_eos(length, ends):
    prompt, responses, result = tokenize_one(
        "q",
        "xyz",
        "y",
        tokenizer=make_tokenizer(ends=ends),
        max_length=length,
        truncation="response",
    )
    assert spell(prompt) == [BEGIN, "q"]
    assert spell(responses[0]) == ["x", "y", "z"][: length - 2]
    assert spell(responses[1]) == ["y", END][: length - 2]
    assert result.changed == {"truncated_response": 1}


# What becomes of long groups ----------------------------------------------------------------------

LONG = ("pqrs", "xyz", "y", "zz")  # BOS and 4, then 4, 2 and 3 with EOS: 9 at most


def test_what_fits_is_not_changed():
    for truncation in ("drop", "prompt", "response"):
        prompt, responses, result = tokenize_one(*LONG, max_length=9, truncation=truncation)
        assert spell(prompt) == [BEGIN, "p", "q", "r", "s"]
        assert [len(ids) for ids in responses] == [4, 2, 3]
        assert not result.changed


def test_truncation_drop_drops_the_group():
    result = tokenize(make_group(*LONG), max_length=8)
    assert not result.groups
    assert result.dropped == {"too_long": 1}
    assert not result.changed


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(8, [BEGIN, "q", "r", "s"]), (7, [BEGIN, "r", "s"]), (6, [BEGIN, "s"])],
)
def test_truncation_prompt_takes_the_beginning_but_for_bos(max_length, expected):
    prompt, responses, result = tokenize_one(*LONG, max_length=max_length, truncation="prompt")
    assert spell(prompt) == expected
    assert [len(ids) for ids in responses] == [4, 2, 3]
    assert result.changed == {"truncated_prompt": 1}


def test_truncation_prompt_leaves_something_of_the_prompt():
    result = tokenize(make_group(*LONG), max_length=5, truncation="prompt")
    assert not result.groups
    assert result.dropped == {"too_long": 1}


def test_truncation_prompt_without_bos():
    tokenizer = make_tokenizer(begins=False)
    prompt, *_ = tokenize_one(*LONG, tokenizer=tokenizer, max_length=5, truncation="prompt")
    assert spell(prompt) == ["s"]


def test_truncation_response_cuts_the_ends_of_all_siblings_alike():
    prompt, responses, result = tokenize_one(*LONG, max_length=7, truncation="response")
    assert spell(prompt) == [BEGIN, "p", "q", "r", "s"]
    assert [spell(ids) for ids in responses] == [["x", "y"], ["y", END], ["z", "z"]]
    assert result.changed == {"truncated_response": 1}


@pytest.mark.parametrize("max_length", [1, 4, 5])
def test_no_room_for_a_response_leaves_nothing_to_compare(max_length):
    result = tokenize(make_group(*LONG), max_length=max_length, truncation="response")
    assert not result.groups
    assert result.dropped == {"nothing_to_compare": 1}


def test_responses_that_become_the_same_leave_nothing_to_compare():
    result = tokenize(make_group("q", "abx", "aby"), max_length=3, truncation="response")
    assert result.dropped == {"nothing_to_compare": 1}
    assert not result.changed


def test_a_response_that_becomes_a_sibling_is_removed_and_nothing_was_truncated():
    """Cut to two tokens the third is the first one to the last token, its EOS included."""
    _, responses, result = tokenize_one(
        "q", "a", "b", f"a{END}c", max_length=4, truncation="response"
    )
    assert [spell(ids) for ids in responses] == [["a", END], ["b", END]]
    assert result.changed == {"removed_response": 1}


def test_of_siblings_that_become_the_same_the_best_stays():
    _, responses, result = tokenize_one(
        "q", "y", "xxy", "xxz", "z", max_length=4, truncation="response"
    )
    assert [spell(ids) for ids in responses] == [["y", END], ["x", "x"], ["z", END]]
    assert result.groups[0].ranks == (1, 2, 3)
    assert result.changed == {"truncated_response": 1, "removed_response": 1}


# Why groups go ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("responses", "ranks", "reason"),
    [
        (("a", "a"), (1, 2), "identical_responses"),
        (("a", "a", "a"), (1, 2, 3), "identical_responses"),
        (("a", f"a{END}"), (1, 2), "identical_responses"),
        (("", "a"), (1, 2), "empty_response"),
        (("a", " \n"), (1, 2), "empty_response"),
        (("a", END), (1, 2), "empty_response"),
        (("", ""), (1, 2), "empty_response"),
        (("a", "b"), (1, 1), "nothing_to_compare"),
        (("a", "a", "b"), (1, 1, 1), "nothing_to_compare"),
        (("a", "b", ""), (1, 1, 2), "empty_response"),
    ],
)
@pytest.mark.parametrize("truncation", ["drop", "prompt", "response"])
def test_a_dropped_group_has_one_reason(responses, ranks, reason, truncation):
    result = tokenize(make_group("q", *responses, ranks=ranks), truncation=truncation)
    assert not result.groups
    assert not result.changed
    assert result.dropped == {reason: 1}
    assert reason in DROP_REASONS


@pytest.mark.parametrize(
    ("responses", "ranks", "left", "ranks_left"),
    [
        (("a", "b", ""), (1, 2, 3), ["a", "b"], (1, 2)),
        # The best goes: another is the best then, or the group would have none.
        (("", "a", "b"), (1, 2, 3), ["a", "b"], (1, 2)),
        (("a", "", "b", "c"), (1, 2, 3, 3), ["a", "b", "c"], (1, 2, 2)),
        (("a", "b", "a"), (1, 2, 3), ["a", "b"], (1, 2)),
        (("a", "a", "b"), (1, 1, 2), ["a", "b"], (1, 2)),
    ],
)
def test_a_group_that_loses_only_some_responses_stays(responses, ranks, left, ranks_left):
    _, kept, result = tokenize_one("q", *responses, ranks=ranks)
    assert [spell(ids) for ids in kept] == [[text, END] for text in left]
    assert result.groups[0].ranks == ranks_left
    assert result.changed == {"removed_response": 1}


def test_reasons_and_changes_are_counted_over_groups():
    result = tokenize(
        make_group("q", "a", "a"),
        make_group("q", "a", "b"),
        make_group("q", "a", ""),
        make_group("q", "a", "a"),
        make_group("qqqq", "abab", "b"),
        make_group("q", "a", "b", "a"),
        max_length=6,
    )
    assert [len(group.responses) for group in result.groups] == [2, 2]
    assert result.dropped == {"identical_responses": 2, "empty_response": 1, "too_long": 1}
    assert result.changed == {"removed_response": 1}


# Any text -----------------------------------------------------------------------------------------


@st.composite
def _groups(draw):
    responses = draw(st.lists(ANY_TEXT, min_size=2, max_size=5))
    ranks = [1]
    for step in draw(st.lists(st.booleans(), min_size=len(responses) - 1, max_size=4)):
        ranks.append(ranks[-1] + step)
    return make_group(draw(ANY_TEXT), *responses, ranks=ranks[: len(responses)])


@settings(max_examples=examples(300), suppress_health_check=[HealthCheck.too_slow])
@example(
    group=make_group("0000000l", "l", "", "0", ranks=[1, 1, 2]),
    begins=True,
    ends=False,
    max_length=9,
    truncation="response",
)
@given(
    group=_groups(),
    begins=st.booleans(),
    ends=st.booleans(),
    max_length=st.integers(1, 24),
    truncation=st.sampled_from(["drop", "prompt", "response"]),
)
def test_any_group_of_strings(group, begins, ends, max_length, truncation):
    tokenizer = make_tokenizer(begins=begins, ends=ends)
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    result = tokenize(group, tokenizer=tokenizer, max_length=max_length, truncation=truncation)
    assert len(result.groups) + result.dropped.total() == 1
    assert set(result.dropped) <= set(DROP_REASONS)
    if not result.groups:
        assert not result.changed
        return

    # Each text as a whole, tokenized by itself, and the longest beginning they have in common.
    whole = [tokenizer(group.prompt + text)["input_ids"] for text in group.responses]
    alone = tokenizer(group.prompt)["input_ids"]
    if ends:
        alone = alone[:-1]
    size = 0
    while size < len(alone) and all(ids[: size + 1] == alone[: size + 1] for ids in whole):
        size += 1
    expected_prompt = alone[:size] or [bos]
    expected = [ids[size:] + [eos] * (not ends) for ids in whole]

    [tokens] = result.groups
    prompt = tokens.prompt.tolist()
    responses = [ids.tolist() for ids in tokens.responses]
    assert all(0 < len(ids) <= max_length - len(prompt) for ids in responses)
    assert len(prompt) > 0
    assert len({tuple(ids) for ids in responses}) == len(responses)

    # Dense ranks that never fall and tell at least two responses apart.
    assert tokens.ranks[0] == 1
    assert all(0 <= b - a <= 1 for a, b in zip(tokens.ranks, tokens.ranks[1:], strict=False))
    assert tokens.ranks[-1] > 1
    assert tokens.pairs > 0

    if truncation == "prompt" and "truncated_prompt" in result.changed:
        kept = prompt[1:] if expected_prompt[0] == bos and len(expected_prompt) > 1 else prompt
        assert kept
        assert expected_prompt[-len(kept) :] == kept
        assert len(prompt) < len(expected_prompt)
        assert prompt[0] == bos or not begins
        assert max(map(len, responses)) + len(prompt) == max_length
    else:
        assert prompt == expected_prompt
    # Each kept response is one of the row's, in the order of the row, whole or cut at the limit.
    room = max_length - len(prompt) if truncation == "response" else None
    # A blank one is never kept, though cut it may look like another that is.
    rows = zip(expected, group.ranks, group.responses, strict=True)
    texts = iter([row for row in rows if row[2].strip()])
    previous = 0
    for ids, rank in zip(responses, tokens.ranks, strict=True):
        full, old_rank, text = next(row for row in texts if row[0][:room] == ids)
        assert (ids[-1] == eos) == (len(ids) == len(full))
        assert old_rank >= rank >= previous
        previous = rank
        if len(ids) == len(full) and not result.changed and size:
            text_ids = [token for token in prompt + ids if token not in (bos, eos)]
            assert tokenizer.decode(text_ids) == group.prompt + text
    removed = len(responses) < len(group.responses)
    assert result.changed["removed_response"] == removed
