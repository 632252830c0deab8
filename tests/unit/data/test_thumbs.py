"""Conversations with ratings: each rated answer is a row, and a conversation is never parted."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.groups import conversation_of
from dpo_lightning.data.splits import shared_text, split_by_prompt
from dpo_lightning.data.texts import Message
from dpo_lightning.data.tokens import TokenGroup
from tests.support.groups import ids
from tests.support.properties import examples
from tests.support.rows import assistant, user
from tests.support.runs import ROOT
from tests.support.sources import read, refused, write


def log(folder, *rows, name="log.jsonl"):
    return write(folder / name, "\n".join(map(json.dumps, rows)).encode())


def shown(rows):
    """Prompt, answer and label of each row, roles by their first letter."""

    def text(messages):
        return "|".join(f"{m.role[0]}:{m.content}" for m in messages)

    return [(text(g.prompt), text(g.responses[0]), g.label) for g in rows.groups]


TALK = [
    user("q1"),
    assistant("a1") | {"rating": "up"},
    user("q2"),
    assistant("a2"),
    user("q3"),
    assistant("a3") | {"rating": "down"},
    user("q4"),
]


def test_each_rated_answer_has_its_history_and_nothing_behind_it(tmp_path):
    """The answer between them was not rated: it is history, and no row."""
    path = log(tmp_path, {"messages": TALK})
    rows = read(path)
    assert shown(rows) == [
        ("u:q1", "a:a1", True),
        ("u:q1|a:a1|u:q2|a:a2|u:q3", "a:a3", False),
    ]
    assert [group.source for group in rows.groups] == [f"{path}:1[1]", f"{path}:1[5]"]
    assert (rows.total, rows.unrated, rows.bad) == (2, 1, [])
    assert any("read as data.format=thumbs: conversations with ratings" in n for n in rows.notes)
    assert not any("not read" in note for note in rows.notes)


@pytest.mark.parametrize("key", ["label", "rating", "feedback"])
@pytest.mark.parametrize("values", [(True, False), (1, -1), ("up", "down"), ("👍", "👎")])
def test_the_rating_of_a_turn_has_three_names(tmp_path, key, values):
    turns = [user("q"), assistant("a") | {key: values[0]}]
    turns += [user("r"), assistant("b") | {key: values[1]}]
    assert [label for *_, label in shown(read(log(tmp_path, {"messages": turns})))] == [True, False]


def test_sharegpt_has_other_keys(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "rating": 1}]
    turns = [{"from": "system", "value": "s"}, *turns]
    rows = read(log(tmp_path, {"conversations": turns}))
    assert shown(rows) == [("s:s|u:q", "a:a", True)]
    assert any("read as data.format=thumbs_sharegpt: " in note for note in rows.notes)


def test_stars_need_a_threshold(tmp_path):
    turns = [user("q"), assistant("a") | {"rating": 4}, user("r"), assistant("b") | {"rating": 2}]
    path = log(tmp_path, {"messages": turns})
    assert f"{path}:1[1]: messages[rating]: the number 4; ratings from 2 to 4" in refused(path)
    assert [label for *_, label in shown(read(path, threshold=4))] == [True, False]
    assert [label for *_, label in shown(read(path, threshold=2))] == [True, True]


@pytest.mark.parametrize("none", [{}, {"rating": None}, {"rating": ""}, {"rating": {"a": None}}])
def test_no_rating_is_never_a_thumb_down(tmp_path, none):
    turns = [user("q"), assistant("a") | none, user("r"), assistant("b") | {"rating": False}]
    rows = read(log(tmp_path, {"messages": turns}))
    assert shown(rows) == [("u:q|a:a|u:r", "a:b", False)]
    assert rows.unrated == 1


def test_a_log_without_any_rating_is_refused(tmp_path):
    path = log(tmp_path, {"messages": [user("q"), assistant("a")]})
    assert "none of 1 answer is rated; a rating is a column 'label'" in refused(path)


@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_the_label_of_a_row_is_of_its_last_answer(tmp_path, column):
    turns = [user("q"), assistant("a"), user("r"), assistant("b"), assistant("c")]
    path = log(tmp_path, {"messages": turns, column: False})
    rows = read(path)
    assert shown(rows) == [("u:q|a:a|u:r", "a:b|a:c", False)]
    assert rows.groups[0].source == f"{path}:1"
    assert not any("not read" in note for note in rows.notes)


def test_the_rating_of_a_row_may_have_any_name(tmp_path):
    rows = [{"messages": [user("q"), assistant("a")], "stars": n} for n in (1, 5, None)]
    found = read(log(tmp_path, *rows), columns={"label": "stars"}, threshold=4)
    assert [label for *_, label in shown(found)] == [False, True]
    assert found.unrated == 1


def test_a_row_without_a_label_leaves_its_turns_theirs(tmp_path):
    rows = read(log(tmp_path, {"messages": TALK, "label": None}))
    assert len(rows.groups) == 2


def test_the_columns_of_the_row_go_to_each_of_its_answers(tmp_path):
    row = {"messages": TALK, "weight": 3, "system": "Be brief."}
    groups = read(log(tmp_path, row)).groups
    assert [group.weight for group in groups] == [3.0, 3.0]
    assert all(group.prompt[0] == Message("system", "Be brief.") for group in groups)


def test_a_log_as_cells_and_as_a_table(tmp_path):
    """Of a table every turn has every key: a null there is no rating."""
    turns = [user("q") | {"rating": None}, assistant("a") | {"rating": 1}]
    pq.write_table(pa.table({"messages": [turns]}), tmp_path / "a.parquet")
    assert shown(read(tmp_path / "a.parquet")) == [("u:q", "a:a", True)]
    cell = json.dumps(turns).replace('"', '""')
    text = f'messages,note\n"{cell}",x\n'.encode()
    assert shown(read(write(tmp_path / "a.csv", text))) == [("u:q", "a:a", True)]


# What is refused ----------------------------------------------------------------------------------

UP = {"rating": "up"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [user("q") | UP]}, "messages[0].rating: rates a turn of 'user', and only"),
        (
            {"messages": [user("q"), assistant("a") | UP | {"feedback": "good"}]},
            "messages[1].feedback: found beside 'rating', and only one can be the rating",
        ),
        ({"messages": [assistant("a") | UP]}, "messages[0].rating: rates an answer that has no"),
        (
            {"messages": [user("q"), assistant("a") | UP], "label": True},
            "label: found beside messages[1].rating, and either the row or its turns",
        ),
        ({"messages": [user("q")], "label": True}, "messages: ends with no answer, which 'label'"),
        ({"messages": "q"}, "messages: the text 'q', expected a list of messages"),
        ({"messages": ["q"]}, "messages[0]: the text 'q', expected an object of 'role'"),
        ({"messages": [user("q"), assistant("a") | {"rating": "meh"}]}, "messages[rating]: the "),
        ({"messages": [user("q"), {"role": "assistant"} | UP]}, "messages[answer][0].content"),
        (
            {"messages": [user("q"), assistant("a")], "label": 1, "kto_tag": 1},
            "kto_tag: found beside 'label', and only one can be the rating; name it with",
        ),
    ],
)  # fmt: skip
def test_a_bad_conversation_names_its_fault(tmp_path, row, problem):
    rows = read(log(tmp_path, {"messages": TALK}, row))
    [found] = rows.bad
    assert f"{found.field}: {found.problem}".startswith(problem)
    assert found.source.startswith(f"{tmp_path}/log.jsonl:2")
    assert len(rows.groups) == 2


def test_one_of_two_ratings_is_left_out_by_name(tmp_path):
    turns = [user("q"), assistant("a") | {"rating": "up", "feedback": "Nice and short."}]
    path = log(tmp_path, {"messages": turns}, {"messages": turns})
    ignored = read(path, ignore=["messages.feedback"])
    assert [label for *_, label in shown(ignored)] == [True, True]


def test_a_bad_answer_leaves_the_others_of_its_conversation(tmp_path):
    turns = [user("q"), assistant("a") | UP, user("r"), assistant("b") | {"rating": "meh"}]
    path = log(tmp_path, {"messages": turns})
    rows = read(path)
    assert len(rows.groups) == 1
    assert [bad.source for bad in rows.bad] == [f"{path}:1[3]"]


# The page -----------------------------------------------------------------------------------------


def test_the_log_of_the_page_is_what_the_page_says(tmp_path):
    """Three rows and one unrated answer; "Blue." and "4" are desirable, "Seven." is not."""
    page = (ROOT / "docs" / "data.md").read_text()
    section = page.partition("\n## Answers without a partner\n")[2].partition("\n## ")[0]
    plain, logged = re.findall(r"```json\n(.*?)```", section, re.S)
    rows = read(write(tmp_path / "log.jsonl", logged.encode()), threshold=4)
    assert [(answer, label) for _, answer, label in shown(rows)] == [
        ("a:Blue.", True),
        ("a:Seven.", False),
        ("a:4", True),
    ]
    assert (rows.unrated, rows.bad) == (1, [])
    found = read(write(tmp_path / "rows.jsonl", plain.encode()))
    assert [group.label for group in found.groups] == [True, False, True]
    assert (found.unrated, found.bad) == (1, [])


# One side of a split ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("s:plain", "s:plain"),
        ('[["user", "q"]]', '[["user", "q"]]'),
        ('[["user", "q"], ["assistant", "a"], ["user", "r"]]', '[["user", "q"]]'),
        (
            '[["system", "s"], ["assistant", "Hello"], ["user", "q"], ["assistant", "a"]]',
            '[["system", "s"], ["assistant", "Hello"], ["user", "q"]]',
        ),
        ('{"messages": [["user", "q"], ["assistant", "a"]], "tools": "[]"}', '[["user", "q"]]'),
        ("s:\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:", "s:\n\nHuman: q"),
        ("s:\n\nHuman: q\n\nAssistant:", "s:\n\nHuman: q"),
    ],
)
def test_a_conversation_is_known_by_its_first_question(key, expected):
    assert conversation_of(key) == expected


def labelled(prompt_key, label, number):
    return TokenGroup(
        ids(1, 2), (ids(3, 0),), (1,), 1.0, f"log.jsonl:{number}", prompt_key, label=label
    )


TURNS = st.lists(st.sampled_from("abc"), min_size=1, max_size=6)


@settings(max_examples=examples(100))
@given(
    talks=st.lists(TURNS, min_size=2, max_size=12),
    fraction=st.floats(0.05, 0.9),
    seed=st.integers(0, 5),
)
def test_no_conversation_is_on_two_sides(talks, fraction, seed):
    """Every answer of every conversation is rated; the prompts of one begin each other."""
    groups = []
    for number, talk in enumerate(talks):
        for end in range(1, len(talk) + 1, 2):
            roles = ("user", "assistant") * len(talk)
            key = json.dumps([list(turn) for turn in zip(roles, talk[:end], strict=False)])
            groups.append(labelled(key, bool(number % 2), number))
    train, held_out = split_by_prompt(groups, fraction=fraction, seed=seed)
    assert len(train) + len(held_out) == len(groups)
    first = [{json.loads(g.prompt_key)[0][1] for g in part} for part in (train, held_out)]
    assert not first[0] & first[1]
    assert not {g.source for g in train} & {g.source for g in held_out}
    assert train
    assert bool(held_out) == (len({talk[0] for talk in talks}) > 1)


def test_pairs_are_told_apart_by_their_prompts_alone():
    key = '[["user", "q"], ["assistant", "a"], ["user", "r"]]'
    pair = TokenGroup(ids(1), (ids(3, 0), ids(4, 0)), (1, 2), 1.0, "f:1", key)
    assert shared_text([pair])(pair) == key
    assert shared_text([pair, labelled(key, True, 2)])(pair) == '[["user", "q"]]'
