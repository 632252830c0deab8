"""Every form of a row, and the group that it becomes."""

from pathlib import Path

import pytest

from dpo_lightning.data.records import (
    Message,
    PreferenceGroup,
)
from tests.support.rows import GOOD, assistant, read_bad, read_lines, user


def texts(messages):
    return [(message.role, message.content) for message in messages]


def read_one(folder: Path, row: object, **options) -> PreferenceGroup:
    rows = read_lines(folder, row, **options)
    assert rows.bad == []
    assert rows.total == 1
    return rows.groups[0]


# ---------------------------------------------------------------------------------------- forms


def test_pair_of_strings(tmp_path):
    group = read_one(tmp_path, {**GOOD, "instruction": 1, "score_chosen": "x", "prompt_id": None})
    assert group == PreferenceGroup(
        prompt="Say hi.",
        responses=(" Hello.", " Go away."),
        ranks=(1, 2),
        weight=1.0,
        target_margin=None,
        source=f"{tmp_path}/rows.jsonl:1",
    )


def test_weight_and_target_margin(tmp_path):
    group = read_one(tmp_path, {**GOOD, "weight": 2, "target_margin": -0.5})
    assert (group.weight, group.target_margin) == (2.0, -0.5)


def test_empty_texts_are_rows(tmp_path):
    group = read_one(tmp_path, {"prompt": "", "chosen": "", "rejected": "x"})
    assert (group.prompt, group.responses) == ("", ("", "x"))


def test_nul_and_astral_characters_are_text(tmp_path):
    group = read_one(tmp_path, rb'{"prompt": "\u0000", "chosen": "\ud83d\ude00", "rejected": "a"}')
    assert (group.prompt, group.responses[0]) == ("\0", "\N{GRINNING FACE}")


def test_responses_are_best_first(tmp_path):
    group = read_one(tmp_path, {"prompt": "p", "responses": ["a", "b", "c"]})
    assert (group.responses, group.ranks) == (("a", "b", "c"), (1, 2, 3))


@pytest.mark.parametrize(
    ("ranks", "responses", "dense"),
    [
        ([1, 2, 3, 4], "abcd", (1, 2, 3, 4)),
        ([4, 1, 3, 2], "bdca", (1, 2, 3, 4)),
        ([2, 1, 2, 1], "bdac", (1, 1, 2, 2)),
        ([7, 7, 3, 90], "cabd", (1, 2, 2, 3)),
        ([5, 5, 5, 5], "abcd", (1, 1, 1, 1)),
    ],
)
def test_ranks_sort_stably_and_become_dense(tmp_path, ranks, responses, dense):
    group = read_one(tmp_path, {"prompt": "p", "responses": list("abcd"), "ranks": ranks})
    assert (group.responses, group.ranks) == (tuple(responses), dense)


def test_higher_scores_are_better(tmp_path):
    row = {"prompt": "p", "responses": list("abcd"), "scores": [-1.5, 3, 0.25, 3.0]}
    group = read_one(tmp_path, row)
    assert (group.responses, group.ranks) == (tuple("bdca"), (1, 1, 2, 3))


def test_messages(tmp_path):
    row = {
        "prompt": [{"role": "system", "content": "s"}, user("q")],
        "chosen": [assistant("a")],
        "rejected": [assistant("b"), user("q2"), assistant("c")],
    }
    group = read_one(tmp_path, row)
    assert group.prompt == (Message("system", "s"), Message("user", "q"))
    assert texts(group.responses[0]) == [("assistant", "a")]
    assert texts(group.responses[1]) == [("assistant", "b"), ("user", "q2"), ("assistant", "c")]


def test_message_prompt_with_strings(tmp_path):
    row = {"prompt": [user("q")], "responses": ["a", "b"], "ranks": [2, 1]}
    group = read_one(tmp_path, row)
    assert group.responses == ((Message("assistant", "b"),), (Message("assistant", "a"),))


def test_string_prompt_with_messages(tmp_path):
    row = {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")]}
    assert read_one(tmp_path, row).prompt == (Message("user", "q"),)


@pytest.mark.parametrize("prompt", ["q", " q\n", [user("q")]])
def test_messages_that_repeat_the_prompt(tmp_path, prompt):
    row = {
        "prompt": prompt,
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
    }
    rows = read_lines(tmp_path, row)
    (group,) = rows.groups
    assert group.prompt == (Message("user", "q"),)
    assert group.responses == ((Message("assistant", "a"),), (Message("assistant", "b"),))
    assert len(rows.notes) == 1
    assert "(1 row)" in rows.notes[0]


@pytest.mark.parametrize("prompt", ["q", "q2", [{"role": "system", "content": "s"}]])
def test_prompt_that_is_a_part_of_the_repeated_messages(tmp_path, prompt):
    before = [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("q2")]
    row = {
        "prompt": prompt,
        "chosen": [*before, assistant("b")],
        "rejected": [*before, assistant("c")],
    }
    group = read_one(tmp_path, row)
    assert texts(group.prompt) == [(m["role"], m["content"]) for m in before]
    assert group.responses == ((Message("assistant", "b"),), (Message("assistant", "c"),))


def test_strings_that_begin_with_the_prompt_stay_whole(tmp_path):
    row = {"prompt": "The sky is", "chosen": "The sky is blue", "rejected": "The sky is a cat"}
    rows = read_lines(tmp_path, row)
    assert rows.groups[0].responses == ("The sky is blue", "The sky is a cat")
    assert 'data.columns={prompt: ""}' in rows.notes[0]
    assert read_lines(tmp_path, row, GOOD).notes == []


# ------------------------------------------------------------------------------ implicit prompts


def test_implicit_prompt_leaves_the_space_to_the_responses(tmp_path):
    group = read_one(tmp_path, {"chosen": "The sky is blue", "rejected": "The sky is a cat"})
    assert (group.prompt, group.responses) == ("The sky is", (" blue", " a cat"))


def test_implicit_prompt_of_many(tmp_path):
    group = read_one(
        tmp_path, {"responses": ["ab cd", "ab ce", "ab", "abc"], "ranks": [4, 3, 2, 1]}
    )
    assert (group.prompt, group.responses) == ("ab", ("c", "", " ce", " cd"))


def test_implicit_prompt_of_a_dialogue(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    rows = read_lines(
        tmp_path, {"chosen": start + " Because.", "rejected": start + " Because of me."}
    )
    (group,) = rows.groups
    assert group.prompt == start
    assert group.responses == (" Because.", " Because of me.")
    assert "Assistant:" in rows.notes[0]


def test_dialogues_that_differ_before_the_last_turn(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant:"
    row = {
        "chosen": start + " Hello\n\nHuman: A?\n\nAssistant: B",
        "rejected": start + " Hello\n\nHuman: C?\n\nAssistant: B",
    }
    group = read_one(tmp_path, row)
    assert group.prompt == start
    assert group.responses[0] == " Hello\n\nHuman: A?\n\nAssistant: B"


def test_dialogue_with_an_empty_answer(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant:"
    group = read_one(tmp_path, {"chosen": start + " Hello", "rejected": start})
    assert (group.prompt, group.responses) == (start, (" Hello", ""))


def test_dialogues_without_a_common_answer(tmp_path):
    row = {"chosen": "\n\nHuman: Hi\n\nAssistant: a", "rejected": "\n\nHuman: Ho\n\nAssistant: a"}
    assert read_one(tmp_path, row).prompt == "\n\nHuman: H"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt_size"),
    [
        ("ua", "ub", 1),
        ("suavb", "suavc", 4),
        ("ua", "ua", 1),  # the same conversation twice still has a response
        ("ua", "uavb", 1),
        ("uavb", "uawb", 1),  # they differ in a question: the prompt ends before the answer
        ("uau", "uau", 1),
    ],
)
def test_implicit_prompt_of_messages(tmp_path, chosen, rejected, prompt_size):
    roles = {"s": "system", "u": "user", "v": "user", "w": "user"}

    def spell(letters):
        return [{"role": roles.get(x, "assistant"), "content": x} for x in letters]

    group = read_one(tmp_path, {"chosen": spell(chosen), "rejected": spell(rejected)})
    assert [m.content for m in group.prompt] == list(chosen[:prompt_size])
    assert [m.content for m in group.responses[0]] == list(chosen[prompt_size:])
    assert [m.content for m in group.responses[1]] == list(rejected[prompt_size:])


# --------------------------------------------------------------------------------------- ShareGPT


def test_sharegpt(tmp_path):
    turns = [("system", "s"), ("human", "q"), ("function_call", "f"), ("observation", "o")]
    row = {
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": [{"from": "assistant", "value": "b"}],
        "weight": 0.5,
    }
    group = read_one(tmp_path, row, format="sharegpt")
    assert texts(group.prompt) == [
        ("system", "s"),
        ("user", "q"),
        ("assistant", "f"),
        ("tool", "o"),
    ]
    assert group.responses == ((Message("assistant", "a"),), (Message("assistant", "b"),))
    assert group.weight == 0.5


def test_sharegpt_is_recognised_and_said(tmp_path):
    row = {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    }
    rows = read_lines(tmp_path, row)
    assert rows.groups == read_lines(tmp_path, row, format="sharegpt").groups
    assert texts(rows.groups[0].prompt) == [("user", "q")]
    assert "read as data.format=sharegpt" in rows.notes[0]


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"conversations": []}, "conversations", "empty list"),
        ({"conversations": [{"from": "cat", "value": "q"}]}, "conversations[0].from", "'cat'"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value", "missing"),
        ({"chosen": {"from": "gpt", "value": None}}, "chosen.value", "null"),
        ({"rejected": 3}, "rejected", "the number 3"),
    ],
)
def test_bad_sharegpt(tmp_path, row, field, problem):
    turn = {"from": "gpt", "value": "q"}
    whole = {"conversations": [turn], "chosen": turn, "rejected": turn, **row}
    bad = read_bad(tmp_path, whole, format="sharegpt")
    assert bad.field == field
    assert problem in bad.problem


# ---------------------------------------------------------------------------------------- columns


def test_columns_are_mapped(tmp_path):
    row = {"question": "q", "chosen": "worst", "rejected": "best", "w": 3, "weight": "heavy"}
    names = {"prompt": "question", "chosen": "rejected", "rejected": "chosen", "weight": "w"}
    group = read_one(tmp_path, row, columns=names)
    assert (group.prompt, group.responses, group.weight) == ("q", ("best", "worst"), 3.0)


def test_an_empty_name_hides_a_column(tmp_path):
    row = {"prompt": "id-1", "chosen": "x 1", "rejected": "x 2", "weight": "heavy", "": 1}
    assert read_one(tmp_path, row, columns={"prompt": "", "weight": ""}).prompt == "x"


def test_a_mapped_form_wins_over_another(tmp_path):
    row = {**GOOD, "answers": ["a", "b"], "responses": 5}
    assert read_one(tmp_path, row, columns={"responses": "answers"}).responses == ("a", "b")
    assert read_one(
        tmp_path, row, columns={"chosen": "rejected", "rejected": "chosen"}
    ).responses == (
        " Go away.",
        " Hello.",
    )


def test_a_mapped_column_that_is_missing_is_named(tmp_path):
    rows = read_lines(
        tmp_path,
        {"question": "q", "chosen": "a", "rejected": "b"},
        {"chosen": "x y", "rejected": "x z"},
        columns={"prompt": "question"},
    )
    assert [(bad.source[-2:], bad.field) for bad in rows.bad] == [(":2", "question")]


def test_prompt_key_tells_prompts_apart(tmp_path):
    prompts = ["a", '[["user", "a"]]', [user("a")], [assistant("a")], [user("a"), user("b")]]
    rows = read_lines(tmp_path, *({"prompt": p, "responses": ["x", "y"]} for p in prompts))
    assert rows.bad == []
    assert len({group.prompt_key for group in rows.groups}) == len(prompts)
    again = read_lines(tmp_path, {"prompt": [user("a")], "responses": ["z", "y"]})
    assert again.groups[0].prompt_key == rows.groups[2].prompt_key
