"""Signals that ask a run to stop: when they count, and what they do. Imports no torch.

A handler only takes note while training steps are taken: the step is finished and saved first, on
all ranks together. At any other time there is nothing to save, and the handler raises. Python runs
handlers between two of its own instructions only, which a rank that waits for another one may never
reach; so a thread watches too, and ends the process when nobody else does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

log = logging.getLogger(__name__)

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""What stops a run; schedulers announce the end of a job with one of the last two."""

REQUEUING = (signal.SIGUSR1, signal.SIGUSR2)
"""Those with which SLURM announces the end of the job's time (``sbatch --signal``)."""

# Whoever stops a group of processes may reach each of them twice: that is one signal.
_SAME_SECONDS = 1.0
# How long the run may take to notice that it was stopped.
_GRACE_SECONDS = 10.0


def exit_code(signum: int) -> int:
    """Exit code: 130 after Ctrl-C, 143 after any other signal."""
    return 130 if signum == signal.SIGINT else 143


class Stopped(SystemExit):
    """The run was stopped by a signal.

    Args:
        signum: The signal.
        saved: The part of the message about what was saved; None where there was nothing to save.
    """

    def __init__(self, signum: int, saved: str | None = None) -> None:
        super().__init__(exit_code(signum))
        self.signum = signum
        name = signal.Signals(signum).name
        self.message = f"stopped by {name}" if saved is None else f"stopped by {name}; {saved}"


@contextlib.contextmanager
def noted_interrupts() -> Iterator[None]:
    """Notes Ctrl-C, beside raising it, until the run itself listens.

    What is just being imported may swallow it, or turn it into an error of its own.
    """
    before = signal.getsignal(signal.SIGINT)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before not in (signal.default_int_handler, signal.SIG_DFL):
        yield
        return
    noted = threading.Event()

    def note(signum: int, frame: FrameType | None) -> None:
        noted.set()
        raise KeyboardInterrupt

    _noted.append(noted)
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _noted.remove(noted)


def was_interrupted() -> bool:
    """True after a Ctrl-C that was raised, whatever became of it since."""
    return any(noted.is_set() for noted in _noted)


def stop_if_interrupted() -> None:
    """Raises a Ctrl-C again that was swallowed.

    Raises:
        KeyboardInterrupt: If there was one.
    """
    if was_interrupted():
        raise KeyboardInterrupt


_noted: list[threading.Event] = []


class SignalWatch:
    """Handles the signals of one run, from :meth:`install` to :meth:`remove`.

    Outside the main thread no handler can be installed, and nothing is.

    Args:
        leave: Called with the exit code, from a thread, when the process has to end at once; it
            leaves behind what others need to know. The process ends when it returns.

    Attributes:
        received: Number of the first signal; 0 while there was none.
        raised: True if it was raised at once; what is raised since may be its doing.
    """

    def __init__(self, leave: Callable[[int], None]) -> None:
        self.received = 0
        self.raised = False
        self._leave = leave
        self._before: dict[int, Any] = {}
        self._deferring = False
        self._noticed = threading.Event()
        self._pipe: tuple[int, int] | None = None
        self._wakeup_before = -1

    def install(self) -> None:
        """Takes the signals over, but for those that are ignored, or that somebody else handles."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in STOPPING:
            handler = signal.getsignal(signum)
            ours = signum in (signal.SIGINT, signal.SIGTERM) and handler is not signal.SIG_IGN
            if ours or handler is signal.SIG_DFL:
                self._before[signum] = handler
                signal.signal(signum, self._handle)
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        self._wakeup_before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        _installed.append(self)
        threading.Thread(target=self._watch, name="signals", daemon=True).start()

    def remove(self) -> None:
        """Gives the signals back."""
        if self._pipe is None:
            return
        _installed.remove(self)
        signal.set_wakeup_fd(self._wakeup_before)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        os.close(self._pipe[1])  # the thread reads its end, and closes the other one
        self._pipe = None

    @property
    def noticed(self) -> bool:
        """True if the run is about to end."""
        return self._noticed.is_set()

    @property
    def deferring(self) -> bool:
        """True if signals are only noted."""
        return self._deferring

    def defer(self) -> None:
        """Has a signal only noted from now on, in ``received``."""
        self._deferring = True

    def release(self) -> None:
        """Has a signal raise from now on.

        Raises:
            Stopped: If one was noted.
        """
        self._deferring = False
        if self.received:
            raise Stopped(self.received)

    def notice(self) -> None:
        """Notes that the run is about to end: a first signal has done its work."""
        self._noticed.set()

    def end_now(self, code: int) -> None:
        """Ends the process without unwinding it."""
        try:
            self._leave(code)
        finally:
            os._exit(code)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received:
            return  # the thread judges what comes after the first
        self.received = signum
        if not self._deferring:
            self.raised = True
            raise Stopped(signum)

    def _watch(self) -> None:
        assert self._pipe is not None
        reader = self._pipe[0]
        first: tuple[int, float] | None = None
        while True:
            ready, _, _ = select.select([reader], [], [], None if first is None else 0.2)
            now = time.monotonic()
            if ready:
                numbers = os.read(reader, 64)
                if not numbers:
                    os.close(reader)
                    return
                for signum in numbers:
                    if signum not in self._before:
                        continue
                    if first is None:
                        first = signum, now
                    elif now - first[1] >= _SAME_SECONDS:
                        self.end_now(exit_code(first[0]))
            if (
                first is not None
                and now - first[1] >= _GRACE_SECONDS
                and not self._deferring
                and not self._noticed.is_set()
            ):
                self.end_now(exit_code(first[0]))


_installed: list[SignalWatch] = []


def _after_fork() -> None:
    """Restores the former handlers in a forked process, which is not the run."""
    for watch in _installed:
        signal.set_wakeup_fd(-1)
        for signum, handler in watch._before.items():
            signal.signal(signum, handler)
    _installed.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def leave_signals_to_parent(worker: int) -> None:
    """Ignores signals in the processes that build batches: a stop is for the one that trains."""
    for signum in STOPPING:
        signal.signal(signum, signal.SIG_IGN)


def requeue_slurm_job(signum: int, resume: str | None) -> None:
    """Has SLURM start this job anew if that is what the signal announced.

    Only after the signals for which a job has to ask: SIGTERM is how a job is cancelled.

    Args:
        signum: The signal that stopped the run.
        resume: The setting; by anything but ``auto`` the job would do again what it has done.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None or signum not in REQUEUING:
        return
    if resume != "auto":
        log.warning(
            "the job is not requeued: with resume=auto and hydra.run.dir=<folder> it would go on "
            "from here"
        )
        return
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not re.fullmatch(r"[0-9_]+", job):
        log.warning("the job is not requeued: %s is no job id", job)
        return
    log.info("requeuing SLURM job %s", job)
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("scontrol requeue %s: %s", job, error)
        return
    if done.returncode:
        log.warning("scontrol requeue %s: %s", job, " ".join(done.stderr.split()))
