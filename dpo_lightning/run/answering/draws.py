"""Flags that say how answers are drawn, the same for each command that draws. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.run.words import Words
from dpo_lightning.settings.fields import LARGEST_SEED

DRAW_FLAGS = (*("--temperature", "--top-p", "--max-new-tokens", "--seed", "--at-beta", "at_beta"),)
"""Flags of :func:`read_draws` and :func:`read_at_beta`."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Settings of draws, as they were typed.

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


def read_draws(words: Words, longest: int) -> Draws:
    """The settings of draws, by their flags.

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
