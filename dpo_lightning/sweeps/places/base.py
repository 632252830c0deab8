"""Interface between the dispatcher of a sweep and the places where trials run.

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
    """Devices and machines that a trial asks for.

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
    """The end of an attempt.

    Attributes:
        exit_code: Of the trial's process, negative for a signal; None when it just vanished.
        reason: Reason why it vanished.
        final: True if somebody meant it, so that it is not started again.
    """

    exit_code: int | None
    reason: str | None = None
    final: bool = False


class Attempt(Protocol):
    """One start of a trial, which its place may repeat by itself."""

    @property
    def labels(self) -> list[str]:
        """Labels for a reader of the places where it runs, or waits to run."""

    def starts(self) -> int:
        """Number of times its process was started so far; 0 while it waits in a queue."""

    def ending(self) -> Ending | None:
        """Its end; None while it runs or waits."""

    def ask(self) -> None:
        """Asks the trial to end, as Ctrl-C does."""

    def kill(self) -> Ending:
        """Kills the trial now."""


class Place(Protocol):
    """A site that is open and starts trials."""

    @property
    def grace_seconds(self) -> float:
        """Seconds that trials may take to end after they were asked to."""

    def fits(self, trial: Trial) -> bool:
        """True if the place would start the trial now."""

    def find(self, trial: Trial) -> Attempt | None:
        """Finds an earlier command's attempt at the trial that is still under way."""

    def start(self, trial: Trial) -> Attempt:
        """Starts a trial whose folder is there."""


@dataclass(frozen=True, slots=True)
class Work:
    """Work of a place: the trials of one sweep.

    Attributes:
        plans: The trials as they were composed.
        folder: The sweep's folder.
        program: What follows the interpreter, ``-m dpo_lightning train``.
        environment: Added to every trial's environment.
        before: Number of trials in earlier batches of the sweep.
    """

    plans: Sequence[Plan]
    folder: Path
    program: Sequence[str]
    environment: Mapping[str, str]
    before: int = 0


class Site(Protocol):
    """A kind of place, described by ``hydra.launcher`` and not open yet."""

    @property
    def max_failures(self) -> int | None:
        """Number of failed trials after which no other is started; None: all are."""

    @property
    def retries(self) -> int:
        """Number of times that a trial that crashed is started again."""

    def check(self) -> None:
        """Raises a ``UserError`` if the launcher's own settings are wrong."""

    def check_trials(self, demands: Sequence[Demand]) -> None:
        """Raises a ``UserError`` if a trial never fits, or nothing can be started here."""

    def kind(self, accelerator: str) -> DeviceKind:
        """The kind of device that ``trainer.accelerator`` means there."""

    def open(self, work: Work) -> AbstractContextManager[Place]:
        """Opens the site for the time of a sweep."""


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
            raise UserError(f"hydra.launcher.{name}={value}: must be a whole number >= {bound}")


def check_texts(options: Mapping[str, Any], names: Iterable[str]) -> None:
    """Checks settings of a launcher that name something: null, or a text with no line break.

    Raises:
        UserError: Naming the first that is wrong.
    """
    for name in names:
        value = options[name]
        if value is not None and (not value.strip() or len(value.splitlines()) > 1):
            raise UserError(f"hydra.launcher.{name}={value!r}: must be a name, or null for none")


def require_extra(package: str, extra: str, key: str) -> None:
    """Checks that an optional package is installed; it is not imported for it.

    Raises:
        UserError: If it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise UserError(f'{key}: needs {package}: pip install "dpo-lightning[{extra}]"')
