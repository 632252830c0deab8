"""Prompts to answer: files of them in a format's own fields, and their token ids.

A prompt is read and written as that of a training row is: a string as it stands, messages by the
chat template, and what a template writes before an answer's first character belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dpo_lightning.data.fields import FieldAccount, may_be_for_the_model
from dpo_lightning.data.record_files import Record, read_json, read_jsonl
from dpo_lightning.data.rows import PreferenceGroup, RowReader, turned
from dpo_lightning.data.templates import TemplateOptions
from dpo_lightning.data.texts import RowError, describe, list_names
from dpo_lightning.data.tokens import Ids, tokenize_groups
from dpo_lightning.errors import UserError

Format = Literal["jsonl", "alpaca_eval", "arena_hard"]

FORMATS: tuple[Format, ...] = ("jsonl", "alpaca_eval", "arena_hard")

# Fields that decide what the model is given, under the names that they have in every row.
_GIVEN = ("system", "tools", "chat_template_kwargs")
# Stand in the place of the answers that are asked for; both begin as answers do.
_ANSWERS = ("The", "I")
_NO_LIMIT = 1 << 30
# Names that AlpacaEval gives to the two answers of a comparison.
_COMPARED = ("output_1", "output_2")


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt to answer.

    Attributes:
        place: Its row, ``file:line``.
        row: The row as its file has it.
        group: Its prompt and what the template is given, beside answers that stand for none.
    """

    place: str
    row: Mapping[str, Any]
    group: PreferenceGroup

    @property
    def is_text(self) -> bool:
        """True if it goes through no chat template."""
        return isinstance(self.group.prompt, str)

    def as_chat(self) -> Question:
        """The same as one turn of a user."""
        return replace(self, group=turned(self.group)) if self.is_text else self


def read_questions(path: Path, form: Format) -> list[Question]:
    """Reads a file of prompts: JSON lines, or one JSON list.

    Args:
        path: The file.
        form: ``jsonl`` has them as ``prompt``, ``alpaca_eval`` as ``instruction``, ``arena_hard``
            as ``prompt`` beside a ``uid`` or as one of ``turns`` beside a ``question_id``.

    Raises:
        UserError: If it cannot be read, naming the row.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; name one of prompts, a JSON object a line")
    read = read_json if path.suffix == ".json" else read_jsonl
    found = [_question(record, path, form) for record in read(path, str(path))]
    if not found:
        raise UserError(f"{path}: no prompt in it; a line is an object such as {_EXAMPLES[form]}")
    if form == "alpaca_eval":
        _check_told_apart(found)
    return found


def typed_question(prompt: str | Sequence[Mapping[str, str]], place: str) -> Question:
    """A prompt that was typed: a text, or the messages of a conversation.

    Args:
        prompt: The text, or messages of ``role`` and ``content``.
        place: Where it was typed, for errors.

    Raises:
        UserError: If it is not text.
    """
    row = {"prompt": prompt if isinstance(prompt, str) else list(prompt)}
    return _question(Record(1, row), Path(place), "jsonl")


_EXAMPLES: dict[Format, str] = {
    "jsonl": '{"prompt": "..."}',
    "alpaca_eval": '{"instruction": "..."}',
    "arena_hard": '{"uid": "...", "prompt": "..."}',
}


def _question(record: Record, path: Path, form: Format) -> Question:
    place = f"{path}:{record.number}"
    if not isinstance(record.value, dict):
        problem = record.problem or f"{describe(record.value)}, expected an object"
        raise UserError(f"{place}: {problem}; a row is such as {_EXAMPLES[form]}")
    row = record.value
    if form == "jsonl" and "response" in row:
        raise UserError(
            f"{place}: response: the answer goes there, and the row has one already; rename it, "
            "such as to other_response"
        )
    given: dict[str, Any] = {
        "prompt": _prompt(row, place, form),
        "chosen": _ANSWERS[0],
        "rejected": _ANSWERS[1],
        **{name: row[name] for name in _GIVEN if row.get(name) is not None},
    }
    if form == "alpaca_eval":
        _check_flat(row, place)
    columns = {}
    if form == "alpaca_eval" and row.get("input"):
        given["input"], columns = row["input"], {"input": "input"}
    reader = RowReader(columns=columns, null_is_absent=False, account=FieldAccount())
    try:
        return Question(place, row, reader.read(given, place))
    except RowError as error:
        raise UserError(f"{place}: {error.field}: {error.problem}") from error


def _prompt(row: Mapping[str, Any], place: str, form: Format) -> Any:
    """The prompt of a row, by the format's own name for it."""
    key = "instruction" if form == "alpaca_eval" else "prompt"
    if form == "arena_hard" and "uid" not in row and "question_id" not in row:
        raise UserError(
            f"{place}: neither uid nor question_id, by which arena_hard finds an answer; the row "
            f"has {list_names(row)}"
        )
    if form == "arena_hard" and "prompt" not in row and "turns" in row:
        return _only_turn(row["turns"], place)
    if row.get(key) is None:
        raise UserError(
            f"{place}: {key}: missing; the row has {list_names(row)}, and a row of this format is "
            f"such as {_EXAMPLES[form]}"
        )
    return row[key]


def _check_flat(row: Mapping[str, Any], place: str) -> None:
    """Refuses what AlpacaEval's tables cannot hold: it would fail when the answers are drawn."""
    for name, value in row.items():
        if isinstance(value, list | dict):
            raise UserError(
                f"{place}: {name}: {describe(value)}, expected a text or a number, which are all "
                "that AlpacaEval compares rows by; write it as text, leave it out, or answer with "
                "--format jsonl"
            )
        if name in _COMPARED:
            raise UserError(
                f"{place}: {name}: AlpacaEval gives this name to an answer that it compares; "
                "rename it, or leave it out"
            )


def _check_told_apart(questions: Sequence[Question]) -> None:
    """Refuses two prompts that AlpacaEval would take for one: it looks at the instruction alone."""
    seen: dict[str, Question] = {}
    for question in questions:
        first = seen.setdefault(question.row["instruction"], question)
        if (first.row.get("input") or "") != (question.row.get("input") or ""):
            raise UserError(
                f"{question.place}: instruction: the same as in {first.place}, with another "
                "input; AlpacaEval finds answers by the instruction alone: write the input into it"
            )


def _only_turn(turns: object, place: str) -> Any:
    if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict):
        content = turns[0].get("content")
        if isinstance(content, str):
            return content
    raise UserError(f"{place}: turns: {describe(turns)}, expected one turn with a text as content")


def carried_for_the_model(questions: Sequence[Question], form: Format) -> list[str]:
    """Fields that might have been meant for the model, and are carried along alone.

    Args:
        questions: All of them.
        form: Their format.
    """
    used = {*_GIVEN, "prompt", "turns"} if form != "alpaca_eval" else {*_GIVEN, "instruction"}
    used |= {"input"} if form == "alpaca_eval" else set()
    names = {name for question in questions for name in question.row}
    return sorted(name for name in names - used if may_be_for_the_model(name))


# Token ids ---------------------------------------------------------------------------------------


def encode_questions(
    questions: Sequence[Question], tokenizer: Any, options: TemplateOptions
) -> list[Ids]:
    """Token ids of each prompt, as in training.

    Args:
        questions: The prompts.
        tokenizer: A transformers tokenizer, with a chat template where one has messages.
        options: What the template is given beside the rows.

    Raises:
        UserError: If the template does not take a prompt whole, naming its row.
    """
    chats = [question.group for question in questions if not question.is_text]
    result = tokenize_groups(
        chats, tokenizer, max_length=_NO_LIMIT, truncation="drop", options=options
    )
    for number, fault in result.faults.items():
        raise UserError(f"{chats[number].source}: {fault.problem}; {fault.remedy}")
    assert len(result.groups) == len(chats), "the answers that stand for none differ"
    written = iter(result.groups)
    return [
        _text_ids(str(q.group.prompt), tokenizer) if q.is_text else next(written).prompt
        for q in questions
    ]


def _text_ids(text: str, tokenizer: Any) -> Ids:
    """Ids of a prompt that is a string, with what the tokenizer puts in front of a text."""
    ids = _encoded(text, tokenizer)
    if text[-1:].isspace():
        # A space at its end is the answer's where the tokenizer joins it to a word.
        for answer in _ANSWERS:
            other = _encoded(text + answer, tokenizer)
            same = [one == two for one, two in zip(ids, other, strict=False)]
            ids = ids[: same.index(False) if False in same else len(same)]
    if not ids:
        # Some state has to predict the first token.
        bos = tokenizer.bos_token_id
        ids = [tokenizer.eos_token_id if bos is None else bos]
    return np.asarray(ids, dtype=np.int32)


def _encoded(text: str, tokenizer: Any) -> list[int]:
    ids = list(
        tokenizer(text, add_special_tokens=True, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
    )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    if len(ids) > 1 and ids[-1] == eos and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]  # an end that the tokenizer puts behind every text
    return ids
