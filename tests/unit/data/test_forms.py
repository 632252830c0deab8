"""Public forms of rows: each is read rightly and said, or refused with a mapping that works."""

import re

import pytest

from dpo_lightning.data.forms import FORMS, NAMES
from dpo_lightning.data.records import read_rows
from dpo_lightning.data.texts import Message
from dpo_lightning.errors import UserError
from dpo_lightning.plugins import READERS, register_reader
from tests.support.rows import GOOD, assistant, read_lines, user
from tests.support.sources import refused, write

PAIR = {"chosen": " good", "rejected": " bad"}
TALK = [user("q"), assistant("good")]
OTHER = [user("q"), assistant("bad")]
TOOL = {"type": "function", "function": {"name": "find"}}


def plain(text):
    """A text as a string: of messages the content, with the role where it is no answer."""
    if isinstance(text, str):
        return text
    return "|".join(m.content if m.role == "assistant" else f"{m.role}:{m.content}" for m in text)


@pytest.mark.parametrize(
    ("form", "row", "prompt", "responses"),
    [
        ("orca", {"system": "s", "question": "q", **PAIR}, "system:s|user:q", " good, bad"),
        ("orca", {"system": "", "question": "q", **PAIR}, "user:q", " good, bad"),
        ("orca_input", {"system": "s", "input": "q", **PAIR}, "system:s|user:q", " good, bad"),
        ("alpaca", {"instruction": "i", "input": "j", **PAIR}, "i\nj", " good, bad"),
        ("alpaca", {"instruction": "i", "input": "", **PAIR}, "i", " good, bad"),
        (
            "alpaca",
            {"instruction": "i", "input": "j", "system": "s", "history": [["a", "b"]], **PAIR},
            "system:s|user:a|b|user:i\nj",
            " good, bad",
        ),
        (
            "alpaca_output",
            {"instruction": "i", "input": "j", "output": ["good", "bad"]},
            "i\nj",
            "good,bad",
        ),
        (
            "argilla",
            {"instruction": "i", "chosen_response": "good", "rejected_response": "bad"},
            "i",
            "good,bad",
        ),
        ("shp", {"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 1}, "p", "x,y"),
        ("shp", {"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 0}, "p", "y,x"),
        (
            "safe_rlhf",
            {"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 1},
            "p",
            "y,x",
        ),
        (
            "helpsteer2",
            {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": -1},
            "p",
            "x,y",
        ),
        (
            "helpsteer2",
            {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": 3},
            "p",
            "y,x",
        ),
        (
            "helpsteer3",
            {"context": [user("p")], "response1": "x", "response2": "y", "overall_preference": 2},
            "user:p",
            "y,x",
        ),
        (
            "nectar",
            {
                "prompt": "p",
                "answers": [{"answer": "x", "rank": 2.0}, {"answer": "y", "rank": 1.0}],
            },
            "p",
            "y,x",
        ),
        (
            "ultrafeedback",
            {
                "instruction": "p",
                "completions": [
                    {"response": "x", "fine-grained_score": 2, "overall_score": 10},
                    {"response": "y", "fine-grained_score": 4, "overall_score": 1},
                ],
            },
            "p",
            "y,x",
        ),
        (
            "openai",
            {
                "input": {"messages": [user("p")], "tools": [TOOL]},
                "preferred_output": [assistant("x")],
                "non_preferred_output": [assistant("y")],
            },
            "user:p",
            "x,y",
        ),
        ("swift", {"messages": TALK, "rejected_response": "bad"}, "user:q", "good,bad"),
        ("swift_messages", {"messages": TALK, "rejected_messages": OTHER}, "user:q", "good,bad"),
        (
            "swift_query",
            {"query": "q", "response": "x", "rejected_response": "y", "history": [["a", "b"]]},
            "user:a|b|user:q",
            "x,y",
        ),
        (
            "messages",
            {"messages": [user("q")], "chosen": assistant("x"), "rejected": assistant("y")},
            "user:q",
            "x,y",
        ),
        (
            "arena",
            {"conversation_a": OTHER, "conversation_b": TALK, "winner": "model_b"},
            "user:q",
            "good,bad",
        ),
        (
            "stack_exchange",
            {"question": "q", "response_j": "x", "response_k": "y"},
            "q",
            "x,y",
        ),
    ],
)  # fmt: skip
def test_a_public_form_is_read_and_said(tmp_path, form, row, prompt, responses):
    rows = read_lines(tmp_path, row)
    (group,) = rows.groups
    assert plain(group.prompt) == prompt
    assert ",".join(plain(response) for response in group.responses) == responses
    assert group.ranks == (1, 2)
    assert any(f"read as data.format={form}: " in note for note in rows.notes)
    assert read_lines(tmp_path, row, format=form).groups == rows.groups


def test_every_form_has_a_row_above_or_is_refused():
    marks = test_a_public_form_is_read_and_said.pytestmark[0].args[1]
    tested = {form for form, *_ in marks} | {"sharegpt"}
    # Those of one response have tests of their own.
    assert tested == {form.name for form in FORMS if not form.refusal and not form.alone}
    assert len(NAMES) == len(set(NAMES))


def test_ties_of_a_form_are_ties(tmp_path):
    row = {"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": 0}
    assert read_lines(tmp_path, row).groups[0].ranks == (1, 1)
    row = {"conversation_a": OTHER, "conversation_b": TALK, "winner": "tie (bothbad)"}
    assert read_lines(tmp_path, row).groups[0].ranks == (1, 1)


def test_tools_of_a_form_reach_the_group(tmp_path):
    row = {
        "input": {"messages": [user("p")], "tools": [TOOL]},
        "preferred_output": [assistant("x")],
        "non_preferred_output": [assistant("y")],
    }
    assert '"find"' in read_lines(tmp_path, row).groups[0].tools


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 2},
            "labels: the number 2, expected one of 1, 0",
        ),
        ({"prompt": "p", "answers": [{"answer": "x"}]}, "answers[0]: an object of 'answer'"),
        ({"messages": [user("q")], "rejected_response": "y"}, "messages: ends with no answer"),
        (
            {"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 2},
            "better_response_id: the number 2, expected the better response: 0, 1, or tie",
        ),
    ],
)
def test_bad_rows_of_a_form(tmp_path, row, problem):
    (bad,) = read_lines(tmp_path, row).bad
    assert f"{bad.field}: {bad.problem}".startswith(problem)


def test_marks_of_one_response_are_no_preference(tmp_path):
    row = {"prompt": "p", "response": "x", "helpfulness": 1, "correctness": 1, "coherence": 1}
    assert "one response a row: that is no preference" in refused(write(tmp_path / "a.json", [row]))


def test_system_prompts_of_single_answers_are_refused_until_they_are_left_out(tmp_path):
    completions = [
        {"response": "x", "fine-grained_score": 2, "custom_system_prompt": "Be brief."},
        {"response": "y", "fine-grained_score": 4, "custom_system_prompt": "Be kind."},
    ]
    path = write(tmp_path / "a.json", [{"instruction": "p", "completions": completions}])
    remedy = re.search(r"data\.ignore_fields=\[(\S+)\]", refused(path))
    assert remedy is not None
    (group,) = read(path, ignore=[remedy.group(1)]).groups
    assert group.responses == ("y", "x")


def read(path, *, columns=None, ignore=(), format="auto"):
    return read_rows(
        str(path),
        format=format,
        columns=columns or {},
        split=None,
        subset=None,
        revision=None,
        ignore=ignore,
    )


# ------------------------------------------------------------------------ mappings of two answers


def test_the_mapping_that_is_printed_for_two_answers_works(tmp_path):
    rows = [{"prompt": "p", "answer_a": "x", "answer_b": "y", "winner": w} for w in "ab"]
    path = write(tmp_path / "a.json", rows)
    message = refused(path)
    assert "'data.columns={responses: [answer_a, answer_b], better: winner}'" in message
    found = read(path, columns={"responses": ["answer_a", "answer_b"], "better": "winner"})
    assert [group.responses for group in found.groups] == [("x", "y"), ("y", "x")]


@pytest.mark.parametrize(
    ("names", "value", "best"),
    [
        (("r_a", "r_b"), "b", "r_b"),
        (("r_a", "r_b"), "model_a", "r_a"),
        (("r_a", "r_b"), "r_b", "r_b"),
        (("refA", "refB"), "B", "refB"),
        (("r_0", "r_1"), 1, "r_1"),
        (("r_1", "r_2"), 1, "r_1"),
        (("r_1", "r_2"), 2.0, "r_2"),
        (("good", "worse"), "worse", "worse"),
        (("r_a", "r_b"), 1, None),
        (("r_1", "r_2"), 0, None),
        (("good", "worse"), 1, None),
        (("r_0", "r_1"), True, None),
        (("r_0", "r_1"), None, None),
    ],
)
def test_the_better_answer_by_its_name(tmp_path, names, value, best):
    row = {"prompt": "p", names[0]: names[0], names[1]: names[1], "judge": value}
    rows = read_lines(tmp_path, row, columns={"responses": [*names], "better": "judge"})
    if best is None:
        assert [bad.field for bad in rows.bad] == ["judge"]
    else:
        assert [group.responses[0] for group in rows.groups] == [best]


def test_numbers_of_two_columns_order_them(tmp_path):
    row = {"prompt": "p", "x": "a", "y": "b", "x_mark": 1, "y_mark": 2}
    responses = {"responses": ["x", "y"]}
    rows = read_lines(tmp_path, row, columns={**responses, "scores": ["x_mark", "y_mark"]})
    assert rows.groups[0].responses == ("b", "a")
    rows = read_lines(tmp_path, row, columns={**responses, "ranks": ["x_mark", "y_mark"]})
    assert rows.groups[0].responses == ("a", "b")


def test_an_order_beside_chosen_and_rejected_is_refused(tmp_path):
    for columns in ({"better": "w"}, {"scores": "w"}):
        with pytest.raises(
            UserError, match="'w' is an order, and 'chosen' and 'rejected' have one"
        ):
            read_lines(tmp_path, {**GOOD, "w": 1}, columns=columns)


@pytest.mark.parametrize(
    "names",
    [
        ("Prompt", "Chosen", "Rejected"),
        ("query", "accepted", "rejected"),
        ("my question", "preferred", "non_preferred"),
        ("prompt", "good_answer", "bad_answer"),
    ],
)
def test_the_mapping_that_is_printed_for_other_names_works(tmp_path, names):
    path = write(tmp_path / "a.json", [dict(zip(names, ("p", "x", "y"), strict=True))])
    typed = re.search(r"'data\.columns=\{(.*?)\}'", refused(path))
    assert typed is not None
    columns = dict(part.split(": ") for part in typed.group(1).split(", "))
    (group,) = read(path, columns=columns).groups
    assert (group.prompt, group.responses) == ("p", ("x", "y"))


def test_columns_of_answers_have_no_order_of_their_own(tmp_path):
    row = {"prompt": "p", "x": "a", "y": "b"}
    with pytest.raises(UserError, match=r"nothing says which response is better"):
        read_lines(tmp_path, row, columns={"responses": ["x", "y"]})


# ---------------------------------------------------------------------------------------- plugins


@pytest.fixture
def verdicts(monkeypatch):
    monkeypatch.setattr("dpo_lightning.plugins.READERS", READERS)

    @register_reader("verdicts")
    def read_verdict(row):
        pair = [row["first"], row["second"]]
        best = row["verdict"] == "second"
        return {"prompt": row["ask"], "chosen": pair[best], "rejected": pair[not best]}

    yield read_verdict
    del READERS["verdicts"]


def test_a_reader_of_a_plugin(tmp_path, verdicts):
    row = {"ask": "p", "first": "x", "second": "y", "verdict": "second", "by": "judge 1"}
    rows = read_lines(tmp_path, row, format="verdicts")
    assert rows.groups[0].responses == ("y", "x")
    assert any("not read: 'by'" in note for note in rows.notes)


def test_what_a_reader_does_not_look_at_is_refused_where_it_is_for_the_model(tmp_path, verdicts):
    row = {"ask": "p", "first": "x", "second": "y", "verdict": "first", "system": "Be kind."}
    with pytest.raises(UserError, match=r"'system' may be for the model and is not used"):
        read_lines(tmp_path, row, format="verdicts")


def test_a_reader_that_fails_makes_bad_rows(tmp_path, verdicts):
    (bad,) = read_lines(tmp_path, GOOD, format="verdicts").bad
    assert bad.problem == "data.format=verdicts: KeyError: 'first'"


def test_messages_of_two_files_may_have_two_forms(tmp_path):
    write(tmp_path / "a.json", [{"question": "q", "system": "s", **PAIR}])
    write(tmp_path / "b.json", [GOOD])
    rows = read_rows(
        [str(tmp_path / "a.json"), str(tmp_path / "b.json")],
        format="auto",
        columns={},
        split=None,
        subset=None,
        revision=None,
    )
    assert rows.groups[0].prompt == (Message("system", "s"), Message("user", "q"))
    assert rows.groups[1].prompt == GOOD["prompt"]
