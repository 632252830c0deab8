"""The command ``inspect``: its words, and the three forms of its answer."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.files import finite
from dpo_lightning.plugins import load_plugins
from dpo_lightning.run.guard import guarded
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
    if {"-h", "--help"} & {*argv}:
        program, train = " ".join(typed("inspect")), " ".join(typed())
        print(_HELP.format(program=program, train=train))
        return 0
    asked = read_words(argv)
    # What libraries and settings say is not the answer.
    with contextlib.redirect_stdout(sys.stderr):
        found = _inspect(asked)
    # Here, because it takes a moment that a wrong setting need not wait for.
    from dpo_lightning.run.inspect.content import parts_of
    from dpo_lightning.run.inspect.page import write_page
    from dpo_lightning.run.inspect.terminal import show

    if asked.page is not None:
        command = redact(shlex.join([*typed("inspect"), *argv]))
        write_page(asked.page, parts_of(found), command=command)
    if asked.as_json:
        print(json.dumps(finite(found), indent=2, allow_nan=False))
    else:
        show(parts_of(found))
    if found["refused"]:
        raise UserError(found["refused"][0])
    return 0


def read_words(argv: Sequence[str]) -> Asked:
    """The words that were typed, in any order.

    Raises:
        UserError: If a flag has no value, or a wrong one.
    """
    flags: dict[str, str] = {}
    settings: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name in ("--html", "--group"):
            flags[name] = value if equals else next(words, "")
        elif word != "--json":
            settings.append(word)
    page = flags.get("--html")
    if page == "":
        raise UserError("--html: needs the name of a file, such as --html rows.html")
    number = flags.get("--group")
    if number is not None and not (number.isascii() and number.isdigit() and int(number)):
        raise UserError(f"--group {number}: needs a whole number from 1 on, such as --group 1")
    return Asked(
        tuple(settings),
        as_json="--json" in argv,
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
