"""Right of one process to a folder: a lock of the system, and a file that says who holds it.

On one machine the lock decides, which goes with its process however that ends. It is closed in
every process forked from the holder: a worker that outlives its trainer must not keep the folder.
Where locks do not reach, on another machine or a file system without them, the owner's file
decides: whoever lives touches it again and again. Imports no torch.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo_lightning.files import read_json, write_json

LOCK_FILE = ".process.lock"
"""Locked by the process that is at work in a folder, so that the lock goes with it."""

OWNER_FILE = ".owner.json"
"""Facts about that process; the time of its last change is the heartbeat."""

INHERITED_LOCK = "DPO_LIGHTNING_LOCK"
"""Environment variable with the descriptor of a lock that a launcher took for this process."""

BEAT_SECONDS = 10.0
"""How often a living owner touches its file."""

DEAD_SECONDS = 45.0
"""An owner of another machine that has not touched its file for so long is gone."""

_POLL_SECONDS = 0.5
# Where there are no locks: how long another one may need to see that the folder is taken.
_SETTLE_SECONDS = 0.5


class TakenError(Exception):
    """Another process is at work in the folder.

    Args:
        owner: What its file says; empty where it says nothing.
    """

    def __init__(self, owner: dict[str, Any]) -> None:
        self.owner = owner
        super().__init__(named(owner))


class FolderLock:
    """A folder that this process holds until it releases it or ends; made by :func:`take_folder`.

    Args:
        folder: The folder.
        handle: Descriptor of the lock's file.
    """

    def __init__(self, folder: Path, handle: int) -> None:
        self.folder = folder
        self._handle: int | None = handle
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        _held.append(self)

    def own(self, on_lost: Callable[[], None]) -> None:
        """Writes the owner's file, and touches it from now on.

        Args:
            on_lost: Called from a thread if another process took the folder over.

        Raises:
            OSError: If it cannot be written.
        """
        beat = {"heartbeat_seconds": BEAT_SECONDS, "token": self._token}
        write_json(self.folder / OWNER_FILE, this_process() | beat)
        self._thread = threading.Thread(
            target=self._beat, args=[on_lost], name="heartbeat", daemon=True
        )
        self._thread.start()

    def is_own(self) -> bool:
        """True if the owner's file is still this process's, or is not there."""
        return bool(read_json(self.folder / OWNER_FILE).get("token", self._token) == self._token)

    def _beat(self, on_lost: Callable[[], None]) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            if not self.is_own():
                on_lost()
                return
            with contextlib.suppress(OSError):
                os.utime(self.folder / OWNER_FILE)  # which needs no room

    def release(self) -> None:
        """Gives the folder back; the lock's own file stays, as another may wait for it."""
        if self._handle is None:
            return
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self.is_own():
            with contextlib.suppress(OSError):
                (self.folder / OWNER_FILE).unlink(missing_ok=True)
        self._close()

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
        self._handle = None
        _held.remove(self)


_held: list[FolderLock] = []


def _let_go() -> None:
    """Closes the locks in a forked process, which holds nothing."""
    for lock in [*_held]:
        with contextlib.suppress(OSError):
            lock._close()


os.register_at_fork(after_in_child=_let_go)


def take_folder(folder: Path, on_wait: Callable[[str], None]) -> FolderLock:
    """Takes a folder for this process.

    Args:
        folder: It exists.
        on_wait: Called with a text where the owner was on another machine, and may be gone.

    Raises:
        TakenError: If another process is at work there.
        OSError: If it cannot be written.
    """
    handle = _inherited(folder)
    if handle is None:
        handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        locked = try_lock(handle)
        owner = read_json(folder / OWNER_FILE)
        if owner and _is_at_work(owner, folder / OWNER_FILE, locked=locked, on_wait=on_wait):
            raise TakenError(owner)
    except BlockingIOError:
        os.close(handle)
        raise TakenError(read_json(folder / OWNER_FILE)) from None
    except BaseException:
        os.close(handle)
        raise
    return FolderLock(folder, handle)


def settle(lock: FolderLock) -> None:
    """Looks again, after a moment, if nobody else has taken the folder at the same time.

    Args:
        lock: Of a folder that this process has put its name on.

    Raises:
        TakenError: If somebody has.
    """
    assert lock._handle is not None
    if not try_lock(lock._handle):
        time.sleep(_SETTLE_SECONDS)
        if not lock.is_own():
            raise TakenError(read_json(lock.folder / OWNER_FILE))


def try_lock(handle: int) -> bool:
    """Locks an open file; returns False where its file system has no locks.

    Raises:
        BlockingIOError: If another process holds it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
        return False
    return True


def _inherited(folder: Path) -> int | None:
    """The descriptor that a launcher locked for this process, if it is of that folder."""
    given = os.environ.pop(INHERITED_LOCK, None)
    if given is None or not given.isdecimal():
        return None
    try:
        mine, there = os.fstat(int(given)), (folder / LOCK_FILE).stat()
    except OSError:
        return None
    if (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
        return None
    os.set_inheritable(int(given), False)
    return int(given)


def _is_at_work(
    owner: dict[str, Any], path: Path, *, locked: bool, on_wait: Callable[[str], None]
) -> bool:
    """True if the owner of a folder is still at work in it.

    Args:
        owner: What its file says.
        path: The file.
        locked: True if this process has the lock.
        on_wait: Called with a text ahead of a wait.
    """
    here = machine().split()
    there = str(owner.get("machine", "")).split()
    if there == here:
        process = [int(owner.get("pid") or 0), int(owner.get("born") or 0)]
        return process != birth(os.getpid()) and is_alive(process)
    if locked and there[:2] == here[:2] and len(here) > 1:
        return False  # another container of this very system, whose lock would be seen
    seen = _touched(path)
    if seen is None or _now_there(path.parent) - seen > DEAD_SECONDS:
        return False
    # Its clock may differ; that the file changes is what counts.
    on_wait(f"process {owner.get('pid')} on {owner.get('host')}")
    deadline = time.monotonic() + DEAD_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        now = _touched(path)
        if now is None:
            return False  # it has ended
        if now != seen:
            return True
    return False


def _touched(path: Path) -> float | None:
    try:
        with path.open("rb") as file:  # opened: a network's file system then asks its server
            return os.fstat(file.fileno()).st_mtime
    except OSError:
        return None


def _now_there(folder: Path) -> float:
    """The time of the machine whose file system it is."""
    probe = folder / LOCK_FILE
    try:
        os.utime(probe)
        return probe.stat().st_mtime
    except OSError:
        return time.time()


# Processes ----------------------------------------------------------------------------------------


def this_process() -> dict[str, Any]:
    """Facts by which others know this process: host, machine, number, birth, and the time now."""
    pid, born = birth(os.getpid())
    started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    facts = {"host": socket.gethostname(), "pid": pid, "born": born, "started": started}
    return facts | {"machine": machine()}


def named(owner: dict[str, Any]) -> str:
    """A process in words.

    Args:
        owner: As :func:`this_process` gave it; empty where nothing is known.
    """
    if not owner.get("pid"):
        return "another process"
    return f"process {owner['pid']} on {owner.get('host')}, since {owner.get('started')}"


def machine() -> str:
    """Identifies the machine, or container, whose processes see each other's process ids."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def birth(pid: int) -> list[int]:
    """A process by number and time of birth: numbers are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return [pid, 0]
    return [pid, int(fields[19])]


def is_alive(process: list[int]) -> bool:
    """True if the process that was born so still runs; one that nobody has reaped does not.

    Args:
        process: As :func:`birth` gave it.
    """
    pid, born = process
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    if birth(pid)[1] != born:
        return False  # the number is another's by now
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return not Path("/proc/self/stat").exists()
