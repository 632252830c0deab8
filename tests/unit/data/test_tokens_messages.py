"""Conversations to token ids are what the chat template renders; so are real rows of all kinds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_lightning.data.records import Message, read_rows
from dpo_lightning.data.templates import PLAIN_CHAT_TEMPLATE
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

USER = (Message("system", "be kind"), Message("user", "hello?"))


def answer(text):
    return (Message("assistant", text),)


@pytest.fixture
def plain_tokenizer():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer, bos_token=BEGIN, eos_token=END
    )
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return tokenizer


def rendered(tokenizer, messages, **kwargs):
    turns = [{"role": m.role, "content": m.content} for m in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, **kwargs)


def up_to_last_eos(ids, eos):
    return ids[: len(ids) - ids[::-1].index(eos)]


def test_the_plain_template_reads_as_a_dialogue(plain_tokenizer):
    text = rendered(plain_tokenizer, (*USER, *answer("hi"), Message("user", "and?")))
    assert text == (
        f"{BEGIN}System: be kind\n\nUser: hello?\n\nAssistant: hi{END}\n\nUser: and?\n\n"
    )
    text = rendered(plain_tokenizer, USER, add_generation_prompt=True)
    assert text == f"{BEGIN}System: be kind\n\nUser: hello?\n\nAssistant:"


@pytest.mark.parametrize(
    "prompt",
    [
        USER,
        (*USER, *answer("hi"), Message("user", "and?")),
    ],
)
def test_messages_by_the_plain_template(plain_tokenizer, prompt):
    ids, responses, result = tokenize_one(
        prompt, answer("yes"), answer("no"), tokenizer=plain_tokenizer
    )
    assert ids.count(plain_tokenizer.bos_token_id) == 1
    # The space is the template's.
    assert plain_tokenizer.decode(ids).endswith("Assistant: ")
    assert [plain_tokenizer.decode(r) for r in responses] == [f"yes{END}", f"no{END}"]
    assert result.notes == []


def test_an_answer_that_the_prompt_begins_is_continued(plain_tokenizer):
    prompt = (*USER, Message("assistant", "Once upon"))
    ids, responses, _ = tokenize_one(
        prompt, answer(" a time"), answer("!"), tokenizer=plain_tokenizer
    )
    assert plain_tokenizer.decode(ids).endswith("User: hello?\n\nAssistant: Once upon")
    assert [plain_tokenizer.decode(r) for r in responses] == [f" a time{END}", f"!{END}"]


def test_a_prompt_of_messages_may_be_answered_by_strings(plain_tokenizer):
    with_strings = tokenize_one(USER, "yes", "no", tokenizer=plain_tokenizer)
    messages = tokenize_one(USER, answer("yes"), answer("no"), tokenizer=plain_tokenizer)
    assert with_strings[:2] == messages[:2]


def test_a_response_of_several_turns_ends_with_the_last_eos(plain_tokenizer):
    long = (*answer("yes"), Message("user", "sure?"), *answer("very"))
    _, [first, second], _ = tokenize_one(USER, long, answer("no"), tokenizer=plain_tokenizer)
    assert plain_tokenizer.decode(first) == (f"yes{END}\n\nUser: sure?\n\nAssistant: very{END}")
    assert plain_tokenizer.decode(second) == f"no{END}"


def test_a_template_without_eos_gets_one(plain_tokenizer):
    plain_tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    ids, responses, _ = tokenize_one(USER, answer("yes"), answer("no"), tokenizer=plain_tokenizer)
    # The template is what decides on BOS, too.
    assert plain_tokenizer.decode(ids) == "[system]be kind[user]hello?[assistant]"
    assert [plain_tokenizer.decode(r) for r in responses] == [f"yes{END}", f"no{END}"]


def test_messages_without_text_are_empty(plain_tokenizer):
    result = tokenize(make_group(USER, answer("yes"), answer(" \n")), tokenizer=plain_tokenizer)
    assert result.dropped == {"empty_response": 1}


def test_strings_and_messages_in_one_chunk(plain_tokenizer):
    result = tokenize(
        make_group("q", "c", "d"),
        make_group(USER, answer("c"), answer("d")),
        make_group("q", "d", "c"),
        tokenizer=plain_tokenizer,
    )
    texts = [plain_tokenizer.decode(group.responses[0]) for group in result.groups]
    assert texts == [f"c{END}", f"c{END}", f"d{END}"]
    assert all(group.prompt[0] == plain_tokenizer.bos_token_id for group in result.groups)


def test_a_template_that_refuses_is_answered_in_one_line(plain_tokenizer):
    plain_tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system\n role') }}{% endif %}"
    )
    group = make_group(USER, answer("yes"), answer("no"))
    result = tokenize(group, tokenizer=plain_tokenizer)
    assert (result.groups, result.dropped) == ([], {"not_rendered": 1})
    [fault] = result.faults.values()
    assert fault.problem == (
        "the chat template refuses a conversation with the roles system, user, assistant: "
        "no system role"
    )
    assert fault.remedy.endswith("data.chat_template=")


@settings(max_examples=examples(60))
@given(
    prompt=st.lists(
        st.tuples(st.sampled_from(["system", "user", "assistant"]), ANY_TEXT),
        min_size=1,
        max_size=4,
    ),
    texts=st.lists(ANY_TEXT.filter(str.strip), min_size=2, max_size=4, unique=True),
)
def test_any_conversation_by_the_plain_template(prompt, texts):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer, bos_token=BEGIN, eos_token=END
    )
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    messages = tuple(Message(role, text) for role, text in prompt)
    ids, responses, _ = tokenize_one(messages, *map(answer, texts), tokenizer=tokenizer)
    for text, response in zip(texts, responses, strict=True):
        *before, last = messages
        if last.role == "assistant":
            conversation = (*before, *answer(last.content + text))
        else:
            conversation = (*messages, *answer(text))
        whole = tokenizer(rendered(tokenizer, conversation), add_special_tokens=False)
        assert ids + response == up_to_last_eos(whole["input_ids"], tokenizer.eos_token_id)


# Real tokenizers and rows -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minimind-tokenizer", "stories260k"])
@pytest.mark.parametrize(
    ("file", "form"), [("openassistant_ranked.jsonl", "auto"), ("sharegpt_dpo.json", "sharegpt")]
)
def test_real_conversations_are_what_the_template_renders(shared, name, file, form):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    rows = read_rows(
        str(shared / "data" / file),
        format=form,
        columns={},
        split=None,
        subset=None,
        revision=None,
    )
    groups = rows.groups[:40]
    result = tokenize(*groups, tokenizer=tokenizer, max_length=1 << 20)
    by_source = {group.source: group for group in result.groups}
    assert len(by_source) + result.dropped.total() == len(groups)
    assert len(by_source) > 30
    eos = tokenizer.eos_token_id
    for group in groups:
        tokens = by_source.get(group.source)
        if tokens is None or len(tokens.responses) < len(group.responses):
            continue
        for messages, ids in zip(group.responses, tokens.responses, strict=True):
            text = rendered(tokenizer, (*group.prompt, *messages))
            whole = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert [*tokens.prompt, *ids] == up_to_last_eos(whole, eos)
            if len(messages) == 1:
                reply = tokenizer.decode(ids, skip_special_tokens=True)
                assert reply.strip() == messages[0].content.strip()


@pytest.mark.parametrize("name", ["minimind-tokenizer", "stories260k"])
def test_real_strings_are_what_the_tokenizer_says(shared, name):
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / name)
    rows = read_rows(
        str(shared / "data" / "politeness.jsonl"),
        format="auto",
        columns={},
        split=None,
        subset=None,
        revision=None,
    )
    groups = rows.groups[:200]
    result = tokenize(*groups, tokenizer=tokenizer, max_length=1 << 20)
    by_source = {group.source: group for group in result.groups}
    assert len(by_source) > 190
    for group in groups:
        if group.source not in by_source:
            assert group.responses[0] == group.responses[1]
            continue
        tokens = by_source[group.source]
        for text, ids in zip(group.responses, tokens.responses, strict=True):
            whole = tokenizer(group.prompt + text)["input_ids"]
            assert [*tokens.prompt, *ids] == [*whole, tokenizer.eos_token_id]
