"""Columns of rows and keys of messages: each is read, named once, or refused."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_lightning.data.fields import may_be_for_the_model, misses
from dpo_lightning.data.records import read_rows
from dpo_lightning.data.rows import prompt_of_key
from dpo_lightning.data.texts import Message
from dpo_lightning.errors import UserError
from tests.support.rows import GOOD, assistant, read_lines, user

CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "find", "arguments": '{"what": "hat"}'},
}
ANSWERS = {"chosen": [assistant("a")], "rejected": [assistant("b")]}


def read(folder, *rows, ignore=(), columns=None):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(
        str(path),
        format="auto",
        columns=columns or {},
        split=None,
        subset=None,
        revision=None,
        ignore=ignore,
    )


def read_table(folder, columns):
    pq.write_table(pa.table(columns), folder / "rows.parquet")
    return read_rows(
        str(folder / "rows.parquet"),
        format="auto",
        columns={},
        split=None,
        subset=None,
        revision=None,
    )


def extra(message: Message) -> dict:
    return json.loads(message.extra) if message.extra else {}


# ---------------------------------------------------------------------------------------- columns


@pytest.mark.parametrize(
    "column",
    [
        *("context", "documents", "images", "system_prompt", "functions", "reasoning_content"),
        *("input", "history", "name", "promt", "availableTools", "developer", "passage"),
    ],
)
def test_a_column_that_may_be_for_the_model_is_refused_and_can_be_left_out(tmp_path, column):
    row = {**GOOD, column: "The hat is red."}
    with pytest.raises(
        UserError, match=f"'{column}' may be for the model and is not used"
    ) as error:
        read(tmp_path, row)
    assert f"'data.ignore_fields=[{column}]'" in str(error.value)
    rows = read(tmp_path, row, ignore=[column])
    assert (len(rows.groups), rows.notes, rows.ignored) == (1, [], {column})


@pytest.mark.parametrize("value", [None, "", "  ", [], {}, [{"a": None}], 3, True])
def test_where_such_a_column_has_no_text_nothing_is_refused(tmp_path, value):
    assert len(read(tmp_path, {**GOOD, "context": value}).groups) == 1


def test_few_rows_with_such_a_column_are_bad_rows(tmp_path):
    rows = read(tmp_path, *[GOOD] * 9, {**GOOD, "context": "The hat is red."})
    (bad,) = rows.bad
    assert (bad.field, len(rows.groups)) == ("context", 9)


def test_other_columns_are_named_once(tmp_path):
    rows = read(tmp_path, *[{**GOOD, "session_id": "x 1", "rating": 4, "prompt_id": "p q"}] * 3)
    (note,) = rows.notes
    assert "not read: 'prompt_id', 'rating', 'session_id' (data.ignore_fields=" in note
    assert rows.unread == {"prompt_id", "rating", "session_id"}
    ignored = ["prompt_id", "rating", "session_id"]
    assert read(tmp_path, {**GOOD, "rating": 4}, ignore=ignored).notes == []


def test_a_column_whose_text_is_in_the_prompt_is_not_refused(tmp_path):
    row = {**GOOD, "prompt": "Add these.\n\n1 + 2", "instruction": "Add these.", "input": "1 + 2"}
    (note,) = read(tmp_path, row).notes
    assert "what is read has their text: 'input', 'instruction'" in note
    with pytest.raises(UserError, match="'input' may be for the model"):
        read(tmp_path, {**row, "input": "1 + 3"})
    with pytest.raises(UserError, match="'input' may be for the model"):
        read(tmp_path, {**row, "input": "dd"})  # a part of a word


def test_a_misspelt_name_that_nobody_has_is_said():
    assert misses(["sesion", "id"], ["id"], ["session", "id"]) == [
        "data.ignore_fields: no row has 'sesion'; did you mean 'session'?"
    ]


@pytest.mark.parametrize("name", ["prompt_id", "image_count", "model", "source", "tool_score"])
def test_names_about_a_text_are_no_texts(name):
    assert not may_be_for_the_model(name)


# ------------------------------------------------------------------- system, tools, options of rows


def test_a_system_column_is_a_turn_before_the_prompt(tmp_path):
    rows = read(tmp_path, {**GOOD, "system": "Be kind."}, GOOD)
    assert rows.groups[0].prompt == (Message("system", "Be kind."), Message("user", "Say hi."))
    # Of one file all rows are turns.
    assert rows.groups[1].prompt == (Message("user", "Say hi."),)
    assert rows.groups[1].responses[0] == (Message("assistant", " Hello."),)
    assert any("were read as turns of user and assistant" in note for note in rows.notes)


def test_a_system_column_beside_a_mapped_prompt(tmp_path):
    row = {"system": "Be kind.", "question": "q", "chosen": "a", "rejected": "b"}
    (group,) = read(tmp_path, row, columns={"prompt": "question"}).groups
    assert group.prompt == (Message("system", "Be kind."), Message("user", "q"))


def test_two_system_messages_are_refused_and_one_twice_is_one(tmp_path):
    prompt = [{"role": "system", "content": "s"}, user("q")]
    (group,) = read(tmp_path, {"prompt": prompt, "system": "s", **ANSWERS}).groups
    assert [m.role for m in group.prompt] == ["system", "user"]
    (bad,) = read(tmp_path, {"prompt": prompt, "system": "t", **ANSWERS}).bad
    assert (bad.field, "system message of its own" in bad.problem) == ("system", True)


@pytest.mark.parametrize(
    "tools",
    [
        [{"type": "function", "function": {"name": "find"}}],
        [{"name": "find"}],
        json.dumps([{"name": "find"}]),
        [json.dumps({"name": "find"})],
    ],
)
def test_tools_in_every_form(tmp_path, tools):
    (group,) = read(tmp_path, {**GOOD, "tools": tools}).groups
    assert json.loads(group.tools) == [{"type": "function", "function": {"name": "find"}}]
    assert group.prompt == (Message("user", "Say hi."),)


def test_an_input_that_is_mapped_follows_the_prompt(tmp_path):
    mapped = {"input": "context"}
    (group,) = read(tmp_path, {**GOOD, "context": "The hat."}, columns=mapped).groups
    assert group.prompt == "Say hi.\nThe hat."
    row = {"prompt": [user("q")], **ANSWERS, "context": "The hat."}
    assert read(tmp_path, row, columns=mapped).groups[0].prompt == (Message("user", "q\nThe hat."),)
    row = {"prompt": [user("q"), assistant("So")], **ANSWERS, "context": "The hat."}
    assert read(tmp_path, row, columns=mapped).bad[0].field == "context"


def test_a_prompt_that_ends_with_a_response_of_its_row_is_refused(tmp_path):
    prompt = [user("q"), assistant("a")]
    for row in (
        {"prompt": prompt, **ANSWERS},
        {"prompt": prompt, "chosen": "a", "rejected": "b"},
        {"messages": prompt, "chosen": "a", "rejected": "b"},
    ):
        (bad,) = read(tmp_path, row).bad
        assert bad.field in ("prompt[1]", "messages[1]")
        assert "is a response of this row" in bad.problem
    assert read(tmp_path, {"prompt": [user("q"), assistant("So")], **ANSWERS}).bad == []


@pytest.mark.parametrize("name", ["my context", "context,2", 'context "b"', "context:"])
def test_a_remedy_can_be_typed_whatever_the_name(tmp_path, name):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    with pytest.raises(UserError) as error:
        read(tmp_path, {**GOOD, name: "The hat is red."})
    typed = re.search(r"leave it out with '(data\.ignore_fields=.*)'$", str(error.value))
    assert typed is not None
    ignored = OverridesParser.create().parse_override(typed.group(1)).value()
    assert len(read(tmp_path, {**GOOD, name: "The hat is red."}, ignore=ignored).groups) == 1


def test_tools_that_are_none(tmp_path):
    assert read(tmp_path, {**GOOD, "tools": "[]"}).groups[0].prompt == "Say hi."
    assert read(tmp_path, {**GOOD, "tools": "find it"}).bad[0].field == "tools"
    assert read(tmp_path, {**GOOD, "tools": [3]}).bad[0].field == "tools[0]"


def test_template_options_of_a_row(tmp_path):
    row = {"prompt": [user("q")], **ANSWERS, "chat_template_kwargs": {"b": 1, "a": False}}
    assert read(tmp_path, row).groups[0].template_kwargs == '{"a": false, "b": 1}'
    text = {**GOOD, "chat_template_kwargs": {"a": 1}}
    assert read(tmp_path, text).bad[0].field == "chat_template_kwargs"


def test_a_prompt_key_knows_tools_and_calls(tmp_path):
    asked = [user("q"), {"role": "assistant", "content": None, "tool_calls": [CALL]}, user("r")]
    rows = read(
        tmp_path,
        {"prompt": [user("q")], **ANSWERS},
        {"prompt": [user("q")], **ANSWERS, "tools": [{"name": "find"}]},
        {"prompt": asked, **ANSWERS},
        {"prompt": [user("q"), assistant(""), user("r")], **ANSWERS},
    )
    assert len({group.prompt_key for group in rows.groups}) == 4
    back = prompt_of_key(rows.groups[2].prompt_key)
    assert back[1]["tool_calls"][0]["function"]["arguments"] == {"what": "hat"}
    assert prompt_of_key(rows.groups[1].prompt_key) == [user("q")]


# --------------------------------------------------------------------------------------- messages


def test_fields_of_messages_that_templates_know_are_kept(tmp_path):
    chosen = {
        **{"role": "assistant", "content": None, "tool_calls": [CALL]},
        **{"reasoning_content": "It is red.", "name": "bob", "refusal": None, "audio": []},
    }
    (group,) = read(tmp_path, {"prompt": [user("q")], **ANSWERS, "chosen": [chosen]}).groups
    (message,) = group.responses[0]
    assert message.content == ""
    assert list(extra(message)) == ["name", "reasoning_content", "tool_calls"]
    call = {"name": "find", "arguments": {"what": "hat"}}
    assert extra(message)["tool_calls"] == [{"type": "function", "id": "c1", "function": call}]


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ({"name": "f", "arguments": {"x": None, "y": 1}}, {"x": None, "y": 1}),
        ({"name": "f", "arguments": "not json"}, "not json"),
        ({"name": "f", "arguments": "[1]"}, "[1]"),
        (json.dumps({"name": "f", "arguments": {}}), {}),
        ({"function": json.dumps({"name": "f", "arguments": "{}"})}, {}),
    ],
)
def test_calls_in_every_form(tmp_path, call, arguments):
    chosen = {"role": "assistant", "content": "x", "tool_calls": [call]}
    (group,) = read(tmp_path, {"prompt": [user("q")], **ANSWERS, "chosen": [chosen]}).groups
    (found,) = extra(group.responses[0][0])["tool_calls"]
    assert found == {"type": "function", "function": {"name": "f", "arguments": arguments}}


def test_old_function_calls_are_tool_calls(tmp_path):
    chosen = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    (group,) = read(tmp_path, {"prompt": [user("q")], **ANSWERS, "chosen": [chosen]}).groups
    assert extra(group.responses[0][0])["tool_calls"][0]["function"]["name"] == "find"


def test_answers_may_differ_in_their_calls_or_thoughts_alone(tmp_path):
    row = {
        "prompt": [user("q")],
        "chosen": [{**assistant("a"), "thinking": "one"}],
        "rejected": [{**assistant("a"), "thinking": "two"}],
    }
    (group,) = read(tmp_path, row).groups
    assert group.responses[0] != group.responses[1]


@pytest.mark.parametrize("key", ["images", "audio", "documents", "context", "text"])
def test_keys_of_messages_that_are_for_the_model_are_refused(tmp_path, key):
    row = {"prompt": [{**user("q"), key: ["x.png"]}], **ANSWERS}
    rows = read(tmp_path, *[{"prompt": [user("q")], **ANSWERS}] * 9, row)
    assert [bad.field for bad in rows.bad] == [f"prompt[0].{key}"]
    assert f"'data.ignore_fields=[messages.{key}]'" in rows.bad[0].problem
    assert read(tmp_path, row, ignore=[f"messages.{key}"]).bad == []


def test_other_keys_of_messages_are_named_and_a_name_can_be_left_out(tmp_path):
    row = {"prompt": [{**user("q"), "id": "7", "name": "bob"}], **ANSWERS}
    rows = read(tmp_path, row)
    assert rows.unread == {"messages.id"}
    assert extra(rows.groups[0].prompt[0]) == {"name": "bob"}
    left = read(tmp_path, row, ignore=["messages.id", "messages.name"])
    assert (left.notes, left.groups[0].prompt) == ([], (Message("user", "q"),))


def test_roles_that_people_write_are_read_and_said(tmp_path):
    prompt = [{"role": "developer", "content": "s"}, {"role": "Human", "content": "q"}]
    chosen = [{"role": "model", "content": "a"}]
    rows = read(tmp_path, *[{"prompt": prompt, **ANSWERS, "chosen": chosen}] * 2)
    assert [m.role for m in rows.groups[0].prompt] == ["system", "user"]
    assert rows.groups[0].responses[0][0].role == "assistant"
    said = "\n".join(rows.notes)
    for role, known in (("developer", "system"), ("Human", "user"), ("model", "assistant")):
        assert f"the role '{role}' is read as '{known}' (2 messages)" in said


def test_a_role_that_nobody_knows_is_kept(tmp_path):
    prompt = [user("q"), {"role": "critic", "content": "hm"}]
    (group,) = read(tmp_path, {"prompt": prompt, **ANSWERS}).groups
    assert group.prompt[1].role == "critic"


def test_parts_of_a_content_are_joined_and_images_refused_by_name(tmp_path):
    parts = [{"type": "text", "text": "Look: "}, {"type": "text", "text": "here"}]
    (group,) = read(tmp_path, {"prompt": [user(parts)], **ANSWERS}).groups
    assert group.prompt == (Message("user", "Look: here"),)
    image = [*parts, {"type": "image_url", "image_url": {"url": "x"}}]
    (bad,) = read(tmp_path, {"prompt": [user(image)], **ANSWERS}).bad
    assert bad.field == "prompt[0].content[2]"
    assert bad.problem.startswith("a part of type 'image_url'")


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_messages_written_as_text_are_read(tmp_path, write):
    chosen, rejected = [user("q"), assistant("it's a")], [user("q"), assistant("b")]
    rows = read_lines(tmp_path, {"chosen": write(chosen), "rejected": write(rejected)})
    assert rows.groups[0].prompt == (Message("user", "q"),)
    assert any("messages were written as text" in note for note in rows.notes)


def test_a_text_that_only_looks_like_messages_is_refused(tmp_path):
    (bad,) = read_lines(tmp_path, {**GOOD, "chosen": "[{'role': 'user' 'content'}"}).bad
    assert (bad.field, "looks like messages" in bad.problem) == ("chosen", True)
    for text in ("{role}: x", '{"role": "admin"}', '[{"role": "admin", "age": 3}]'):
        (group,) = read_lines(tmp_path, {**GOOD, "chosen": text}).groups
        assert group.responses[0] == text


def test_unequal_conversations_name_the_message(tmp_path):
    row = {"chosen": [user("q"), assistant("a")], "rejected": [user("q!"), assistant("b")]}
    (bad,) = read_lines(tmp_path, row).bad
    assert bad.problem == (
        "no prompt: the conversations have no common beginning: in chosen[0] 'user' says 'q', and "
        "in rejected[0] 'user' says 'q!'"
    )


# --------------------------------------------------------------------------------------- implicit


@pytest.mark.parametrize("column", ["question", "instruction", "query", "promt", "frage", "post"])
def test_no_prompt_is_made_beside_a_column_that_may_be_it(tmp_path, column):
    row = {column: "Tell me about a red hat.", "chosen": "The hat is red", "rejected": "The hat is"}
    with pytest.raises(UserError, match=f"'{column}' may be it") as error:
        read(tmp_path, row)
    assert f"'data.columns={{prompt: {column}}}'" in str(error.value)
    assert read(tmp_path, row, columns={"prompt": column}).groups[0].prompt == row[column]
    assert read(tmp_path, row, ignore=[column]).groups[0].prompt == "The hat is"


def test_a_name_of_one_word_is_no_prompt(tmp_path):
    row = {"source": "web", "chosen": "The hat is red", "rejected": "The hat is blue"}
    assert read(tmp_path, row).groups[0].prompt == "The hat is"


def test_a_column_that_repeats_the_conversation_is_no_other_prompt(tmp_path):
    chosen, rejected = [user("q"), assistant("a")], [user("q"), assistant("b")]
    row = {"messages": chosen, "chosen": chosen, "rejected": rejected}
    assert read(tmp_path, row).groups[0].prompt == (Message("user", "q"),)


# ----------------------------------------------------------------------------------------- tables


def test_nulls_that_a_table_adds_are_taken_out(tmp_path):
    calls = [{"name": "f", "arguments": {"x": "1", "y": None}, "id": None}]
    chosen = [{"role": "assistant", "content": None, "tool_calls": calls}]
    rejected = [{"role": "assistant", "content": "b", "tool_calls": None}]
    tools = [{"type": "function", "function": {"name": "f", "description": None}}]
    columns = {"prompt": ["q"], "chosen": [chosen], "rejected": [rejected], "tools": [tools]}
    (group,) = read_table(tmp_path, columns).groups
    assert extra(group.responses[0][0])["tool_calls"] == [
        {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
    ]
    assert group.responses[1][0].extra == ""
    assert json.loads(group.tools) == [{"type": "function", "function": {"name": "f"}}]


def test_images_of_a_table_are_refused_and_its_other_columns_named(tmp_path):
    good = {name: [text] * 2 for name, text in GOOD.items()}
    with pytest.raises(UserError, match=r"'images' may be for the model and is not used \(1 of 2"):
        read_table(tmp_path, {**good, "images": [[{"bytes": b"\xff"}], []]})
    rows = read_table(tmp_path, {**good, "images": [[], None], "rating": [1, 2]})
    assert (len(rows.groups), rows.unread) == (2, {"rating"})


def test_a_table_without_a_prompt_is_searched_for_it(tmp_path):
    columns = {"frage": ["Wo ist es?"], "chosen": ["Es ist da"], "rejected": ["Es ist weg"]}
    with pytest.raises(UserError, match="'frage' may be it"):
        read_table(tmp_path, columns)
