"""Remedies that a message prints, and the settings of who follows them.

A message names what is wrong first and what to do after it. What to do is read off its words:
settings to type, a setting to leave out, a package to install, ``<...>`` to fill in. A message that
says it in other words needs a row in a table that says what its reader types.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dpo_lightning.settings.keys import is_known

SETTING = re.compile(
    r"""(?<![\w.<=])(?P<key>[a-z][a-z0-9_]*(?:[./][a-z0-9_]+)*)=
    (?P<value><[^>]*>|\[[^\]]*\]|\{[^}]*\}|'[^']*'|"[^"]*"|[^\s;:,)?`]*)""",
    re.VERBOSE,
)
"""A setting inside a sentence."""

CHOICE_KEYS = {
    **{"reference": "kind", "peft": "kind"},
    **dict.fromkeys(("loss", "strategy", "optimizer", "logger", "model", "data"), "name"),
}
"""Key by which the choice of a group is known where there are no groups."""


def settings_in(text: str) -> list[str]:
    """The settings that a sentence names, as they are written in it."""
    return [
        f"{found['key']}={found['value']}"
        for found in SETTING.finditer(text)
        if is_known(found["key"]) or found["key"].startswith(("hydra.", "hydra/"))
    ]


def packages_in(text: str) -> list[str]:
    """Packages that a sentence says to install."""
    return re.findall(r"pip install [\"']?([\w.\[\]-]+)", text)


def advice_of(message: str) -> str:
    """The part of a message that says what to do: all but its first setting and the fault."""
    for sign in ("; ", ": "):
        if sign in message:
            return message.rpartition(sign)[2] if sign == "; " else message.partition(sign)[2]
    return message


def filled(setting: str, fills: Mapping[str, str]) -> list[str]:
    """A setting with something in place of ``<...>`` or of nothing, each alternative apart."""
    key, _, value = setting.partition("=")
    alternatives = re.fullmatch(r"<([\w.-]+(?:\|[\w.-]+)+)>", value)
    if alternatives:
        return [f"{key}={one}" for one in alternatives[1].split("|")]
    if value and "<" not in value:
        return [setting]
    return [f"{key}={fills[key]}"] if key in fills else []


def by_key(setting: str) -> str:
    """The choice of a group as a setting of its key."""
    key, _, value = setting.partition("=")
    return f"{key}.{CHOICE_KEYS[key]}={value}" if key in CHOICE_KEYS else setting


def followed(
    message: str, typed: Sequence[str], *, fills: Mapping[str, str]
) -> list[tuple[str, ...]]:
    """Command lines of those who follow a message, each one of its remedies.

    Args:
        message: One clause.
        typed: The settings that it answers.
        fills: What its reader has for ``<...>``, by key.
    """
    keys = [word.partition("=")[0] for word in typed]
    lines: list[tuple[str, ...]] = []

    def without(*dropped: str) -> list[str]:
        below = tuple(f"{key}." for key in dropped)
        return [
            word
            for word, key in zip(typed, keys, strict=True)
            if key not in dropped and not key.startswith(below)
        ]

    named = [by_key(setting).partition("=")[0] for setting in settings_in(message)]
    faulty = [key for key in dict.fromkeys(named) if key in keys]
    advice = advice_of(message)
    # Settings that are written beside each other are one remedy.
    for written in re.split(r",? or ", advice):
        alternatives = [filled(setting, fills) for setting in settings_in(written)]
        for chosen in itertools.product(*alternatives) if alternatives else ():
            new = [by_key(setting) for setting in chosen]
            gone = [setting.partition("=")[0] for setting in new]
            if unknown := re.match(r"(\S+): unknown key", message):
                gone.append(unknown[1])
            if "instead" in written:
                gone += [key for key in faulty if key not in faulty[:1]]
            if set(new) - set(typed):
                lines.append((*without(*gone), *new))
    if re.search(r"give one of the two|leave one of the two out", message):
        lines += [tuple(without(key)) for key in faulty]
    elif found := re.search(r"leave (\S+) out", message):
        lines.append(tuple(without(faulty[0] if found[1] == "it" else found[1])))
    return list(dict.fromkeys(lines))


@dataclass(frozen=True)
class Case:
    """A line of settings that a message answers.

    Attributes:
        typed: The settings.
        answer: Clauses that answer a line of settings; none where it is right.
        right: The line of a reader whom the message tells in words alone what to do; empty where
            its words hold settings to type, or name one to leave out.
    """

    typed: str
    answer: Callable[[str], list[str]]
    right: str = ""


def faults_of(case: Case, *, fills: Mapping[str, str], deepest: int = 3) -> list[str]:
    """The remedies of a message, and of those that answer it, that do not work; empty if all do.

    A remedy works if none of the clauses that were there before comes back, and at the end of each
    way nothing is left to answer.

    Args:
        case: The first line.
        fills: What its reader has for ``<...>``, by key.
        deepest: Messages after each other that a reader bears.
    """
    wrong: list[str] = []

    def follow(line: str, seen: tuple[str, ...]) -> None:
        clauses = case.answer(line)
        if again := [clause for clause in clauses if clause in seen]:
            wrong.append(f"{line!r} is answered with the same: {again[0]}")
        elif clauses and len(seen) == deepest:
            wrong.append(f"{line!r} is answered still: {clauses[0]}")
        else:
            for clause in clauses:
                lines = followed(clause, line.split(), fills=fills)
                if not lines and not (case.right and not seen):
                    wrong.append(f"{line!r} has no remedy: {clause}")
                for after in lines:
                    follow(" ".join(after), (*seen, clause))

    assert case.answer(case.typed), f"{case.typed!r} is right"
    follow(case.typed, ())
    if case.right and case.answer(case.right):
        wrong.append(f"{case.right!r} is not right: {case.answer(case.right)[0]}")
    return wrong
