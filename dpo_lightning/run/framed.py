"""Frame of a command that computes: its help, its answer alone on stdout, and files of it."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.files import finite, write_json
from dpo_lightning.run.folder import disk_fault
from dpo_lightning.run.opened import Opened
from dpo_lightning.settings.program import typed


def said_help(argv: Sequence[str], text: str, command: str, **others: str) -> bool:
    """Prints a command's help if it is asked for; True if it was.

    Args:
        argv: The words behind the command's name.
        text: The help, with ``{program}`` for the command as it is typed.
        command: Its name.
        **others: Names of commands that the text tells of, by their own names in it.
    """
    if not {"-h", "--help"} & {*argv}:
        return False
    programs = {name: " ".join(typed(own)) for name, own in others.items()}
    print(text.format(program=" ".join(typed(command)), **programs))
    return True


def answer_alone() -> contextlib.AbstractContextManager[Any]:
    """Context in which what libraries and settings say goes to stderr, as it is not the answer."""
    return contextlib.redirect_stdout(sys.stderr)


def print_answer(
    found: Mapping[str, Any], *, as_json: bool, show: Callable[[Mapping[str, Any]], object]
) -> None:
    """Prints an answer as one object, or as a person reads it.

    Args:
        found: The answer.
        as_json: True for the object.
        show: Prints it for a person.
    """
    if as_json:
        print(json.dumps(finite(found), indent=2, allow_nan=False))
    else:
        show(found)


def check_output(path: Path, opened: Opened, *, flag: str = "--output") -> None:
    """Refuses a file that could not be written, or that would change a run's folder.

    Args:
        path: The file.
        opened: The policy.
        flag: The flag that named it.

    Raises:
        UserError: If it is such a one.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{flag} {path}: needs a file in a folder that is there")
    folder = opened.run or Path(opened.weights or "")
    if folder.is_dir() and folder.resolve() in path.resolve().parents:
        raise UserError(
            f"{flag} {path}: nothing is written into the folder of what is evaluated; name a file "
            "outside of it"
        )


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Context in which files of the user's are written.

    Args:
        path: The file, for errors that name none.

    Raises:
        UserError: If one cannot be written.
    """
    try:
        yield
    except OSError as error:
        where = error.filename or path
        raise UserError(disk_fault(error) or f"{where}: {error.strerror or error}") from error


def write_answer(path: Path, found: Mapping[str, Any]) -> None:
    """Writes an answer to a file of the user's, whole or not at all.

    Raises:
        UserError: If it cannot be written.
    """
    with writing(path):
        write_json(path, found)
