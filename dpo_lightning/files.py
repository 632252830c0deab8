"""Files that are written whole or not at all, and locks between processes."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

RESULT_FILE = "result.json"
SWEEP_FILE = "sweep.json"
PRUNING = "pruning"
"""Entry of ``sweep.json``: by what a sweep is pruned, and the decision of each rung."""

DIVERGED_FILE = "diverged.json"
METRICS_FILE = "metrics.jsonl"
REPORT_FILE = "report.html"
"""The page of a run, or the report of a sweep, in its folder."""

SAMPLES_FILE = "samples.jsonl"
"""Answers at the evaluations of a run, in its folder."""

ROUNDS_FOLDER = "rounds"
"""The rows of a run's rounds, in its folder."""

INTERPOLATION_FILE = "interpolation.json"
"""The frontier of one policy, in its run's folder."""

_POLL_SECONDS = 0.2


def staged_name(path: Path) -> Path:
    """Path at which this process prepares a file: beside it, so that only a rename is left."""
    return path.with_name(f".{path.name}.{os.getpid()}")


def sync_folder(folder: Path) -> None:
    """Makes the renames in a folder outlive a loss of power, where its file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_whole(path: Path, data: bytes, *, lasting: bool = True) -> None:
    """Writes a file whole or not at all: staged beside the target, synced, renamed.

    Args:
        path: The file.
        data: Its content.
        lasting: False for what a reader checks and can make anew: it is not synced, and a loss of
            power may leave a part of it.

    Raises:
        OSError: If it cannot be written; what was there stays as it was.
    """
    staged = stage(path, data, lasting=lasting)
    try:
        staged.replace(path)
        if lasting:
            sync_folder(path.parent)
    finally:
        staged.unlink(missing_ok=True)


def stage(path: Path, data: bytes, *, lasting: bool = True) -> Path:
    """Writes and syncs what only a rename puts in its place.

    Args:
        path: That place.
        data: Its content.
        lasting: False if it is not synced.

    Returns:
        The staged file.

    Raises:
        OSError: If it cannot be written, naming the file; nothing of it is left.
    """
    staged = staged_name(path)
    try:
        with naming(path), staged.open("wb") as file:
            file.write(data)
            file.flush()
            if lasting:
                os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        raise
    return staged


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an error of the system the name of its file, which a failed write does not have.

    Args:
        path: The file.
    """
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def json_object(text: bytes | str) -> dict[str, Any] | None:
    """A JSON object; None for any other value, and for a text damaged in whatever way."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested without end
        return None
    return value if isinstance(value, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file; empty where there is none, or it is damaged in whatever way."""
    try:
        return json_object(path.read_bytes()) or {}
    except OSError:
        return {}


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; null stands for what is not finite."""
    write_whole(path, f"{json.dumps(finite(value), indent=2, allow_nan=False)}\n".encode())


def finite(value: Any) -> Any:
    """The value with null for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@contextlib.contextmanager
def hold_lock(path: Path, *, on_wait: Callable[[], None]) -> Iterator[None]:
    """Keeps other processes out; the system lifts the lock of one that died.

    Args:
        path: The lock's file; its folder is made.
        on_wait: Called once when another process holds it.

    Raises:
        OSError: If the folder cannot be written or has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            on_wait()
            lock.acquire(poll_interval=_POLL_SECONDS)
    except NotImplementedError as error:
        raise OSError(errno.ENOTSUP, "its file system has no locks") from error
    try:
        yield
    finally:
        lock.release()
