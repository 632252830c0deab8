"""Words of the command ``generate`` as plain values, checked. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dpo_lightning.data.questions import FORMATS, Format
from dpo_lightning.errors import UserError
from dpo_lightning.run.answering.subject import OF_ANSWERS
from dpo_lightning.run.words import Grammar, Words, read_words
from dpo_lightning.settings.fields import LARGEST_SEED
from dpo_lightning.settings.program import typed

LONGEST = {"jsonl": 256, "alpaca_eval": 2048, "arena_hard": 4096}
"""Tokens of the longest answer where none are typed: what a format's judge expects to see whole."""

GRAMMAR = Grammar(
    "generate",
    flags=(
        *("--format", "--output", "--name", "--prompts", "--reference"),
        *("--temperature", "--top-p", "--max-new-tokens", "--seed", "--at-beta", "at_beta"),
    ),
    switches=("--json", "--overwrite"),
    settings=OF_ANSWERS,
)


@dataclass(frozen=True, slots=True)
class Draws:
    """How answers are drawn.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: Share of the distribution that is drawn from.
        max_new_tokens: Longest answer.
        seed: Of all draws.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


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
        form=cast(Format, form),
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


def read_draws(words: Words, longest: int) -> Draws:
    """How answers are drawn, by their flags.

    Args:
        words: The words of a command line.
        longest: Longest answer where none is typed.

    Raises:
        UserError: If a value is none.
    """
    return Draws(
        temperature=_number(words, "--temperature", 1.0, lambda x: x >= 0, "at least 0"),
        top_p=_number(words, "--top-p", 1.0, lambda x: 0 < x <= 1, "above 0 and at most 1"),
        max_new_tokens=int(
            _number(words, "--max-new-tokens", longest, _counts, "a whole number of at least 1")
        ),
        seed=int(
            _number(
                words,
                "--seed",
                1,
                lambda x: x == int(x) and 0 <= x <= LARGEST_SEED,
                f"a whole number from 0 to {LARGEST_SEED}",
            )
        ),
    )


def read_at_beta(words: Words) -> float | None:
    """The beta that is asked for, by either of its names.

    Raises:
        UserError: If it is none, or both are typed.
    """
    one, other = words.one("--at-beta"), words.one("at_beta")
    if one is not None and other is not None:
        raise UserError(f"--at-beta {one}: at_beta={other} is the same; give one of the two")
    flag = "--at-beta" if one is not None else "at_beta"
    if words.one(flag) is None:
        return None
    return _number(words, flag, 0, lambda x: x > 0, "above 0")


def _counts(value: float) -> bool:
    return value == int(value) and value >= 1


def _number(
    words: Words, flag: str, default: float, fits: Callable[[float], Any], expected: str
) -> float:
    text = words.one(flag)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not fits(value):
        raise UserError(f"{flag} {text[:40]}: it must be a number {expected}")
    return value
