"""Rows through chat templates: all of each is in the text, or the row is named with the field."""

import json

import pytest

from dpo_lightning.data.conversations import FaultyRow
from dpo_lightning.data.records import Message, PreferenceGroup
from dpo_lightning.data.rendering import Renderer
from dpo_lightning.data.templates import TemplateOptions
from tests.support.conversations import a_call, chat_tokenizer, message, trl_template

USER = (Message("user", "hello?"),)
CALLS = [a_call("find_thing", '{"what": "a red hat", "n": 3}')]
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "find_thing",
                "description": "Finds things.",
                "parameters": {
                    "type": "object",
                    "properties": {"what": {"type": "string", "description": "the thing"}},
                    "required": ["what"],
                },
            },
        }
    ]
)
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def row(prompt, chosen, rejected, *, tools="", kwargs=""):
    def as_messages(text):
        return text if isinstance(text, tuple) else (Message("assistant", text),)

    responses = (as_messages(chosen), as_messages(rejected))
    return PreferenceGroup(prompt, responses, (1, 2), 1.0, None, "rows.jsonl:7", tools, kwargs)


def render(template, group, **options):
    text = template if "{" in template else trl_template(template)
    return Renderer(chat_tokenizer(text), TemplateOptions(**options)).render(group)


def scored(rendered):
    """The prompt, and each response as it is scored."""
    prompt, *texts = rendered.texts
    assert all(text.startswith(prompt) for text in texts)
    return prompt, [text[len(prompt) :] for text in texts]


def fault(template, group, **options):
    with pytest.raises(FaultyRow) as caught:
        render(template, group, **options)
    return caught.value.fault


# Where a response begins --------------------------------------------------------------------------


def test_an_empty_thought_of_the_template_is_the_prompts():
    prompt, responses = scored(render("qwen3", row(USER, " yes", "no")))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert responses == [" yes<|im_end|>\n", "no<|im_end|>\n"]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "text"])
def test_a_thought_of_the_row_is_scored(key):
    if key == "text":
        answers = [Message("assistant", f"<think>\n{t}\n</think>\n\nyes") for t in ("hm", "oh")]
    else:
        answers = [message("assistant", "yes", **{key: thought}) for thought in ("hm", "oh")]
    prompt, responses = scored(render("qwen3", row(USER, (answers[0],), (answers[1],))))
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")
    assert responses == [f"{t}\n</think>\n\nyes<|im_end|>\n" for t in ("hm", "oh")]


def test_beside_a_thought_the_missing_one_of_a_sibling_is_scored():
    thinks = (message("assistant", "yes", reasoning_content="hm"),)
    prompt, responses = scored(render("qwen3", row(USER, thinks, "no")))
    assert prompt.endswith("<think>\n")
    assert responses == ["hm\n</think>\n\nyes<|im_end|>\n", "\n</think>\n\nno<|im_end|>\n"]


def test_a_tag_of_the_row_is_its_own_where_the_template_knows_none():
    texts = [f"<think>{thought}</think>yes" for thought in ("hm", "oh")]
    prompt, responses = scored(render(CHATML, row(USER, *texts)))
    assert prompt == "<|user|>hello?<|end|><|assistant|>"
    assert responses == [f"{text}<|end|>" for text in texts]


def test_the_beginning_of_a_call_is_scored():
    calls = [(message("assistant", "", tool_calls=[a_call("go", {"to": to})]),) for to in "ab"]
    prompt, responses = scored(render("qwen3", row(USER, *calls)))
    assert prompt.endswith("</think>\n\n")
    assert responses[0].startswith('<tool_call>\n{"name": "go", "arguments": {"to": "a"}}')


@pytest.mark.parametrize(
    ("template", "lead"),
    [("qwen3", "assistant\n<think>\n\n</think>\n\n"), (CHATML, "<|assistant|>")],
)
def test_an_answer_that_the_prompt_begins_is_continued(template, lead):
    prompt, responses = scored(
        render(template, row((*USER, Message("assistant", "Once upon")), " a time", "!"))
    )
    assert prompt.endswith(f"{lead}Once upon")
    assert prompt.count("Once upon") == 1
    assert [text.partition("<|")[0] for text in responses] == [" a time", "!"]


def test_a_response_that_starts_like_its_sibling_keeps_its_own_text():
    prompt, responses = scored(render(CHATML, row(USER, "yes, sir", "yes, madam")))
    assert prompt.endswith("<|assistant|>")
    assert responses == ["yes, sir<|end|>", "yes, madam<|end|>"]


def test_a_space_of_its_own_stays_where_whitespace_of_the_prompt_changes():
    """The first row gives the shape; in the second a user's text loses the space at its end."""
    template = CHATML.replace("{{ m.content }}", "{{ m.content.replace(' ,', ',') }}")
    renderer = Renderer(chat_tokenizer(template), TemplateOptions())
    renderer.render(row(USER, " yes", "no"))
    prompt, responses = scored(renderer.render(row((Message("user", "a , b"),), " yes", " no")))
    assert prompt == "<|user|>a, b<|end|><|assistant|>"
    assert responses == [" yes<|end|>", " no<|end|>"]


# What is left out ---------------------------------------------------------------------------------


def test_a_role_that_the_template_does_not_know():
    found = fault("qwen2_5", row((Message("developer", "Be kind."), *USER), "yes", "no"))
    assert found.field == "prompt[0].content"
    assert found.problem == (
        "the chat template leaves out 'Be kind.' ('content' of the role 'developer')"
    )


@pytest.mark.parametrize("text", ["a", "hello?"])
def test_a_letter_and_a_second_copy_are_missed(text):
    """The letter stands in the template's own text, the copy in the user's turn."""
    template = (
        "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    )
    found = fault(template, row((Message("system", text), *USER), "yes", "no"))
    assert (found.field, repr(text) in found.problem) == ("prompt[0].content", True)
    assert render(CHATML, row((Message("system", text), *USER), "yes", "no"))


def test_a_template_that_cuts_a_text_short():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content[:5] }}\n{% endfor %}"
    assert render(template, row((Message("user", "hi"),), "yes", "no"))
    found = fault(template, row((Message("user", "hi there"),), "yes", "no"))
    assert found.field == "prompt[0].content"
    found = fault(template, row((Message("user", "hi"),), "yes", "never ever"))
    assert found.field == "rejected[0].content"


@pytest.mark.parametrize("change", ["trim", "upper", "replace('\\n\\n', '\\n')", "lower"])
def test_whitespace_may_change_and_nothing_else(change):
    template = (
        "{% for m in messages %}" + f"{{{{ m.role | {change} }}}}: {{{{ m.content | {change} }}}}|"
    )
    group = row((Message("user", " One\n\nTwo "),), " Yes\n", "\nNo")
    if change in ("upper", "lower"):
        assert fault(template + "{% endfor %}", group).field == "prompt[0].content"
    else:
        assert render(template + "{% endfor %}", group)


def test_a_later_row_of_the_same_shape_is_looked_at_too():
    renderer = Renderer(
        chat_tokenizer(
            "{% for m in messages %}[{{ m.role }}]"
            "{{ m.content if 'secret' not in m.content else 'x' }}{% endfor %}"
        ),
        TemplateOptions(),
    )
    renderer.render(row(USER, "yes", "no"))
    with pytest.raises(FaultyRow):
        renderer.render(row((Message("user", "a secret"),), "yes", "no"))
    renderer.render(row(USER, "maybe", "no"))


SENSITIVE = (
    "{% for m in messages if m.role != 'system' %}"
    "{{ '!' if m.content[0] == 'h' else '?' }}{{ m.role }}: {{ m.content }}|{% endfor %}"
)


@pytest.mark.parametrize("text", ["a", "hello?"])
def test_a_template_that_looks_into_texts_hides_nothing_either(text):
    """Marked texts are written otherwise, so that the strings alone are looked for."""
    prompt, responses = scored(render(SENSITIVE, row(USER, "he said yes", "he said no")))
    assert prompt == "!user: hello?|!assistant: "
    assert responses == ["he said yes|", "he said no|"]
    found = fault(SENSITIVE, row((Message("system", text), *USER), "he said yes", "he said no"))
    assert found.field == "prompt[0].content"


def test_texts_with_the_characters_of_marks_are_looked_for_alone():
    odd = "".join(chr(base + 7) for base in (0x100000, 0xF0000))
    prompt, _ = scored(render(CHATML, row((Message("user", odd),), "yes", "no")))
    assert prompt == f"<|user|>{odd}<|end|><|assistant|>"


def test_turns_in_another_order_are_named():
    template = "{% for m in messages|reverse %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    found = fault(template, row((Message("user", "one"),), "yes", "no"))
    assert "behind a later turn" in found.problem


def test_thoughts_of_earlier_turns_are_noted_and_of_the_response_refused():
    early = (*USER, Message("assistant", "<think>\nhm\n</think>\n\nhi"), Message("user", "and?"))
    rendered = render("qwen3", row(early, "yes", "no"))
    assert rendered.left_out == {"<think>"}
    assert "hm" not in rendered.texts[1]
    cut = "<think>\nhm\n</think>\n\nyes"
    found = fault("deepseek_r1_distill", row(USER, cut, "no"))
    assert (found.field, "a thought in" in found.problem) == ("chosen[0].content", True)


def test_a_thought_that_the_template_never_knew_is_no_design():
    early = (*USER, message("assistant", "hi", reasoning_content="hm"), Message("user", "and?"))
    assert render("qwen3", row(early, "yes", "no")).left_out == {"reasoning_content"}
    found = fault("llama3", row(early, "yes", "no"))
    assert found.field == "prompt[1].reasoning_content"
    assert "data.ignore_fields=[messages.reasoning_content]" in found.remedy
    ignored = frozenset({"messages.reasoning_content"})
    assert render("llama3", row(early, "yes", "no"), ignored=ignored)


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "glm4moe", "gptoss"])
def test_tools_and_calls_are_written(name):
    turns = (*USER, message("assistant", "", tool_calls=CALLS), Message("tool", "one hat"))
    rendered = render(name, row(turns, "yes", "no", tools=TOOLS))
    for text in ("find_thing", "Finds things.", "a red hat", "one hat"):
        assert text in rendered.texts[0]


def test_calls_alone_tell_responses_apart():
    answer = (message("assistant", "", tool_calls=CALLS),)
    other = (message("assistant", "", tool_calls=[a_call("find_thing", {"what": "a hat"})]),)
    _, responses = scored(render("qwen3", row(USER, answer, other, tools=TOOLS)))
    assert [("a red hat" in text, "a hat" in text) for text in responses] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize(
    ("template", "group", "field"),
    [
        ("llama3", row(USER, "yes", "no", tools=TOOLS), "tools[0].function.name"),
        (
            "gemma",
            row(USER, (message("assistant", "yes", tool_calls=CALLS),), "no"),
            "chosen[0].tool_calls[0].function.arguments.n",
        ),
        ("qwen3", row((message("user", "hi", name="Ann"),), "yes", "no"), "prompt[0].name"),
    ],
)
def test_a_field_that_the_template_leaves_out_is_named(template, group, field):
    assert fault(template, group).field == field


def test_arguments_count_by_their_value():
    """Text or object, spaced in any way: the template has the last word on how it is written."""
    spaced = a_call("go", '{ "n" :  1,\n"to": "Rome" }')
    for template in ("qwen3", "llama3_1", "qwen3_5_think"):
        texts = [
            render(template, row(USER, (message("assistant", "", tool_calls=[call]),), "no"))
            for call in (spaced, a_call("go", {"to": "Rome", "n": 1}))
        ]
        assert texts[0].texts == texts[1].texts


def test_a_template_that_joins_texts_gets_arguments_as_text():
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %}"
        "{% endfor %}"
    )
    calls = (message("assistant", "", tool_calls=[a_call("go", {"to": "Rome"})]),)
    assert 'go{"to": "Rome"}' in render(template, row(USER, calls, "no")).texts[1]
    # An object would come out as Python writes it.
    bare = template.replace("c.function.name + ", "c.function.name, ")
    assert "{'to'" not in render(bare, row(USER, calls, "no")).texts[1]


def test_the_name_of_a_tools_turn_may_repeat_its_call():
    turns = (*USER, message("assistant", "", tool_calls=CALLS))
    same = message("tool", "one hat", name="find_thing")
    assert render("qwen3", row((*turns, same), "yes", "no"))
    other = message("tool", "one hat", name="look_up")
    assert fault("qwen3", row((*turns, other), "yes", "no")).field == "prompt[2].name"


# Options ------------------------------------------------------------------------------------------

OPTIONS = "{{ mood }}" + CHATML


def test_options_of_a_row_go_over_those_of_the_settings():
    group = row(USER, "yes", "no")
    assert render(OPTIONS, group, kwargs={"mood": "glad"}).texts[0].startswith("glad<|")
    own = row(USER, "yes", "no", kwargs='{"mood": "sad"}')
    assert render(OPTIONS, own, kwargs={"mood": "glad"}).texts[0].startswith("sad<|")


def test_an_option_that_the_template_does_not_read_is_noted():
    group = row(USER, "yes", "no", kwargs='{"mode": 1, "mood": "sad"}')
    assert render(OPTIONS, group).unread == {"mode"}


def test_an_option_that_is_the_programs_is_refused():
    found = fault(OPTIONS, row(USER, "yes", "no", kwargs='{"messages": []}'))
    assert found.field == "chat_template_kwargs.messages"


def test_a_template_is_told_the_day_of_the_settings():
    dated = "{{ strftime_now('%d %b %Y %H:%M') }}" + CHATML
    for day, text in [("2026-01-01", "01 Jan 2026 00:00"), ("1999-12-31", "31 Dec 1999 00:00")]:
        assert render(dated, row(USER, "yes", "no"), date=day).texts[0].startswith(text)
    assert "Today Date: 01 Jan 2026" in render("llama3_2", row(USER, "yes", "no")).texts[0]
