"""Words of the command ``generate`` as plain values, checked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dpo_lightning.data.questions import FORMATS, Format
from dpo_lightning.errors import UserError
from dpo_lightning.run.answering.draws import DRAW_FLAGS, Draws, read_at_beta, read_draws
from dpo_lightning.run.answering.subject import OF_ANSWERS
from dpo_lightning.run.words import Grammar, read_words
from dpo_lightning.settings.program import typed

LONGEST = {"jsonl": 256, "alpaca_eval": 2048, "arena_hard": 4096}
"""Tokens of the longest answer where none are typed: what a format's judge expects to see whole."""

GRAMMAR = Grammar(
    "generate",
    flags=(
        *("--format", "--output", "--name", "--prompts", "--reference"),
        *DRAW_FLAGS,
    ),
    switches=("--json", "--overwrite"),
    settings=OF_ANSWERS,
)


@dataclass(frozen=True, slots=True)
class Request:
    """A command line of ``generate``.

    Attributes:
        name: The policy or the sweep, as it was named.
        prompts: File of prompts.
        form: Format of prompts and answers.
        output: File or folder of the answers; None: one is chosen.
        generator: Name of the policy in the answers; None: its folder's.
        mode: ``chat`` has strings go through the chat template, ``text`` has none; None: by format.
        reference: Model to compare with, if one was named.
        at_beta: Beta of the place on the way that answers; None: the policy does.
        draws: How answers are drawn.
        settings: Settings that were typed.
        as_json: True if one object is printed.
        overwrite: True if files may be replaced.
    """

    name: str
    prompts: Path
    form: Format
    output: Path | None
    generator: str | None
    mode: str | None
    reference: str | None
    at_beta: float | None
    draws: Draws
    settings: tuple[str, ...]
    as_json: bool
    overwrite: bool


def read_request(argv: list[str]) -> Request:
    """The words of a command line.

    Raises:
        UserError: If one means nothing, or has no sensible value.
    """
    words = read_words(argv, GRAMMAR)
    if len(words.names) != 2:
        program = " ".join(typed("generate"))
        said = ", ".join(words.names) or "nothing"
        raise UserError(
            f"{said}: name a policy and a file of prompts, `{program} outputs/runs/<run> "
            "prompts.jsonl`"
        )
    form = words.one("--format") or "jsonl"
    if form not in FORMATS:
        raise UserError(f"--format {form}: it is one of {', '.join(FORMATS)}")
    mode = words.one("--prompts")
    if mode not in (None, "text", "chat"):
        raise UserError(
            f"--prompts {mode}: chat has strings go through the chat template as a user's turn, "
            "text leaves them as they are"
        )
    output = words.one("--output")
    return Request(
        name=words.names[0],
        prompts=Path(words.names[1]),
        form=form,
        output=None if output is None else Path(output),
        generator=words.one("--name"),
        mode=mode,
        reference=words.one("--reference"),
        at_beta=read_at_beta(words),
        draws=read_draws(words, LONGEST[form]),
        settings=words.settings,
        as_json="--json" in words.switches,
        overwrite="--overwrite" in words.switches,
    )
