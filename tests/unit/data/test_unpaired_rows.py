"""Rows of one response with a label: read, left out where nobody rated them, or refused by name."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.records import read_rows
from dpo_lightning.data.texts import Message
from dpo_lightning.plugins import READERS, register_reader
from tests.support.properties import examples
from tests.support.rows import GOOD, assistant, user
from tests.support.sources import read, refused, write

ROW = {"prompt": "2 + 2 =", "response": " 4", "label": True}
NO_ROW = {"prompt": "2 + 2 =", "response": " 5", "label": False}


def lines(folder, *rows, name="rows.jsonl"):
    return write(folder / name, "\n".join(map(json.dumps, rows)).encode())


def labelled(rows):
    """Prompt, response and label of each row."""
    assert all(len(g.responses) == 1 and g.ranks == (1,) for g in rows.groups)
    return [(g.prompt, g.responses[0], g.label) for g in rows.groups]


def test_a_response_with_a_label_is_a_group_of_one(tmp_path):
    rows = read(lines(tmp_path, ROW, NO_ROW))
    assert labelled(rows) == [("2 + 2 =", " 4", True), ("2 + 2 =", " 5", False)]
    assert [group.form for group in rows.groups] == ["label", "label"]
    assert (rows.total, rows.bad, rows.unrated, rows.notes) == (2, [], 0, [])


def test_the_unpaired_form_of_trl_is_read_and_said(tmp_path):
    """``completion`` is the response, a string or messages, beside a prompt of the same kind."""
    row = {"prompt": [user("q")], "completion": [assistant("a")], "label": False}
    rows = read(lines(tmp_path, row))
    [(prompt, response, label)] = labelled(rows)
    assert prompt == (Message("user", "q"),)
    assert response == (Message("assistant", "a"),)
    assert label is False
    assert any("read as data.format=unpaired_completion: TRL's" in note for note in rows.notes)
    text = {"prompt": "q", "completion": "a", "label": True}
    assert labelled(read(lines(tmp_path, text))) == [("q", "a", True)]
    assert labelled(read(lines(tmp_path, text), format="unpaired_completion")) == [("q", "a", True)]


def test_own_rows_by_name_have_one_response_too(tmp_path):
    assert labelled(read(lines(tmp_path, ROW), format="rows"))[0][2] is True
    assert read(lines(tmp_path, GOOD), format="rows").groups[0].label is None


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "p", "answer": "a", "thumb": "up"}, {"response": "answer", "label": "thumb"}),
        ({"ask": "p", "response": "a", "label": 1}, {"prompt": "ask"}),
        ({"prompt": "p", "response": "a", "stars": True}, {"label": "stars"}),
        ({"prompt": "p", "answer": "a", "label": True}, {"response": "answer"}),
        (
            {"ask": "p", "said": "a", "vote": 1, "response": "no", "label": False},
            {"prompt": "ask", "response": "said", "label": "vote"},
        ),
    ],
)
def test_columns_of_other_names_are_mapped(tmp_path, row, columns):
    rows = read(lines(tmp_path, row), columns=columns)
    assert labelled(rows) == [("p", "a", True)]


def test_a_rating_of_the_row_takes_the_threshold(tmp_path):
    rows = [{"prompt": "p", "response": f"a{n}", "rating": n} for n in range(1, 6)]
    path = lines(tmp_path, *rows)
    columns = {"label": "rating"}
    found = read(path, columns=columns, threshold=4)
    assert [label for *_, label in labelled(found)] == [False, False, False, True, True]
    assert found.by_threshold == 5
    assert f"{path}:2: rating: the number 2" in refused(path, columns=columns)


def test_a_null_is_left_out_and_counted_and_never_undesirable(tmp_path):
    unrated = [ROW | {"label": None}, {"prompt": "p", "response": "a"}, ROW | {"label": ""}]
    path = lines(tmp_path, *unrated, ROW, NO_ROW)
    rows = read(path)
    assert [label for *_, label in labelled(rows)] == [True, False]
    assert (rows.total, rows.unrated) == (2, 3)
    assert rows.notes == [f"data.train={path}: 3 answers without a rating are left out"]


def test_the_first_row_may_be_one_that_nobody_rated(tmp_path):
    first = {"prompt": "p", "response": "a"}
    assert len(read(lines(tmp_path, first, first, ROW)).groups) == 1


def test_no_rating_at_all_is_refused(tmp_path):
    message = refused(lines(tmp_path, ROW | {"label": None}, ROW | {"label": None}))
    assert "none of 2 answers is rated; a rating is a column 'label'" in message


def test_labels_of_a_table_and_of_cells(tmp_path):
    """Of a table a null is no label, as of JSON; a cell is true, up, or a number."""
    table = pa.table(
        {"prompt": ["p", "p", "p"], "completion": ["a", "b", "c"], "label": [True, None, False]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read(tmp_path / "a.parquet")
    assert labelled(rows) == [("p", "a", True), ("p", "c", False)]
    assert rows.unrated == 1
    text = b"prompt,response,label\np,a,true\np,b,0\np,c,\np,d,up\np,e,True\n"
    rows = read(write(tmp_path / "a.csv", text))
    assert [label for *_, label in labelled(rows)] == [True, False, True, True]
    assert rows.unrated == 1


def test_weights_systems_and_tools_stay(tmp_path):
    rows = read(lines(tmp_path, ROW | {"weight": 2.5, "system": "Be brief."}, NO_ROW))
    assert [group.weight for group in rows.groups] == [2.5, 1.0]
    assert [message.role for message in rows.groups[0].prompt] == ["system", "user"]
    assert [message.role for message in rows.groups[1].prompt] == ["user"]


# What is refused ----------------------------------------------------------------------------------


def bad(folder, row, **options):
    """A bad row in line 2, behind a good one."""
    rows = read(lines(folder, ROW, row), **options)
    [found] = rows.bad
    assert found.source == f"{folder}/rows.jsonl:2"
    return f"{found.field}: {found.problem}"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (ROW | {"label": "meh"}, "label: the text 'meh', expected true or false"),
        (ROW | {"response": 3}, "response: the number 3, expected a text"),
        (ROW | {"response": ["a", "b"]}, "response[0]: the text 'a', expected an object"),
        (GOOD, "response: missing; the row has 'prompt', 'chosen', 'rejected'"),
        (ROW | {"chosen": "x"}, "chosen: found beside 'response', and the rows of a file have one"),
        (ROW | {"target_margin": 1}, "target_margin: the lead of the better response"),
        (ROW | {"weight": 0}, "weight: the number 0, expected a number > 0"),
    ],
)
def test_a_bad_row_names_its_fault(tmp_path, row, problem):
    assert bad(tmp_path, row).startswith(problem)


def test_a_labelled_row_among_pairs_is_refused_by_its_line(tmp_path):
    rows = read(lines(tmp_path, GOOD, ROW))
    [found] = rows.bad
    assert (found.source, found.field) == (f"{tmp_path}/rows.jsonl:2", "chosen")


def test_two_files_may_have_two_forms(tmp_path):
    first, second = lines(tmp_path, ROW, name="a.jsonl"), lines(tmp_path, GOOD, name="b.jsonl")
    rows = read_list([str(first), str(second)])
    assert [group.label for group in rows.groups] == [True, None]


def read_list(source):
    return read_rows(source, format="auto", columns={}, split=None, subset=None, revision=None)


def test_the_prompt_is_given(tmp_path):
    """One response has nothing in common with others, so that its prompt does not show."""
    row = {"completion": "2 + 2 = 4", "label": True}
    message = refused(lines(tmp_path, row, row))
    assert "'prompt' is missing, and one response does not say where its prompt ends" in message
    assert "give the prompt in a column of its own" in message
    talk = {"completion": [user("q"), assistant("a")], "label": True}
    assert "a whole conversation as 'messages'" in refused(lines(tmp_path, talk))
    hidden = {"question": "q", "completion": "a", "label": True}
    remedy = "map it with 'data.columns={prompt: question}'"
    assert remedy in refused(lines(tmp_path, hidden))
    rows = read(lines(tmp_path, hidden), columns={"prompt": "question"})
    assert labelled(rows) == [("q", "a", True)]


def test_a_response_may_repeat_the_conversation_that_it_answers(tmp_path):
    row = {"prompt": [user("q")], "response": [user("q"), assistant("a")], "label": True}
    [(prompt, response, _)] = labelled(read(lines(tmp_path, row)))
    assert (prompt, response) == ((Message("user", "q"),), (Message("assistant", "a"),))


def test_responses_are_mapped_in_one_form(tmp_path):
    columns = {"response": "a", "chosen": "b"}
    assert "chosen and response are both mapped" in refused(lines(tmp_path, ROW), columns=columns)


def test_marks_of_one_response_are_labels_by_a_threshold(tmp_path):
    """The mapping and the threshold that the refusal of HelpSteer's marks names."""
    marks = {"correctness": 1, "coherence": 1}
    rows = [{"prompt": "p", "response": "x", "helpfulness": n, **marks} for n in (2, 3)]
    path = lines(tmp_path, *rows)
    message = refused(path)
    assert "'data.columns={label: helpfulness}' data.threshold=3" in message
    found = read(path, columns={"label": "helpfulness"}, threshold=3)
    assert [label for *_, label in labelled(found)] == [False, True]


def test_a_reader_of_a_plugin_may_give_labels_and_pairs(tmp_path):
    @register_reader("thumbed")
    def thumbed(row):
        given = {"prompt": row["ask"]}
        if "other" in row:
            return {**given, "chosen": row["said"], "rejected": row["other"]}
        return {**given, "response": row["said"], "label": row["ok"]}

    try:
        rows = read(
            lines(
                tmp_path,
                {"ask": "p", "said": "a", "ok": True},
                {"ask": "p", "said": "a", "other": "b"},
                {"ask": "p", "said": "c", "ok": None},
            ),
            format="thumbed",
        )
    finally:
        del READERS["thumbed"]
    assert [(group.responses, group.label) for group in rows.groups] == [
        (("a",), True),
        (("a", "b"), None),
    ]
    assert rows.unrated == 1
    assert not rows.bad


def test_pairs_with_a_column_called_label_stay_pairs(tmp_path):
    row = GOOD | {"label": 1, "response": "x"}
    [group] = read(lines(tmp_path, row)).groups
    assert (group.label, len(group.responses)) == (None, 2)


LABELS = st.sampled_from([True, False, None, 1, 0, "up", "down", "meh", 3.5, [], "1"])
TEXT = st.sampled_from(["", "a", "b c", "\n"]) | st.text(max_size=5)


@settings(max_examples=examples(100))
@given(st.lists(st.tuples(TEXT, TEXT, LABELS), min_size=1, max_size=8))
def test_every_row_is_labelled_left_out_or_bad(tmp_path_factory, made):
    """Against a loop over the rows: no row is lost, and no null becomes a label."""
    rows = [{"prompt": p, "response": r, "label": label} for p, r, label in made]
    path = lines(tmp_path_factory.mktemp("rows"), ROW, *rows)
    if any(label == 3.5 for *_, label in made):
        assert "data.threshold=" in refused(path)
        return
    found = read(path)
    known = {"up": True, "down": False, "1": True}
    good = []
    for p, r, label in made:
        if isinstance(label, bool | int) or (isinstance(label, str) and label in known):
            good.append((p, r, bool(known.get(label, label))))
    assert labelled(found)[1:] == good
    assert found.unrated == sum(label is None for *_, label in made)
    assert len(found.bad) == sum(label in ("meh", []) for *_, label in made)
    assert found.total == 1 + len(made) - found.unrated
