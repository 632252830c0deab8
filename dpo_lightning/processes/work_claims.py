"""Claims on pieces of work that processes share, each a file beside the place of its result.

A lock of the system decides, which goes with its process however that ends, so that a killed one's
work is free at once. Where the file system has no locks the claim's file decides, by whether the
process that it names still runs. A claim saves work and guards nothing: whoever computes a piece
comes to the same result, and puts it in its place by one rename. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from dpo_lightning.files import json_object, read_json
from dpo_lightning.processes.ownership import (
    birth,
    is_alive,
    machine,
    named,
    this_process,
    try_lock,
)


class WorkClaim:
    """A piece of work that this process has taken on, until it releases it or ends.

    Args:
        path: The claim's file.
        handle: Its descriptor, which holds the lock.
        is_taken_over: True if the claim was that of a process which is gone.

    Attributes:
        is_taken_over: True if the claim was that of a process which is gone.
    """

    def __init__(self, path: Path, handle: int, *, is_taken_over: bool) -> None:
        self.is_taken_over = is_taken_over
        self._path = path
        self._handle: int | None = handle

    def release(self) -> None:
        """Gives the work back, done or not; the file goes while its lock still stands."""
        if self._handle is None:
            return
        if _is_there(self._handle, self._path):
            with contextlib.suppress(OSError):
                self._path.unlink(missing_ok=True)
        os.close(self._handle)
        self._handle = None


def claim_work(path: Path) -> WorkClaim | None:
    """Takes a piece of work on.

    Args:
        path: The claim's file; its folder exists.

    Returns:
        The claim; None while another process has it.

    Raises:
        OSError: If the folder cannot be written.
    """
    while True:
        handle, is_new = _open(path)
        try:
            locked = try_lock(handle)
            if not _is_there(handle, path):
                os.close(handle)  # whoever had it has released it in between
                continue
            if not locked and not is_new and _is_at_work(handle):
                os.close(handle)
                return None
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        _sign(handle)
        return WorkClaim(path, handle, is_taken_over=not is_new)


def claimant(path: Path) -> str:
    """The process that has a piece of work, in words.

    Args:
        path: The claim's file.
    """
    return named(read_json(path))


def _open(path: Path) -> tuple[int, bool]:
    """Descriptor of a file, and True if it was made just now."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    try:
        return os.open(path, flags | os.O_EXCL, 0o666), True
    except FileExistsError:
        return os.open(path, flags, 0o666), False


def _is_there(handle: int, path: Path) -> bool:
    """True if an open file is still the one of that name."""
    try:
        there, mine = path.stat(), os.fstat(handle)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _sign(handle: int) -> None:
    """Writes who has the work; a full disk costs the name alone."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(this_process()).encode(), 0)


def _is_at_work(handle: int) -> bool:
    """True unless the process that a claim names is of this machine and gone."""
    owner = json_object(os.pread(handle, 1 << 16, 0)) or {}
    if owner.get("machine") != machine():
        return True
    process = [int(owner.get("pid") or 0), int(owner.get("born") or 0)]
    return process == birth(os.getpid()) or is_alive(process)
