"""Process groups of trials, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

# How long what a trial started may outlive it.
_ORPHAN_SECONDS = 10.0
_POLL_SECONDS = 0.1


def signal_group(group: int, signum: int) -> None:
    """Signals every process of a group; it may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signum)


def kill_group(group: int) -> None:
    """Kills every process of a group and waits until they are gone."""
    signal_group(group, signal.SIGKILL)
    deadline = time.monotonic() + _ORPHAN_SECONDS
    while group_lives(group) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        signal_group(group, signal.SIGKILL)


def clear_group(group: int) -> None:
    """Ends the rest of a trial, such as the other ranks of one whose first rank died."""
    deadline = time.monotonic() + _ORPHAN_SECONDS
    asked = False
    while group_lives(group):
        if not asked:
            signal_group(group, signal.SIGTERM)
            asked = True
        if time.monotonic() > deadline:
            signal_group(group, signal.SIGKILL)
            return
        time.sleep(_POLL_SECONDS)


def group_lives(group: int) -> bool:
    """True if a process of the group still runs; one that nobody has reaped does not."""
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
