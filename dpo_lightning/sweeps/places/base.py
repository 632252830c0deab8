"""Where the trials of a sweep run: what the dispatcher asks of a place, whichever it is.

A *site* is what ``hydra.launcher`` describes; nothing has been started there yet. It is opened for
the time of a sweep, as a *place* that starts trials. An *attempt* is one start of one trial.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dpo_lightning.errors import UserError
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.sweeps.trials import Plan, Trial


@dataclass(frozen=True, slots=True)
class Demand:
    """What a trial asks for.

    Attributes:
        accelerator: ``trainer.accelerator``.
        width: Devices of each node.
        nodes: Machines that it runs on at once.
    """

    accelerator: str
    width: int
    nodes: int


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt ended.

    Attributes:
        exit_code: Of the trial's process, negative for a signal; None when it just vanished.
        reason: Why it vanished.
        final: Whether somebody meant it, so that it is not started again.
    """

    exit_code: int | None
    reason: str | None = None
    final: bool = False


class Attempt(Protocol):
    """One start of a trial, which its place may repeat by itself."""

    @property
    def labels(self) -> list[str]:
        """Where it runs, or waits to run, as a reader knows it."""

    def starts(self) -> int:
        """How often its process was started so far; 0 while it waits in a queue."""

    def ending(self) -> Ending | None:
        """How it ended; None while it runs or waits."""

    def ask(self) -> None:
        """Asks it to end, as Ctrl-C does."""

    def kill(self) -> Ending:
        """Ends it now."""


class Place(Protocol):
    """A site that is open: it starts trials."""

    @property
    def grace_seconds(self) -> float:
        """How long trials may take to end after they were asked to."""

    def fits(self, trial: Trial) -> bool:
        """Whether it would start the trial now."""

    def find(self, trial: Trial) -> Attempt | None:
        """An attempt of an earlier command that is still under way."""

    def start(self, trial: Trial) -> Attempt:
        """Starts a trial whose folder is there."""


@dataclass(frozen=True, slots=True)
class Work:
    """What is done at a place.

    Attributes:
        plans: The trials as they were composed.
        folder: The sweep's folder.
        program: What follows the interpreter, ``-m dpo_lightning train``.
        environment: Added to every trial's environment.
    """

    plans: Sequence[Plan]
    folder: Path
    program: Sequence[str]
    environment: Mapping[str, str]


class Site(Protocol):
    """What ``hydra.launcher`` describes."""

    @property
    def max_failures(self) -> int | None:
        """After more failed trials than this no other is started; None: all are."""

    @property
    def retries(self) -> int:
        """How often a trial that crashed is started again."""

    def check(self) -> None:
        """Raises a ``UserError`` if the launcher's own settings are wrong."""

    def check_trials(self, demands: Sequence[Demand]) -> None:
        """Raises a ``UserError`` if a trial never fits, or nothing can be started here."""

    def kind(self, accelerator: str) -> DeviceKind:
        """The kind of device that ``trainer.accelerator`` means there."""

    def open(self, work: Work) -> AbstractContextManager[Place]:
        """Opens it for the time of a sweep."""


def check_counts(options: Mapping[str, Any], least: Mapping[str, float]) -> None:
    """Checks settings of a launcher that count something; null is left open.

    Args:
        options: The settings by name.
        least: The smallest value of each that is checked.

    Raises:
        UserError: Naming the first that is wrong.
    """
    for name, bound in least.items():
        value = options[name]
        if value is not None and value < bound:
            raise UserError(
                f"hydra.launcher.{name}={value}: needs a whole number, at least {bound}"
            )


def check_texts(options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Checks settings of a launcher that name something: null, or a text with no line break.

    Raises:
        UserError: Naming the first that is wrong.
    """
    for name in names:
        value = options[name]
        if value is not None and (not value.strip() or len(value.splitlines()) > 1):
            raise UserError(f"hydra.launcher.{name}={value!r}: needs a name, or null for none")


def require_extra(package: str, extra: str, key: str) -> None:
    """Checks that an optional package is installed; it is not imported for it.

    Raises:
        UserError: If it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f'{key}: needs {package}: pip install "dpo-lightning[{extra}]"')
