"""Words behind a command that looks at trained policies: names, flags, switches and settings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_lightning.errors import UserError
from dpo_lightning.run.opened import key_of
from dpo_lightning.settings.program import typed


@dataclass(frozen=True, slots=True)
class Grammar:
    """Words that a command takes.

    Attributes:
        command: Its name.
        flags: Flags with a value, such as ``--output``.
        switches: Flags without one, such as ``--json``.
        settings: Settings, or sections of them.
    """

    command: str
    flags: Collection[str]
    switches: Collection[str]
    settings: Collection[str]

    def takes(self, key: str) -> bool:
        """True for a setting, or one of a section, that the command takes."""
        return any(key == own or key.startswith(f"{own}.") for own in self.settings)


@dataclass(frozen=True, slots=True)
class Words:
    """Words that were typed.

    Attributes:
        names: Those that are neither a flag nor a setting.
        flags: Values of each flag, in their order.
        switches: The switches that are on.
        settings: The settings.
    """

    names: tuple[str, ...]
    flags: dict[str, tuple[str, ...]]
    switches: frozenset[str]
    settings: tuple[str, ...]

    def one(self, flag: str) -> str | None:
        """The value of a flag that counts once; None where it was not typed.

        Raises:
            UserError: If it was typed several times, or without a value.
        """
        found = self.flags.get(flag, ())
        if len(found) > 1:
            raise UserError(f"{flag} {found[-1]}: it is there {len(found)} times; give it once")
        return found[0] if found else None


def read_words(argv: Sequence[str], grammar: Grammar) -> Words:
    """Tells the words of a command line apart, in any order.

    Args:
        argv: The words behind the command's name.
        grammar: What it takes.

    Raises:
        UserError: If a word means nothing, with what there is.
    """
    names: list[str] = []
    settings: list[str] = []
    flags: dict[str, tuple[str, ...]] = {}
    switches: set[str] = set()
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in grammar.flags:
            value = value if equals else next(words, "")
            if not value:
                raise UserError(f"{name}: needs a value behind it")
            flags[name] = (*flags.get(name, ()), value)
        elif word in grammar.switches:
            switches.add(word)
        elif not word.startswith("-") and (not equals or Path(word).is_dir()):
            names.append(word)
        elif grammar.takes(key_of(word)) and equals:
            settings.append(word)
        else:
            _refuse(key_of(word), grammar)
    return Words(tuple(names), flags, frozenset(switches), tuple(settings))


def _refuse(key: str, grammar: Grammar) -> None:
    """Says that a word is not taken.

    Raises:
        UserError: Always.
    """
    program = " ".join(typed(grammar.command))
    there = ", ".join([*grammar.flags, *grammar.switches, *grammar.settings])
    raise UserError(f"{key}: `{program}` takes {there}; all else is what the run was trained with")
