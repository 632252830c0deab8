"""The command ``inspect``: its words, and the three forms of its answer."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.plugins import load_plugins
from dpo_lightning.run.framed import answer_alone, print_answer, said_help
from dpo_lightning.run.guard import guarded
from dpo_lightning.run.words import Grammar, read_words
from dpo_lightning.settings.compose import compose_one
from dpo_lightning.settings.credentials import redact
from dpo_lightning.settings.program import typed

_HELP = """\
usage: {program} [--json] [--html FILE] [--group N] [settings of a run]

Looks at the rows of a run before it is started: their forms, what is dropped, duplicates,
identical and contradictory pairs, prompts on both sides of the split, lengths, what truncation
takes; the plan, its memory and its time; and one group token by token. Nothing is trained, and
nothing is written but FILE.

  --json       print one object, and all else on stderr
  --html FILE  write a page beside the answer, which needs nothing but itself
  --group N    show this training group, from 1, in the place of the first of the first step

The settings are those of `{train}`. Exit code 2: they are wrong, or the run would stop for the
rows or the memory; the answer is printed all the same where there is something to look at."""

_GRAMMAR = Grammar("inspect", flags=("--html", "--group"), switches=("--json",), settings=None)
_OUTPUTS = Path("outputs")


@dataclass(frozen=True, slots=True)
class Asked:
    """The words of a command line.

    Attributes:
        settings: Those of a run.
        as_json: True if one object is printed.
        page: File of the page; None for none.
        number: Training group to show; None for any.
    """

    settings: tuple[str, ...]
    as_json: bool
    page: Path | None
    number: int | None


def main(argv: Sequence[str] | None = None) -> int:
    """Shows the rows and the plan of a run.

    Args:
        argv: Flags and settings; None takes the process's own.

    Returns:
        0, or 2 where the settings are wrong or the run would stop.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if said_help(argv, _HELP, "inspect", train="train"):
        return 0
    asked = read_asked(argv)
    with answer_alone():
        found = _inspect(asked)
    # Here, because it takes a moment that a wrong setting need not wait for.
    from dpo_lightning.run.inspect.content import parts_of
    from dpo_lightning.run.inspect.page import write_page
    from dpo_lightning.run.inspect.terminal import show

    if asked.page is not None:
        command = redact(shlex.join([*typed("inspect"), *argv]))
        write_page(asked.page, parts_of(found), command=command)
    print_answer(found, as_json=asked.as_json, show=lambda own: show(parts_of(own)))
    if found["refused"]:
        raise UserError(found["refused"][0])
    return 0


def read_asked(argv: Sequence[str]) -> Asked:
    """The words that were typed, in any order.

    Raises:
        UserError: If a flag has no value, or a wrong one.
    """
    words = read_words(argv, _GRAMMAR)
    page, number = words.one("--html"), words.one("--group")
    if number is not None and not (number.isascii() and number.isdigit() and int(number)):
        raise UserError(f"--group {number}: needs a whole number from 1 on, such as --group 1")
    return Asked(
        words.settings,
        as_json="--json" in words.switches,
        page=None if page is None else Path(page).expanduser(),
        number=None if number is None else int(number),
    )


def _inspect(asked: Asked) -> dict[str, Any]:
    config = compose_one([*asked.settings])
    from dpo_lightning.run.inputs import prefer_cache_without_network
    from dpo_lightning.run.inspect.look import look
    from dpo_lightning.run.inspect.page import check_page

    if asked.page is not None:
        check_page(asked.page)
    load_plugins(config.plugins)
    prefer_cache_without_network(config)
    return look(config, outputs=_OUTPUTS, number=asked.number)


if __name__ == "__main__":
    sys.exit(main())
