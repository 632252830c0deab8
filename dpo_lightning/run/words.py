"""Words behind a command that looks at trained policies: names, flags, switches and settings.

Of a run nearly all settings are known, and are not to be typed; of a model alone some are needed.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_lightning.errors import UserError
from dpo_lightning.run.opened import Opened, key_of
from dpo_lightning.settings.overrides import with_own_names
from dpo_lightning.settings.program import typed

OF_ROWS = (
    *("data.eval", "data.eval_split", "data.subset", "data.revision", "data.format"),
    *("data.columns", "data.ignore_fields", "data.on_bad_row", "data.max_dropped"),
    "data.threshold",
    *("data.max_length", "data.truncation", "data.chat_template", "data.chat_template_kwargs"),
    "data.template_date",
)
"""Settings of rows that are looked at in the place of a run's own."""

ANYWHERE = (
    *("plugins", "evaluation", "generation", "data.micro_batch_tokens", "reference.cache_dir"),
    *("trainer.accelerator", "trainer.devices", "trainer.precision", "trainer.threads"),
)
"""Settings that may be typed beside any policy."""

OF_A_MODEL = (
    *("beta", "seed", "model.dtype", "model.revision", "model.tokenizer", "reference.revision"),
)
"""Settings that a run has, and a model alone has not."""

_DURING_TRAINING = ("evaluation.every_n_steps", "evaluation.on_start")


@dataclass(frozen=True, slots=True)
class Grammar:
    """Words that a command takes.

    Attributes:
        command: Its name.
        flags: Flags with a value, such as ``--output``.
        switches: Flags without one, such as ``--json``.
        settings: Settings, or sections of them; None: all other words are those of a run.
        others: What is said of all other settings.
    """

    command: str
    flags: Collection[str]
    switches: Collection[str]
    settings: Collection[str] | None
    others: str = "all else is what the run was trained with"

    def takes(self, key: str) -> bool:
        """True for a setting, or one of a section, that the command takes."""
        if self.settings is None:
            return True
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

    def only_name(self, command: str, *, wanted: str = "one policy") -> str:
        """The one name behind a command.

        Args:
            command: The command's name.
            wanted: Words for what has to be named.

        Raises:
            UserError: If there is none, or there are several.
        """
        if len(self.names) == 1:
            return self.names[0]
        said = ", ".join(self.names) or "no folder"
        program = " ".join(typed(command))
        raise UserError(f"{said}: name {wanted}, `{program} outputs/runs/<run>`")


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
    words = iter(with_own_names(argv))
    for word in words:
        name, equals, value = word.partition("=")
        if name in grammar.flags:
            value = value if equals else next(words, "")
            if not value or (not equals and value.startswith("--")):
                raise UserError(f"{name}: needs a value behind it")
            flags[name] = (*flags.get(name, ()), value)
        elif word in grammar.switches:
            switches.add(word)
        elif name in grammar.switches:
            raise UserError(f"{name}: it takes no value; type {name} alone")
        elif grammar.settings is None:
            settings.append(word)
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
    there = ", ".join([*grammar.flags, *grammar.switches, *(grammar.settings or ())])
    raise UserError(f"{key}: `{program}` takes {there}; {grammar.others}")


def check_settings(opened: Opened, settings: Sequence[str]) -> None:
    """Refuses settings that make no sense beside a policy, by name.

    Args:
        opened: The policy.
        settings: As they were typed.

    Raises:
        UserError: If there is one, or rows are needed and not named.
    """
    keys = [key_of(word) for word in settings]
    for key in keys:
        if key in _DURING_TRAINING:
            raise UserError(f"{key}: it is for training, and nothing is trained here; leave it out")
        if opened.run is not None and key in OF_A_MODEL:
            raise UserError(
                f"{key}: it is what {opened.name} was trained with; leave it out, or name "
                f"{opened.adapter or opened.weights} alone with --reference"
            )
        of_rows = any(key == own or key.startswith(f"{own}.") for own in OF_ROWS)
        if of_rows and "data.eval" not in keys:
            raise UserError(
                f"{key}: {opened.name} is measured on the rows that it held out, as it read them; "
                "for others name them with data.eval=<file or hub id>"
            )
    if opened.run is None and "data.eval" not in keys:
        raise UserError(
            f"run={opened.name}: a model alone has no rows of its own; name held-out ones with "
            "data.eval=<file or hub id>"
        )
