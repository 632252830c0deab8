"""Answers that are judged: of a file of rows, or those that a run drew itself. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.files import json_object, read_json
from dpo_lightning.plugins import Prompt
from dpo_lightning.settings.renamed import present_evaluation

EVALUATION_FILE = "evaluation.json"

_FIELDS = ("prompt", "response", "cut_off")


@dataclass(frozen=True, slots=True)
class Answered:
    """Prompts and an answer to each.

    Attributes:
        prompts: As their rows have them.
        texts: The answers.
        cut_off: True where one was cut off at a limit, None where nobody said.
        notes: What a reader of their marks has to know, a sentence each.
    """

    prompts: list[Prompt]
    texts: list[str]
    cut_off: list[bool | None]
    notes: tuple[str, ...] = ()

    @property
    def owners(self) -> list[str]:
        """The prompt of each answer, as a text that is the same for equal ones."""
        return [json.dumps(prompt, sort_keys=True) for prompt in self.prompts]

    @property
    def share_cut_off(self) -> float | None:
        """Share that was cut off; None where it is not known of all."""
        known = [cut for cut in self.cut_off if cut is not None]
        return sum(known) / len(known) if known and len(known) == len(self.cut_off) else None

    def at(self, places: Sequence[int]) -> Answered:
        """Those at the places, in this order."""
        return Answered(
            [self.prompts[i] for i in places],
            [self.texts[i] for i in places],
            [self.cut_off[i] for i in places],
            self.notes,
        )


def read_answers(path: Path, *, flag: str) -> Answered:
    """Answers of a file, a line of ``{"prompt", "response"}`` for each.

    Args:
        path: The file. A row may have a ``cut_off`` of true or false; other fields are named.
        flag: The flag that named it.

    Raises:
        UserError: If it cannot be read, or a line is no such row.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{flag}={path}: {error.strerror}; name a file of JSON lines") from error
    prompts: list[Prompt] = []
    texts: list[str] = []
    cut_off: list[bool | None] = []
    unread: dict[str, None] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        row = json_object(line)
        if row is None:
            raise UserError(f'{where}: no JSON object; a line is {{"prompt": …, "response": …}}')
        prompts.append(_prompt(row, where))
        texts.append(_text(row, where))
        cut = row.get("cut_off")
        if cut is not None and not isinstance(cut, bool):
            raise UserError(f"{where}: cut_off={cut!r}; it is true, false or left out")
        cut_off.append(cut)
        unread |= dict.fromkeys(name for name in row if name not in _FIELDS)
    if not prompts:
        raise UserError(f"{flag}={path}: it has no answers; each line is one")
    notes = (f"{path}: not read: {', '.join(unread)}",) if unread else ()
    return Answered(prompts, texts, cut_off, notes)


def _prompt(row: Mapping[str, Any], where: str) -> Prompt:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and _is_conversation(prompt):
        return prompt
    raise UserError(
        f"{where}: prompt has to be a text, or a list of messages with role and content"
    )


def _is_conversation(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_message, value))


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), str) for name in ("role", "content")
    )


def _text(row: Mapping[str, Any], where: str) -> str:
    response = row.get("response")
    if isinstance(response, str):
        return response
    raise UserError(f"{where}: response has to be a text")


def answers_of_run(folder: Path) -> tuple[Answered, Answered | None]:
    """The answers that a run drew, and its reference's to the same prompts.

    Args:
        folder: The run's.

    Returns:
        Both; None where the reference drew none, as nothing judged them.

    Raises:
        UserError: If there are none.
    """
    found = present_evaluation(read_json(folder / EVALUATION_FILE))
    rows = found.get("samples")
    samples = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not samples:
        raise UserError(
            f"--answers={folder}: the run drew no answers, or its {EVALUATION_FILE} is gone; "
            "evaluation.samples= draws them"
        )
    # What the row had, where the text of a chat template is not that.
    asked: list[Any] = [row.get("question", row.get("prompt")) for row in samples]
    if not all(isinstance(prompt, str) or _is_conversation(prompt) for prompt in asked):
        raise UserError(
            f"--answers={folder}: prompts in its {EVALUATION_FILE} are damaged; name a file of "
            "JSON lines"
        )
    prompts: list[Prompt] = asked
    unknown: list[bool | None] = [None] * len(samples)
    policy = Answered(prompts, [str(row.get("policy", "")) for row in samples], unknown)
    others = [str(row.get("reference", "")) for row in samples]
    return policy, Answered(prompts, others, unknown) if any(others) else None
