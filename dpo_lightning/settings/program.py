"""The words by which a user starts this program, and those by which it starts itself again.

There are three ways: ``python train.py`` in a clone, ``dpo-lightning train`` where the package is
installed, ``python -m dpo_lightning train`` in both. What is shown for typing follows the way that
was taken; runs that the program starts itself always take the third.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from dpo_lightning.settings.schema import IN_CLONE, PACKAGE

STARTED_AS = "DPO_LIGHTNING_STARTED_AS"
"""Environment variable by which the trials of a sweep know how the sweep was started."""

TRIAL = "DPO_LIGHTNING_TRIAL"
"""Environment variable that the trials of a sweep have, which are given all of their settings."""

RUN = ("-m", "dpo_lightning", "train")
"""Words behind the interpreter that start a run, with a clone and without one."""

SOURCE = str(PACKAGE.parent) if IN_CLONE else None
"""From where a clone imports the package, installed or not; None where it is installed alone."""

_WORDS = {
    "clone": ("python", "train.py"),
    "module": ("python", "-m", "dpo_lightning", "train"),
    "command": ("dpo-lightning", "train"),
}

# Commands behind which stand the settings of a run; the others take files and folders first.
_WITH_SETTINGS = ("train", "inspect", "preflight")


def started_as() -> str:
    """The way that was taken: ``clone``, ``module`` or ``command``."""
    given = os.environ.get(STARTED_AS)
    if given in _WORDS:
        return given
    program = Path(sys.argv[0] if sys.argv else "")
    if program.stem == "dpo-lightning":
        return "command"
    if PACKAGE in program.parents or PACKAGE in program.resolve().parents:
        return "module"
    return "clone" if IN_CLONE else "command"


def typed(command: str = "train") -> tuple[str, ...]:
    """The words that start one of the commands, as this user would type them.

    Args:
        command: Its name. ``train.py`` is the command ``train`` alone; the others are reached by
            the module.
    """
    way = started_as()
    if way == "clone" and command != "train":
        way = "module"
    words = _WORDS[way]
    return words if command == "train" else (*words[:-1], command)


def completion() -> str | None:
    """The line that has bash complete this program; None where Hydra's script does not apply."""
    if started_as() == "module":
        return None
    return f'eval "$({" ".join(typed())} -sc install=bash)"'


def completed(line: str, commands: Collection[str]) -> tuple[list[str], str | None]:
    """Completion of a line that begins with the installed program.

    Args:
        line: As far as it is typed, such as ``dpo-lightning train optim``.
        commands: Names of the commands.

    Returns:
        Candidates for the last word; and the line as Hydra completes it, without the command's
        name, or None where it has nothing to say.
    """
    program, _, rest = line.lstrip().partition(" ")
    name, behind, settings = rest.lstrip().partition(" ")
    if not behind:
        return [command for command in commands if command.startswith(name)], None
    return [], f"{program} {settings}" if name in _WITH_SETTINGS else None


def importing(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which another interpreter imports this very package.

    A clone need not be installed. And with ``-m`` Python looks for modules in the folder in which
    it is started before all others, where a user's file may have the name of a library.

    Args:
        environment: To which it is added.
    """
    found = {**environment, "PYTHONSAFEPATH": "1"}
    before = environment.get("PYTHONPATH", "").split(os.pathsep)
    if SOURCE is not None and before[0] != SOURCE:
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (SOURCE, *before)))
    return found
