"""Every fault of a row, with its place, its field and the value that was found."""

import json
import math
from dataclasses import replace

import pytest

from dpo_lightning.data.records import check_bad_rows, write_quarantine
from dpo_lightning.errors import UserError
from tests.support.rows import GOOD, assistant, read_bad, read_lines, user

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
        ({"chosen": "a", "rejected": "b", "question": "q"}, "prompt", "'question' may be it"),
        ({"chosen": "a", "rejected": "b"}, "prompt", "no common beginning"),
        ({**GOOD, "prompt": None}, "prompt", "null, expected a text or a list of messages"),
        ({**GOOD, "chosen": None}, "chosen", "null, expected a text or a list of messages"),
        ({**GOOD, "chosen": 3}, "chosen", "the number 3"),
        ({**GOOD, "chosen": True}, "chosen", "true"),
        ({**GOOD, "chosen": {"content": "x"}}, "chosen", "an object of 'content'"),
        ({**GOOD, "chosen": assistant("x")}, "rejected", "a string, but chosen is messages"),
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
        ({**GOOD, "weight": 0}, "weight", "the number 0, expected a number > 0"),
        ({**GOOD, "weight": -1.5}, "weight", "the number -1.5, expected a number > 0"),
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
        ([{"role": "user", "content": [{"type": "text"}]}], "chosen[0].content[0].text", "null"),
        ([{"from": "cat", "value": "x"}], "chosen[0].from", "'cat', expected one of user"),
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


def test_odd_column_names_are_made_printable(tmp_path):
    rows = read_lines(tmp_path, {**GOOD, "a\nb": "heavy"}, columns={"weight": "a\nb"})
    assert [bad.field for bad in rows.bad] == [r"a\nb"]


# ------------------------------------------------------------------------------- many bad rows


def test_check_bad_rows(tmp_path):
    rows = read_lines(tmp_path, GOOD, b"nonsense", {**GOOD, "weight": 0})
    with pytest.raises(UserError) as caught:
        check_bad_rows(rows, on_bad_row="stop")
    path = f"{tmp_path}/rows.jsonl"
    assert str(caught.value) == (
        f"{path}:2: row: invalid JSON at column 1: Expecting value; "
        f"{path}:3: weight: the number 0, expected a number > 0; "
        "2 bad rows of 3, data.on_bad_row=skip skips them (kept in quarantine.jsonl)"
    )
    assert caught.value.exit_code == 2
    check_bad_rows(rows, on_bad_row="skip")
    check_bad_rows(read_lines(tmp_path, GOOD), on_bad_row="stop")


def test_rows_with_one_fault_are_one_clause(tmp_path):
    rows = read_lines(tmp_path, *[{**GOOD, "weight": -at} for at in range(25)], GOOD)
    with pytest.raises(UserError) as caught:
        check_bad_rows(rows, on_bad_row="stop")
    path = f"{tmp_path}/rows.jsonl"
    assert str(caught.value) == (
        f"{path}:1: weight: the number 0, expected a number > 0 (the same in 24 other rows: "
        f"{path}:2, {path}:3 and 22 more); 25 bad rows of 26, data.on_bad_row=skip skips them "
        "(kept in quarantine.jsonl)"
    )


def test_twenty_faults_are_named(tmp_path):
    rows = read_lines(tmp_path, GOOD, *[{**GOOD, "chosen": {"a" * n: 1}} for n in range(1, 26)])
    rows = replace(rows, bad=[replace(b, field=f"f{'x' * at}") for at, b in enumerate(rows.bad)])
    with pytest.raises(UserError, match=r"; and 5 other faults; 25 bad rows of 26"):
        check_bad_rows(rows, on_bad_row="stop")


def test_where_every_row_is_bad_nothing_is_set_aside(tmp_path):
    rows = read_lines(tmp_path, *[b"nonsense"] * 4)
    for on_bad_row in ("stop", "skip"):
        with pytest.raises(UserError, match=r"3 other rows: .*; no row can be read$"):
            check_bad_rows(rows, on_bad_row=on_bad_row)


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
