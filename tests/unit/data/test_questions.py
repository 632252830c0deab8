"""Prompts to answer: what a format's rows are, what is refused, and their token ids."""

import json
from pathlib import Path

import pytest

from dpo_lightning.data.groups import PreferenceGroup
from dpo_lightning.data.questions import (
    carried_for_the_model,
    encode_questions,
    read_questions,
    typed_question,
)
from dpo_lightning.data.templates import PLAIN_CHAT_TEMPLATE, TemplateOptions
from dpo_lightning.data.texts import Message
from dpo_lightning.data.tokens import tokenize_groups
from dpo_lightning.errors import UserError
from tests.support.models import byte_tokenizer


def write(folder: Path, *rows: object, name: str = "prompts.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_rows_are_read_by_the_names_of_their_format(tmp_path):
    plain = read_questions(write(tmp_path, {"prompt": "a", "id": 3}), "jsonl")
    assert (plain[0].group.prompt, plain[0].row["id"], plain[0].is_text) == ("a", 3, True)
    assert plain[0].place == f"{tmp_path}/prompts.jsonl:1"
    (tmp_path / "set.json").write_text(json.dumps([{"instruction": "b", "output": "x"}]))
    assert read_questions(tmp_path / "set.json", "alpaca_eval")[0].group.prompt == "b"
    new = read_questions(write(tmp_path, {"uid": "u", "prompt": "c"}), "arena_hard")
    assert new[0].group.prompt == "c"
    row = {"question_id": "q", "turns": [{"content": "d"}]}
    assert read_questions(write(tmp_path, row), "arena_hard")[0].group.prompt == "d"


def test_what_the_model_is_given_beside_a_prompt(tmp_path):
    """A system message makes a string the turn of a user, as in training."""
    row = {"prompt": "hi", "system": "be brief", "context": "long", "id": 1}
    [found] = read_questions(write(tmp_path, row), "jsonl")
    assert found.group.prompt == (Message("system", "be brief"), Message("user", "hi"))
    assert carried_for_the_model([found], "jsonl") == ["context"]
    row = {"instruction": "sum", "input": "1 2"}
    [found] = read_questions(write(tmp_path, row), "alpaca_eval")
    assert found.group.prompt == "sum\n1 2"


@pytest.mark.parametrize(
    ("row", "form", "said"),
    [
        ({"text": "a"}, "jsonl", ":1: prompt: missing; the row has"),
        ({"prompt": "a", "response": "b"}, "jsonl", ":1: response: the answer goes there"),
        ({"prompt": 3}, "jsonl", ":1: prompt: "),
        ([1], "jsonl", "expected"),
        ({"prompt": "a"}, "alpaca_eval", ":1: instruction: missing"),
        ({"instruction": [{"role": "user", "content": "a"}]}, "alpaca_eval", "--format jsonl"),
        ({"instruction": "a", "tags": ["b"]}, "alpaca_eval", ":1: tags: "),
        ({"instruction": "a", "output_2": "b"}, "alpaca_eval", ":1: output_2: AlpacaEval gives"),
        ({"prompt": "a"}, "arena_hard", ":1: neither uid nor question_id"),
        ({"uid": "u", "turns": [{}, {}]}, "arena_hard", ":1: turns: "),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, form, said):
    with pytest.raises(UserError) as caught:
        read_questions(write(tmp_path, row), form)
    assert said in str(caught.value)


def test_two_prompts_that_alpaca_eval_takes_for_one_are_refused_until_they_differ(tmp_path):
    rows = [{"instruction": "sum", "input": n} for n in ("1 2", "3 4")]
    with pytest.raises(UserError, match=r":2: instruction: the same as in .*:1, with another"):
        read_questions(write(tmp_path, *rows), "alpaca_eval")
    inside = [{"instruction": f"sum {row['input']}"} for row in rows]
    assert len(read_questions(write(tmp_path, *inside, *inside), "alpaca_eval")) == 4


def test_no_rows_and_no_file(tmp_path):
    with pytest.raises(UserError, match="no prompt in it"):
        read_questions(write(tmp_path), "jsonl")
    with pytest.raises(UserError, match="no such file"):
        read_questions(tmp_path / "absent.jsonl", "jsonl")


def test_ids_are_those_of_a_training_row():
    """The prompt of a row with an answer of its own has the same ids, by template and as text."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    turns = (Message("user", "Why?"), Message("assistant", "So."), Message("user", "Oh"))
    as_rows = [{"role": m.role, "content": m.content} for m in turns]
    asked = [typed_question("Why?", "x"), typed_question(as_rows, "x")]
    trained = [
        PreferenceGroup(prompt, ("Because.", "No."), (1, 2), 1.0, None, "row")
        for prompt in ("Why?", turns)
    ]
    expected = tokenize_groups(trained, tokenizer, max_length=999, truncation="drop").groups
    found = encode_questions(asked, tokenizer, TemplateOptions())
    assert [ids.tolist() for ids in found] == [group.prompt.tolist() for group in expected]
    assert tokenizer.decode(found[1]).endswith("User: Oh\n\nAssistant: ")
    chat = asked[0].as_chat()
    [ids] = encode_questions([chat], tokenizer, TemplateOptions())
    assert tokenizer.decode(ids) == "<s>User: Why?\n\nAssistant: "


def test_a_space_that_joins_a_word_is_the_answers():
    """A tokenizer of words with their space in front: 'Q: ' is Q: and then the answer's ' The'."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["</s>", "Q:", "ĠThe", "ĠI", "Ġ"]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="</s>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split("Ġ", "merged_with_next"),
        ]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    assert fast("Q: ")["input_ids"] == [1, 4]
    assert fast("Q: The")["input_ids"] == [1, 2]
    [ids] = encode_questions([typed_question("Q: ", "x")], fast, TemplateOptions())
    assert ids.tolist() == [1]
