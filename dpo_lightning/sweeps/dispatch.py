"""Runs the trials of a sweep at any place: starts, judges, retries, stops. Imports no torch.

A trial is `python -m dpo_lightning train …` in Hydra's RUN mode: to Lightning it is an ordinary
single run, and whatever happens to its process happens to it alone.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dpo_lightning.files import RESULT_FILE
from dpo_lightning.sweeps.places.base import Attempt, Ending, Place
from dpo_lightning.sweeps.trials import Trial, as_left, judge
from dpo_lightning.tracking.rungs import Goal, write_goal

# Exit codes after which the same start would end the same way.
_NOT_RETRIED = (2, 3)
_POLL_SECONDS = 0.1


class Stages(Protocol):
    """The course of trials that do not simply run to their end."""

    def goal(self, trial: Trial) -> Goal | None:
        """Step at which a trial that is started now is to stop; None: at its end."""

    def ended(self, trial: Trial) -> None:
        """Called when an attempt ended and was judged; may give the trial another state."""

    def released(self) -> Sequence[Trial]:
        """Called again and again; returns the trials that wait to be started again."""


class View(Protocol):
    """Display of a sweep while it runs."""

    def started(self, trial: Trial) -> None:
        """Called when a trial was started."""

    def ended(self, trial: Trial, *, again: bool) -> None:
        """Called when a trial's process ended; ``again`` when it will be started once more."""

    def refresh(self) -> None:
        """Called again and again while the sweep runs."""


@dataclass(slots=True)
class _Running:
    trial: Trial
    attempt: Attempt
    starts: int = 0
    since: float = 0.0


class Dispatcher:
    """Dispatcher, which runs trials until all have ended.

    Args:
        trials: In the order in which they are to start; finished ones are passed over.
        place: The place where they run; every trial fits there.
        max_failures: After more failed trials than this no other is started; None: all are.
        retries: Number of times that a trial that crashed is started again.
        view: Whoever shows it.
        course: Where trials stop on their way; None: nowhere.
    """

    def __init__(
        self,
        trials: Sequence[Trial],
        *,
        place: Place,
        max_failures: int | None,
        retries: int,
        view: View,
        course: Stages | None = None,
    ) -> None:
        self._course = course
        self._queue = [trial for trial in trials if trial.status == "waiting"]
        self._place = place
        self._max_failures = max_failures
        self._retries = retries
        self._view = view
        self._running: list[_Running] = []
        self._tries: dict[Path, int] = {}
        self._failures = 0

    def run(self) -> None:
        """Runs all trials; an interrupt stops the running ones first and is then raised again.

        Raises:
            KeyboardInterrupt: Ctrl-C, when no trial is left.
            SystemExit: SIGTERM, when no trial is left.
        """
        before = signal.signal(signal.SIGTERM, _exit_143)
        try:
            while self._is_at_work():
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

    def _is_at_work(self) -> bool:
        """True if a trial runs or waits, also one that its course has let go on."""
        if self._course is not None:
            self._queue += self._course.released()
        return bool(self._queue or self._running)

    def _gave_up(self) -> bool:
        return self._max_failures is not None and self._failures > self._max_failures

    def _start_what_fits(self) -> None:
        """Starts trials in order; a wide one that must wait lets narrower ones pass."""
        if self._gave_up():
            return
        for trial in list(self._queue):
            if self._place.fits(trial):
                self._queue.remove(trial)
                self._start(trial)

    def _start(self, trial: Trial) -> None:
        goal = None if self._course is None else self._course.goal(trial)
        attempt = self._place.find(trial)
        if attempt is None and as_left(trial).status == "finished":
            # An earlier command's came to its end since this one looked.
            self._view.ended(trial, again=False)
            return
        with _undisturbed():
            if attempt is None:
                trial.folder.mkdir(parents=True, exist_ok=True)
                # Whatever happens from now on, the folder is this trial's and no other's.
                trial.save()
                # An earlier attempt's must not pass for this one's.
                (trial.folder / RESULT_FILE).unlink(missing_ok=True)
                write_goal(trial.folder, goal)
                attempt = self._place.start(trial)
            running = _Running(trial, attempt)
            self._running.append(running)
        self._tries[trial.folder] = self._tries.get(trial.folder, 0) + 1
        trial.devices = attempt.labels
        if not self._notice_start(running):
            trial.save()  # it waits in a queue that is not ours

    def _notice_start(self, running: _Running) -> bool:
        """Notes that the trial's process was started, for the first time or again."""
        starts, trial = running.attempt.starts(), running.trial
        if starts <= running.starts:
            return False
        if not running.starts:
            running.since = time.monotonic()
        trial.attempts += starts - running.starts
        trial.status, running.starts = "running", starts
        trial.devices = running.attempt.labels
        trial.save()
        self._view.started(trial)
        return True

    def _collect(self) -> None:
        for running in list(self._running):
            ending = running.attempt.ending()
            self._notice_start(running)
            if ending is not None:
                self._end(running, ending, stopped=False)

    def _end(self, running: _Running, ending: Ending, *, stopped: bool) -> None:
        trial = running.trial
        if running.starts:
            trial.seconds += time.monotonic() - running.since
        self._running.remove(running)
        if stopped and not running.starts:  # taken out of a queue
            trial.status = "waiting"
            trial.save()
            return
        judge(trial, ending.exit_code, stopped=stopped, reason=ending.reason)
        if self._course is not None:
            self._course.ended(trial)
        again = (
            not (stopped or ending.final)
            and trial.status == "failed"
            and trial.exit_code not in _NOT_RETRIED
            and self._tries[trial.folder] <= self._retries
        )
        if again:
            trial.status = "waiting"
            self._queue.append(trial)
        elif trial.failed:
            self._failures += 1
        trial.save()
        self._view.ended(trial, again=again)

    def _stop_all(self) -> None:
        """Ends every trial: asks as Ctrl-C does, waits, and kills what is left."""
        endings: dict[Path, Ending] = {}
        # A second Ctrl-C means now.
        with contextlib.suppress(KeyboardInterrupt, SystemExit):
            for running in self._running:
                running.attempt.ask()
            deadline = time.monotonic() + self._place.grace_seconds
            while time.monotonic() < deadline and len(endings) < len(self._running):
                for running in self._running:
                    folder = running.trial.folder
                    if folder not in endings:
                        ending = running.attempt.ending()
                        if ending is not None:
                            endings[folder] = ending
                time.sleep(_POLL_SECONDS)
        for running in list(self._running):
            ending = endings.get(running.trial.folder) or running.attempt.kill()
            self._notice_start(running)
            self._end(running, ending, stopped=True)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Defers an interrupt to its end: a trial that is being started could not be stopped."""
    came: list[int] = []
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    handled = {signum: handler for signum, handler in before.items() if callable(handler)}
    for signum in handled:
        signal.signal(signum, lambda number, _: came.append(number))
    try:
        yield
    finally:
        for signum, handler in handled.items():
            signal.signal(signum, handler)
        if came:
            signal.raise_signal(came[0])


def _exit_143(signum: int, frame: object) -> None:
    raise SystemExit(143)
