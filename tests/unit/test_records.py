"""Every form of a row, and every fault of one with its place."""

import json
import math
from pathlib import Path

import pytest

from dpo_lightning.data.records import (
    BadRow,
    Message,
    PreferenceGroup,
    Rows,
    check_bad_rows,
    read_rows,
    write_quarantine,
)
from dpo_lightning.errors import UserError

GOOD = {"prompt": "Say hi.", "chosen": " Hello.", "rejected": " Go away."}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def texts(messages):
    return [(message.role, message.content) for message in messages]


def read_lines(folder: Path, *lines: object, format="auto", columns=None) -> Rows:
    """Reads lines: bytes as they are, anything else as JSON."""
    path = folder / "rows.jsonl"
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    options = {"split": None, "subset": None, "revision": None}
    return read_rows(str(path), format=format, columns=columns or {}, **options)


def read_one(folder: Path, row: object, **options) -> PreferenceGroup:
    rows = read_lines(folder, row, **options)
    assert rows.bad == []
    assert rows.total == 1
    return rows.groups[0]


def read_bad(folder: Path, row: object, **options) -> BadRow:
    """Reads a bad row as line 3, after a good one and a blank line."""
    good = GOOD
    if options.get("format") == "sharegpt":
        turns = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
        good = {"conversations": [turns[0]], "chosen": turns[1], "rejected": turns[1]}
    rows = read_lines(folder, good, b"", row, **options)
    assert rows.total == 2
    assert [group.source for group in rows.groups] == [f"{folder}/rows.jsonl:1"]
    (bad,) = rows.bad
    assert bad.source == f"{folder}/rows.jsonl:3"
    assert "\n" not in bad.problem
    return bad


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
        "chosen": [{**assistant("a"), "name": "ignored"}],
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


def test_sharegpt_is_named_when_it_is_needed(tmp_path):
    turn = {"from": "human", "value": "q"}
    row = {"conversations": [turn], "chosen": turn, "rejected": turn}
    with pytest.raises(UserError, match=r"rows\.jsonl.* set data\.format=sharegpt$"):
        read_lines(tmp_path, row)
    bad = read_bad(tmp_path, row)
    assert bad.field == "chosen"
    assert "data.format=sharegpt" in bad.problem


@pytest.mark.parametrize(
    ("row", "field", "problem"),
    [
        ({"conversations": "q"}, "conversations", "the text 'q', expected a list"),
        ({"conversations": []}, "conversations", "empty list"),
        ({"conversations": [{"from": "bot", "value": "q"}]}, "conversations[0].from", "'bot'"),
        ({"conversations": [{"from": "gpt"}]}, "conversations[0].value", "missing"),
        ({"chosen": {"from": "gpt", "value": None}}, "chosen.value", "null"),
        ({"rejected": {"role": "assistant", "content": "x"}}, "rejected.from", "missing"),
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


# ------------------------------------------------------------------------------------------ faults

NESTED = b'{"prompt": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
LIST = {"prompt": "p", "responses": ["a", "b"]}


@pytest.mark.parametrize(
    ("line", "field", "problem"),
    [
        (b'{"prompt": "a",}', "row", "invalid JSON at column 16"),
        (b'  {"prompt": nope}', "row", "invalid JSON at column 14"),
        (b'{"prompt": "a"} {}', "row", "invalid JSON at column 17: Extra data"),
        (b'{"prompt": "a\tb"}', "row", "invalid JSON at column 14"),
        (b'{"prompt": "caf\xe9"}', "row", "not UTF-8: byte 0xe9 at byte 16"),
        (b'{"weight": ' + b"9" * 5000 + b"}", "row", "too many digits"),
        (NESTED, "row", "nested too deeply"),
        (b"[1, 2]", "row", "a list of 2, expected an object"),
        (b'"text"', "row", "the text 'text', expected an object"),
        (b"null", "row", "null, expected an object"),
        (b"{}", "chosen", "missing, and no 'responses'; the row has nothing"),
        ({"prompt": "p", "chosen": "a"}, "rejected", "missing; the row has 'prompt', 'chosen'"),
        ({"prompt": "p", "rejected": "a"}, "chosen", "missing"),
        ({"question": "p", "better": "a"}, "chosen", "'question', 'better'; data.columns maps"),
        ({**GOOD, "responses": ["a", "b"]}, "responses", "found beside 'chosen'"),
        ({"chosen": "a", "rejected": "b", "question": "q"}, "prompt", "no common beginning"),
        ({**GOOD, "prompt": None}, "prompt", "null, expected a text or a list of messages"),
        ({**GOOD, "chosen": None}, "chosen", "null, expected a text or a list of messages"),
        ({**GOOD, "chosen": 3}, "chosen", "the number 3"),
        ({**GOOD, "chosen": True}, "chosen", "true"),
        ({**GOOD, "chosen": {"role": "user", "content": "x"}}, "chosen", "an object of 'role'"),
        ({**GOOD, "chosen": [assistant("x")]}, "rejected", "a string, but chosen is messages"),
        ({**GOOD, "chosen": []}, "chosen", "an empty list"),
        ({**GOOD, "prompt": []}, "prompt", "an empty list"),
        (
            rb'{"prompt": "p", "chosen": "a\ud800", "rejected": "b"}',
            "chosen",
            r"\ud800 at character 2",
        ),
        ({**GOOD, "weight": math.nan}, "weight", "the number nan, expected a finite"),
        ({**GOOD, "weight": math.inf}, "weight", "the number inf"),
        ({**GOOD, "weight": 10**400}, "weight", "expected a finite number"),
        ({**GOOD, "weight": 0}, "weight", "the number 0, expected one above 0"),
        ({**GOOD, "weight": -1.5}, "weight", "the number -1.5, expected one above 0"),
        ({**GOOD, "weight": True}, "weight", "true, expected a finite number"),
        ({**GOOD, "weight": "1"}, "weight", "the text '1'"),
        ({**GOOD, "weight": None}, "weight", "null"),
        ({**GOOD, "target_margin": math.nan}, "target_margin", "nan"),
        ({**GOOD, "target_margin": [1]}, "target_margin", "a list of 1"),
        ({"prompt": "p", "responses": []}, "responses", "a list of 0, expected at least 2"),
        ({"prompt": "p", "responses": ["a"]}, "responses", "a list of 1, expected at least 2"),
        ({"prompt": "p", "responses": "ab"}, "responses", "expected a list of responses"),
        ({"prompt": "p", "responses": ["a", None]}, "responses[1]", "null"),
        ({**LIST, "ranks": [1]}, "ranks", "a list of 1, expected 2"),
        ({**LIST, "ranks": 1}, "ranks", "the number 1, expected a list of 2"),
        ({**LIST, "ranks": [1, 0]}, "ranks[1]", "the number 0, expected a whole number"),
        ({**LIST, "ranks": [1, 1.5]}, "ranks[1]", "the number 1.5"),
        ({**LIST, "ranks": [True, 2]}, "ranks[0]", "true"),
        ({**LIST, "ranks": ["1", 2]}, "ranks[0]", "the text '1'"),
        ({**LIST, "ranks": None}, "ranks", "null"),
        ({**LIST, "scores": [1, 2, 3]}, "scores", "a list of 3, expected 2"),
        ({**LIST, "scores": [1, math.nan]}, "scores[1]", "nan"),
        ({**LIST, "scores": [False, 2]}, "scores[0]", "false"),
        ({**LIST, "scores": [1, 2], "ranks": [1, 2]}, "ranks", "found beside 'scores'"),
    ],
)
def test_bad_rows(tmp_path, line, field, problem):
    bad = read_bad(tmp_path, line)
    assert bad.field == field
    assert problem in bad.problem
    if isinstance(line, bytes) and line.isascii():
        assert bad.row == line.decode()


@pytest.mark.parametrize(
    ("messages", "field", "problem"),
    [
        (["hello"], "chosen[0]", "the text 'hello', expected an object of 'role', 'content'"),
        ([None], "chosen[0]", "null"),
        ([{"content": "x"}], "chosen[0].role", "missing; there is an object of 'content'"),
        ([assistant("x"), {"role": "user"}], "chosen[1].content", "missing"),
        ([{"role": 1, "content": "x"}], "chosen[0].role", "the number 1, expected a text"),
        ([{"role": "", "content": "x"}], "chosen[0].role", "an empty text"),
        ([{"role": "tool", "content": None}], "chosen[0].content", "null, expected a text"),
        ([{"role": "user", "content": [{"type": "text"}]}], "chosen[0].content", "a list of 1"),
        ([{"from": "gpt", "value": "x"}], "chosen[0].role", "data.format=sharegpt reads that"),
        ([user("other"), assistant("x")], "chosen", "begins with a message of 'user'"),
        ([user("q")], "chosen", "nothing after the prompt's messages"),
    ],
)
def test_bad_messages(tmp_path, messages, field, problem):
    rejected = [user("q"), assistant("x")] if messages[0] == user("q") else [assistant("b")]
    bad = read_bad(tmp_path, {"prompt": [user("q")], "chosen": messages, "rejected": rejected})
    assert bad.field == field
    assert problem in bad.problem


def test_messages_that_contradict_the_prompt(tmp_path):
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}
    bad = read_bad(tmp_path, {"prompt": "other", **row})
    assert bad.field == "prompt"
    assert "'other', which is not among the messages" in bad.problem


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([assistant("a")], [assistant("b")]),
        ([user("q"), assistant("a")], [user("r"), assistant("a")]),
        ([user("s"), user("q"), assistant("a")], [user("s"), user("r"), assistant("a")]),
    ],
)
def test_messages_without_a_common_prompt(tmp_path, chosen, rejected):
    bad = read_bad(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert bad.field == "chosen"
    assert "no prompt" in bad.problem


def test_long_values_are_cut_and_made_printable(tmp_path):
    bad = read_bad(tmp_path, {**GOOD, "weight": "\n\u2028" + "long" * 1000, "x" * 5000: 1})
    assert len(bad.problem) < 200
    assert bad.problem.isprintable()


# ------------------------------------------------------------------------------- many bad rows


def test_check_bad_rows(tmp_path):
    rows = read_lines(tmp_path, GOOD, b"nonsense", {**GOOD, "weight": 0})
    with pytest.raises(UserError) as caught:
        check_bad_rows(rows, on_bad_row="stop")
    path = f"{tmp_path}/rows.jsonl"
    assert str(caught.value) == (
        f"{path}:2: row: invalid JSON at column 1: Expecting value; "
        f"{path}:3: weight: the number 0, expected one above 0; "
        "2 bad rows of 3, data.on_bad_row=skip sets them aside"
    )
    assert caught.value.exit_code == 2
    check_bad_rows(rows, on_bad_row="skip")
    check_bad_rows(read_lines(tmp_path, GOOD), on_bad_row="stop")


def test_check_bad_rows_names_twenty(tmp_path):
    rows = read_lines(tmp_path, *[b"nonsense"] * 25)
    with pytest.raises(UserError) as caught:
        check_bad_rows(rows, on_bad_row="stop")
    message = str(caught.value)
    assert ":20: row" in message
    assert ":21: row" not in message
    assert "; and 5 more; 25 bad rows of 25" in message


def test_quarantine(tmp_path):
    lines = [b'{"a": "caf\xe9"}', rb'{"chosen": "\ud800"}', b'{"b": "\xc3\xa9"}', b"[]"]
    rows = read_lines(tmp_path, GOOD, *lines)
    write_quarantine(tmp_path / "quarantine.jsonl", rows.bad)
    written = [json.loads(x) for x in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    assert [set(row) for row in written] == [{"source", "field", "problem", "row"}] * 4
    assert [row["source"] for row in written] == [
        f"{tmp_path}/rows.jsonl:{n}" for n in (2, 3, 4, 5)
    ]
    raw = ['{"a": "caf\\xe9"}', r'{"chosen": "\ud800"}', '{"b": "é"}', "[]"]
    assert [row["row"] for row in written] == raw


def test_prompt_key_tells_prompts_apart(tmp_path):
    prompts = ["a", '[["user", "a"]]', [user("a")], [assistant("a")], [user("a"), user("b")]]
    rows = read_lines(tmp_path, *({"prompt": p, "responses": ["x", "y"]} for p in prompts))
    assert rows.bad == []
    assert len({group.prompt_key for group in rows.groups}) == len(prompts)
    again = read_lines(tmp_path, {"prompt": [user("a")], "responses": ["z", "y"]})
    assert again.groups[0].prompt_key == rows.groups[2].prompt_key
