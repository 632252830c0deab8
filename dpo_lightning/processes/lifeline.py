"""Ends of processes with those that started them: a trial with its sweep, a worker with its run."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time

LIFELINE = "DPO_LIGHTNING_LIFELINE"
"""Environment variable with the file descriptor to read from."""

REASON = "DPO_LIGHTNING_REASON"
"""Environment variable with the file descriptor that takes the error which ends this process."""

DIE_WITH_PARENT = "DPO_LIGHTNING_DIE_WITH_PARENT"
"""Environment variable that is set where nothing may outlive the process that started it."""

# The descriptor, once it was taken from the environment: those started from here have it not.
_reasons: list[int] = []

_GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def watch_lifeline() -> None:
    """Stops this process and those it started when the one that started it is gone.

    Does nothing where nobody waits for its end. A sweep that ends by itself has ended its trials
    before. Takes the ends of both pipes out of the environment.
    """
    if DIE_WITH_PARENT in os.environ:
        # It stays there for the ranks that this process starts.
        _die_with_parent()
    reason = os.environ.pop(REASON, None)
    if reason is not None:
        os.set_inheritable(int(reason), False)
        _reasons.append(int(reason))
    descriptor = os.environ.pop(LIFELINE, None)
    if descriptor is None:
        return

    def wait() -> None:
        while os.read(int(descriptor), 1):
            pass  # nothing is ever written: only its end counts
        os.killpg(os.getpgrp(), signal.SIGTERM)
        # Ranks may wait for each other; nobody is left to look after them.
        time.sleep(_GRACE_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


def tell_reason(line: str) -> None:
    """Hands the error that ends this process to the one that started it, where that asked for it.

    Args:
        line: The error in one line, as people read it.
    """
    if _reasons:
        with contextlib.suppress(OSError):
            os.write(_reasons[-1], f"{line}\n".encode())


def end_with(parent: int) -> None:
    """Ends this process when the one that forked it is gone, however that ended.

    Args:
        parent: Its process id; it may be gone already.
    """
    _die_with_parent()
    # Also on Linux, where the parent may have ended just before.
    exit_when_gone(parent)


def exit_when_gone(parent: int) -> None:
    """Has a thread end this process once its parent is another one.

    Args:
        parent: Process id of the parent.
    """

    def wait() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_SECONDS)
        os._exit(1)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _die_with_parent() -> None:
    """Has the system kill this process at once when its parent is gone, which only Linux can."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
