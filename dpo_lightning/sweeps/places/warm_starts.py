"""Warm process of a sweep: its trials on this machine are forks of it. Imports no torch.

It lives as long as the sweep's process, over all batches that a sampler asks for.
"""

from __future__ import annotations

import atexit
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from dpo_lightning.processes.lifeline import DIE_WITH_PARENT
from dpo_lightning.processes.warm import Fork, ForkOrder, WarmProcess, differing

log = logging.getLogger(__name__)

# Whatever a run on this machine imports by itself, in this order.
MODULES = (
    "dpo_lightning.run.before_imports",
    "dpo_lightning.cli",
    "dpo_lightning.run.supervise",
    "dpo_lightning.run.session",
)
# Read when a device is first used, and none is until a trial does.
_READ_LATER = frozenset({"CUDA_VISIBLE_DEVICES"})


class Process(Protocol):
    """A trial's first process, which leads its group."""

    @property
    def group(self) -> int | None:
        """Number of its group; None until it has started."""

    def ended(self) -> bool:
        """True once it has ended, or will not start."""

    @property
    def code(self) -> int | None:
        """Its exit code; None if nobody saw it end."""

    def withdraw(self) -> None:
        """Sees to it that it does not start if it has not yet."""

    def wait(self) -> None:
        """Waits for its end."""


class Spawned:
    """A process that was started by its own command."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.group: int | None = process.pid

    def ended(self) -> bool:
        """True once it has ended, or will not start."""
        return self._process.poll() is not None

    @property
    def code(self) -> int | None:
        """Its exit code; None if nobody saw it end."""
        return self._process.returncode

    def withdraw(self) -> None:
        """Does nothing: it has started."""

    def wait(self) -> None:
        """Waits for its end."""
        self._process.wait()


class Forked:
    """A fork of the warm process; should that end before, a process that is started cold.

    Args:
        fork: What the warm process was asked for.
        spawn: Starts it cold.
    """

    def __init__(self, fork: Fork, spawn: Callable[[], Process]) -> None:
        self._fork = fork
        self._spawn = spawn
        self._cold: Process | None = None
        self._withdrawn = False

    @property
    def group(self) -> int | None:
        """Number of its group; None until it has started."""
        if self._cold is not None:
            return self._cold.group
        self._fork.begun()
        if self._fork.lost and not self._withdrawn:
            self._cold = self._spawn()
            return self._cold.group
        return self._fork.pid

    def ended(self) -> bool:
        """True once it has ended, or will not start."""
        if self.group is None:
            return self._withdrawn
        return self._fork.ended() if self._cold is None else self._cold.ended()

    @property
    def code(self) -> int | None:
        """Its exit code; None if nobody saw it end."""
        return self._fork.returncode if self._cold is None else self._cold.code

    def withdraw(self) -> None:
        """Sees to it that it does not start if it has not yet."""
        if self._cold is None and not self._fork.begun():
            # Before anything else, as a lost one is started cold.
            self._withdrawn = True
            self._fork.withdraw()

    def wait(self) -> None:
        """Waits for its end."""
        if self._cold is None:
            self._fork.wait()
        else:
            self._cold.wait()


class WarmStarts:
    """Forks the trials of a sweep that may start warm.

    Args:
        modules: Modules that they import.
        target: What is called in each, ``module:function``.
    """

    def __init__(
        self, modules: Sequence[str] = MODULES, target: str = "dpo_lightning.__main__:main"
    ) -> None:
        self._modules = modules
        self._target = target
        self._process: WarmProcess | None = None
        self._is_said = False

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        output: int,
        handed: Mapping[str, int],
    ) -> Fork | None:
        """Has a trial forked; returns None where it has to start cold.

        Args:
            arguments: Of its command, behind the interpreter and the name of the program.
            environment: The trial's.
            output: Descriptor of its log.
            handed: Descriptors that it is given, by the variables that name them.
        """
        if sys.platform != "linux" or DIE_WITH_PARENT in environment:
            return None  # its parent would be the warm process
        if self._process is None:
            self._process = _kept(tuple(self._modules), environment)
        process = self._process
        changes = differing(environment, process.environment)
        read_before = changes.keys() - _READ_LATER
        if read_before or not process.usable:
            self._say(process.gone or f"{', '.join(sorted(read_before))} changed meanwhile")
            return None
        order = ForkOrder(
            argv=["", *arguments],
            changes=changes,
            cwd=str(Path.cwd()),
            target=self._target,
            handed=tuple(handed),
        )
        try:
            return process.start(order, [output, output, *handed.values()])
        except OSError:
            return None  # more orders than it has taken so far

    def lost(self) -> None:
        """Notes that a trial that was asked for did not start."""
        if self._process is not None:
            self._say(self._process.gone or "it did not start a trial")

    def _say(self, why: str) -> None:
        """Says once why trials start cold from now on."""
        if not self._is_said:
            self._is_said = True
            log.warning(
                "the process that trials are forked from cannot be used (%s): from now on each "
                "trial imports everything itself, which takes some seconds longer",
                why,
            )


_processes: dict[tuple[str, ...], WarmProcess] = {}


def _kept(modules: tuple[str, ...], environment: Mapping[str, str]) -> WarmProcess:
    """The warm process of this process with such modules and such an environment."""
    found = _processes.get(modules)
    if found is not None:
        same = not differing(environment, found.environment).keys() - _READ_LATER
        if same and found.usable:
            return found
        found.close()
    if not _processes:
        atexit.register(close_all)
    # Of no trial, nor hidden: what opens a device while it is imported shall be seen.
    own = {name: os.environ[name] for name in _READ_LATER if name in os.environ}
    given = {name: value for name, value in environment.items() if name not in _READ_LATER}
    _processes[modules] = WarmProcess(modules, given | own)
    return _processes[modules]


def close_all() -> None:
    """Ends the warm processes of this process."""
    atexit.unregister(close_all)
    while _processes:
        _processes.popitem()[1].close()
