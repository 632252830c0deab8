"""Child processes of one run: the first rank starts the others, and none outlives the rest.

Nothing here talks between ranks: where one is gone, a message to it would wait for ever. Imports no
torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_lightning.files import write_json
from dpo_lightning.processes.lifeline import exit_when_gone

log = logging.getLogger(__name__)

PARENT = "DPO_LIGHTNING_PARENT"
"""Environment variable with the process id of the rank that started this one."""

# Exit codes that say more than that something went wrong.
_TYPED = (2, 3, 4, 130, 143)
# All ranks decided together to end so, and need nobody's help.
_AGREED = (3, 130, 143)
_POLL_SECONDS = 0.2
# How long the first rank may take to notice by itself that another one is gone.
_GRACE_SECONDS = 10.0
# How long the others may take to end when the run is over.
_AGREED_SECONDS = 20.0
_FAILED_SECONDS = 2.0
_EXIT_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Death:
    """The end of a rank.

    Attributes:
        code: The exit code that the run takes from it.
        message: Message about it.
    """

    code: int
    message: str


class RankGoneError(RuntimeError):
    """Another rank of the run has ended."""


class ChildRanks:
    """The ranks that this process started, if any.

    Args:
        run_dir: The run's folder, where they leave word of their errors.
        on_death: Called once, from a thread, when one of them ended badly.
    """

    def __init__(self, run_dir: Path, on_death: Callable[[Death], None]) -> None:
        self._run_dir = run_dir
        self._on_death = on_death
        self._processes: list[subprocess.Popen[bytes]] = []
        self._observing = False
        self._meets = False
        self.death: Death | None = None

    def observe(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        """Looks after the ranks that were just started."""
        self._processes = [*processes]
        for rank in range(1, len(processes) + 1):
            _word_of(self._run_dir, rank).unlink(missing_ok=True)  # of a run that was killed
        self._observing = True
        threading.Thread(target=self._observe, name="ranks", daemon=True).start()

    def meet(self) -> None:
        """Notes that from now on all ranks decide together when to end."""
        self._meets = True

    def release(self) -> None:
        """Notes that this process does not need the others from now on."""
        self._observing = False

    def _observe(self) -> None:
        while self._observing and self.death is None:
            for rank, process in enumerate(self._processes, start=1):
                if process.poll():
                    self.death = self._death(rank, process.returncode)
                    self._on_death(self.death)
                    return
            time.sleep(_POLL_SECONDS)

    def _death(self, rank: int, code: int) -> Death:
        if code < 0:
            name = signal.Signals(-code).name
            message = f"rank {rank} was ended by {name}"
            stopped = {-signal.SIGINT: 130, -signal.SIGTERM: 143}
            return Death(stopped.get(code, 1), message)
        said = ""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            said = str(json.loads(_word_of(self._run_dir, rank).read_text()).get("error") or "")
        message = f"rank {rank}: {said}" if said else f"rank {rank} ended with exit code {code}"
        return Death(code if code in _TYPED else 1, message)

    def check(self) -> None:
        """Looks whether all are there, for work in which no message to a rank would fail.

        Raises:
            RankGoneError: If one of them ended badly.
        """
        if self.death is not None:
            raise RankGoneError(self.death.message)

    def death_behind(self, error: BaseException) -> Death | None:
        """Finds the end of another rank, if an error of this one is about that."""
        if self._observing and is_about_ranks(error):
            deadline = time.monotonic() + _GRACE_SECONDS
            while self.death is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        return self.death

    def end(self, code: int) -> None:
        """Ends all the ranks that were started, so that none is left.

        Args:
            code: This rank's exit code; where all decided to end, the others get time to do it.
        """
        self._observing = False
        allowed = _AGREED_SECONDS if self._meets and code in _AGREED else _FAILED_SECONDS
        deadline = time.monotonic() + allowed
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
        self.kill()

    def kill(self) -> None:
        """Ends the others at once; they may hang in a message to a rank that is gone."""
        for rank, process in enumerate(self._processes, start=1):
            with contextlib.suppress(OSError):
                process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5.0)
            _word_of(self._run_dir, rank).unlink(missing_ok=True)


def is_about_ranks(error: BaseException) -> bool:
    """True if an error looks like that of a message to a rank that is gone."""
    text = f"{type(error).__name__} {error}".lower()
    signs = ("gloo", "nccl", "distbackend", "distnetwork", "connection", "broken pipe")
    return any(sign in text for sign in signs)


def is_child() -> bool:
    """True if another rank started this process."""
    return PARENT in os.environ


def watch_parent() -> None:
    """Ends this process when the rank that started it is gone."""
    exit_when_gone(int(os.environ[PARENT]))


def parent_is_gone() -> bool:
    """True if the rank that started this process has ended, or does so within a second."""
    parent = int(os.environ[PARENT])
    deadline = time.monotonic() + 1.0
    while os.getppid() == parent:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS / 4)
    return True


def leave_word(run_dir: Path, error: str | None) -> None:
    """Leaves a child rank's message for the rank that started it."""
    with contextlib.suppress(OSError):
        write_json(_word_of(run_dir, int(os.environ["LOCAL_RANK"])), {"error": error})


def end_soon(code: int) -> None:
    """Ends this process later, should it hang at its end: connections are closed there."""
    timer = threading.Timer(_EXIT_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()


def _word_of(run_dir: Path, rank: int) -> Path:
    return run_dir / f".rank-{rank}.json"
