"""The chat template of a run: its options, its notes, its line in the header."""

import pytest

from dpo_lightning.data.records import Message, PreferenceGroup, Rows
from dpo_lightning.errors import UserError
from dpo_lightning.run.chat import choose_template
from dpo_lightning.run.inputs import SourceRows
from dpo_lightning.settings.schema import DataConfig
from tests.support.conversations import chat_tokenizer, trl_template

DATED = "{{ strftime_now('%d %b') }}{% for m in messages %}{{ m.content }}{% endfor %}"


def rows(*, messages):
    prompt = (Message("user", "hi"),) if messages else "hi"
    group = PreferenceGroup(prompt, ("yes", "no"), (1, 2), 1.0, None, "rows.jsonl:1")
    return SourceRows(Rows([group], [], 1, []), None)


def choose(template, *, messages=True, **settings):
    tokenizer = chat_tokenizer(template if "{" in template else trl_template(template))
    return choose_template(tokenizer, rows(messages=messages), DataConfig(**settings))


def test_options_are_in_force_and_in_the_identity():
    chat = choose("qwen3", chat_template_kwargs={"enable_thinking": False})
    assert chat.options.kwargs == {"enable_thinking": False}
    assert chat.identity() == {"data.chat_template_kwargs": {"enable_thinking": False}}
    assert chat.notes == ()
    assert chat.line({"assistant\n": 3}) == (
        r"a scored answer begins behind 'assistant\n'; options: enable_thinking=False"
    )


def test_the_day_is_said_and_in_the_identity():
    chat = choose(DATED, template_date="2020-02-02")
    assert chat.options.date == "2020-02-02"
    assert chat.identity()["data.template_date"] == "2020-02-02"
    [note] = chat.notes
    assert "data.template_date=2020-02-02" in note
    assert chat.line({"": 1}) == (
        "a scored answer begins behind the answer that the prompt has begun; options: "
        "data.template_date=2020-02-02"
    )


def test_a_date_that_an_option_gives_is_not_said():
    given = {"date_string": "1 May 2020"}
    assert choose("llama3_2", chat_template_kwargs=given).notes == ()
    assert len(choose("llama3_2").notes) == 1


def test_the_line_says_how_many_rows_begin_so():
    line = choose("qwen3").line({"a": 3, "b": 1})
    assert line == "a scored answer begins behind 'a' in 3 of 4 rows; options: none"


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"enable_thinkin": False},
            "data.chat_template_kwargs.enable_thinkin: the chat template reads no such variable; "
            "it reads enable_thinking",
        ),
        (
            {"messages": []},
            "data.chat_template_kwargs.messages: comes from the rows or from the program, not from "
            "settings; leave it out",
        ),
    ],
)
def test_an_option_that_does_nothing_is_refused(kwargs, message):
    with pytest.raises(UserError) as caught:
        choose("qwen3", chat_template_kwargs=kwargs)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        ("{% for m in messages %}", "is no Jinja template"),
        ("{{ ['a', 'b'] | random }}", "draws at random (random)"),
        ("{{ lipsum() }}", "draws at random (lipsum)"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(template, fault):
    with pytest.raises(UserError) as caught:
        choose(template)
    assert fault in str(caught.value)
    assert "data.chat_template=" in str(caught.value)


def test_strings_beside_a_template_are_said_once():
    [note] = choose("qwen3", messages=False).notes
    assert note.startswith("the rows are plain strings, trained on as they are: the model's ")
    assert '[{"role": "user", "content": "..."}]' in note
    [note] = choose("qwen3", messages=False, chat_template=DATED).notes
    assert "data.chat_template is not used" in note
    with pytest.raises(UserError, match="plain strings"):
        choose("qwen3", messages=False, chat_template_kwargs={"enable_thinking": False})


def test_strings_and_no_template_need_no_word():
    tokenizer = chat_tokenizer(None)
    assert choose_template(tokenizer, rows(messages=False), DataConfig()) is None
