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

DIE_WITH_PARENT = "DPO_LIGHTNING_DIE_WITH_PARENT"
"""Environment variable that is set where nothing may outlive the process that started it."""

_GRACE_SECONDS = 30.0
_POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


def watch_lifeline() -> None:
    """Stops this process and those it started when the sweep that started it is gone.

    Does nothing outside a sweep. A sweep that ends by itself has ended its trials before.
    """
    if DIE_WITH_PARENT in os.environ:
        # It stays there for the ranks that this process starts.
        _die_with_parent()
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
