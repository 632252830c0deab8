"""Runs the trials of a sweep: one process group each, on leased devices. Imports no torch.

A trial is `python train.py …` in Hydra's RUN mode: to Lightning it is an ordinary single run, and
whatever happens to its process happens to it alone. The dispatcher holds one end of a pipe to each
trial; when the dispatcher is gone, however it went, the trials see the pipe close and stop.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dpo_lightning.checkpoints import saved_checkpoints
from dpo_lightning.lifeline import LIFELINE
from dpo_lightning.results import RESULT_FILE
from dpo_lightning.sweeps.leases import DevicePool, Kind, Lease
from dpo_lightning.sweeps.trials import LOG_FILE, Trial, judge

# Exit codes after which the same start would end the same way.
_NOT_RETRIED = (2, 3)
# How long trials may take to end after they were asked to, before they are killed.
_GRACE_SECONDS = 30.0
# How long what a trial started may outlive it.
_ORPHAN_SECONDS = 10.0
_POLL_SECONDS = 0.1


class View(Protocol):
    """Whoever shows the sweep while it runs."""

    def started(self, trial: Trial) -> None:
        """A trial was started."""

    def ended(self, trial: Trial, *, again: bool) -> None:
        """A trial's process ended; ``again`` when it will be started once more."""

    def refresh(self) -> None:
        """Some time passed."""


@dataclass(slots=True)
class _Running:
    trial: Trial
    process: subprocess.Popen[bytes]
    lease: Lease
    since: float


class Dispatcher:
    """Runs trials until all have ended.

    Args:
        trials: In the order in which they are to start; finished ones are passed over.
        pools: The devices, by kind; every trial fits into the pool of its kind.
        script: The program, ``train.py``.
        environment: Added to every trial's environment.
        max_failures: After more failed trials than this no other is started; None: all are.
        retries: How often a trial that crashed is started again.
        view: Whoever shows it.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        *,
        pools: Mapping[Kind, DevicePool],
        script: Path,
        environment: Mapping[str, str],
        max_failures: int | None,
        retries: int,
        view: View,
    ) -> None:
        self._queue = [trial for trial in trials if trial.status == "waiting"]
        self._pools = pools
        self._script = script
        self._environment = environment
        self._max_failures = max_failures
        self._retries = retries
        self._view = view
        self._running: list[_Running] = []
        self._failures = 0

    def run(self) -> None:
        """Runs all; an interrupt stops the running trials first and then goes on its way.

        Raises:
            KeyboardInterrupt: Ctrl-C, when no trial is left.
            SystemExit: SIGTERM, when no trial is left.
        """
        self._lifeline, self._own_end = os.pipe()
        before = signal.signal(signal.SIGTERM, _exit_143)
        try:
            while self._queue or self._running:
                self._start_what_fits()
                self._collect()
                self._view.refresh()
                if self._running:
                    time.sleep(_POLL_SECONDS)
                elif self._gave_up():
                    break
        except BaseException:
            self._stop_all()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)
            os.close(self._lifeline)
            os.close(self._own_end)

    def _gave_up(self) -> bool:
        return self._max_failures is not None and self._failures > self._max_failures

    def _start_what_fits(self) -> None:
        """Starts in order; a wide trial that must wait lets narrower ones pass."""
        if self._gave_up():
            return
        for trial in list(self._queue):
            lease = self._pools[trial.plan.kind].take(trial.plan.width)
            if lease is not None:
                self._queue.remove(trial)
                self._start(trial, lease)

    def _start(self, trial: Trial, lease: Lease) -> None:
        trial.folder.mkdir(parents=True, exist_ok=True)
        # An earlier attempt's must not pass for this one's.
        (trial.folder / RESULT_FILE).unlink(missing_ok=True)
        trial.status, trial.devices = "running", lease.labels
        trial.attempts += 1
        trial.save()
        escaped = str(trial.folder).replace("\\", "\\\\").replace("'", "\\'")
        command = [
            *(sys.executable, str(self._script), *trial.plan.arguments),
            *(f"hydra.run.dir='{escaped}'", "hydra.mode=RUN"),
            *(["resume=auto"] if saved_checkpoints(trial.folder) else []),
        ]
        environment = os.environ | self._environment
        environment |= self._pools[lease.kind].environment(lease, environment)
        with (trial.folder / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                command,
                env=environment | {LIFELINE: str(self._lifeline)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._lifeline],
                process_group=0,
            )
        self._running.append(_Running(trial, process, lease, time.monotonic()))
        self._view.started(trial)

    def _collect(self) -> None:
        for running in list(self._running):
            if running.process.poll() is not None:
                self._end(running, stopped=False)

    def _end(self, running: _Running, *, stopped: bool) -> None:
        trial = running.trial
        _clear_group(running.process.pid)
        trial.seconds += time.monotonic() - running.since
        self._running.remove(running)
        self._pools[running.lease.kind].give_back(running.lease)
        judge(trial, running.process.returncode, stopped=stopped)
        again = (
            not stopped
            and trial.status == "failed"
            and trial.exit_code not in _NOT_RETRIED
            and trial.attempts <= self._retries
        )
        if again:
            trial.status = "waiting"
            self._queue.append(trial)
        elif trial.status != "finished":
            self._failures += 1
        trial.save()
        self._view.ended(trial, again=again)

    def _stop_all(self) -> None:
        """Ends every trial: asks as Ctrl-C does, waits, and kills what is left."""
        for running in self._running:
            _signal_group(running.process.pid, signal.SIGINT)
        deadline = time.monotonic() + _GRACE_SECONDS
        # A second Ctrl-C means now.
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            while time.monotonic() < deadline:
                if all(running.process.poll() is not None for running in self._running):
                    break
                time.sleep(_POLL_SECONDS)
        for running in list(self._running):
            if running.process.poll() is None:
                _signal_group(running.process.pid, signal.SIGKILL)
                running.process.wait()
            self._end(running, stopped=True)


def _exit_143(signum: int, frame: object) -> None:
    raise SystemExit(143)


def _signal_group(group: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


def _clear_group(group: int) -> None:
    """Ends what a trial left behind, such as the other ranks of one whose first rank died."""
    deadline = time.monotonic() + _ORPHAN_SECONDS
    asked = False
    while _group_lives(group):
        if not asked:
            _signal_group(group, signal.SIGTERM)
            asked = True
        if time.monotonic() > deadline:
            _signal_group(group, signal.SIGKILL)
            return
        time.sleep(_POLL_SECONDS)


def _group_lives(group: int) -> bool:
    """Whether a process of the group still runs; one that nobody has reaped does not."""
    if not Path("/proc/self/stat").exists():
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):
            return False
        return True
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                # "pid (name) state ppid pgrp …"; the name may hold spaces and brackets.
                state, _, owner = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
                if int(owner) == group and state not in ("Z", "X"):
                    return True
    return False
