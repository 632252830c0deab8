"""Writing of checkpoints beside the training: their state as it was, and one thread.

Hashing and syncing a file takes many times as long as copying what goes into it. So the state is
copied to the host, training goes on, and a thread writes; never more than one at a time.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DICTS = (dict, OrderedDict, Counter)
"""Kinds of dicts that a checkpoint may hold."""

# Of the memory that is free, a copy of the state may take this share.
_USABLE = 0.8


class BackgroundWriter:
    """One thread that does one piece of work at a time; its failure waits to be asked for."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    @property
    def has_failed(self) -> bool:
        """True if a failure has not been taken yet."""
        return self._failure is not None

    def start(self, work: Callable[[], None]) -> None:
        """Starts a piece of work; the one before has to be over and its failure taken.

        Args:
            work: Called in a thread, which the end of the process waits for.
        """
        assert self._thread is None
        assert self._failure is None

        def run() -> None:
            try:
                work()
            except BaseException as failure:  # it is raised where somebody can act on it
                self._failure = failure

        self._thread = threading.Thread(target=run, name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Waits until nothing is being written; an interrupt ends the waiting, not the writing."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def take_failure(self) -> BaseException | None:
        """The failure of the last piece of work, once."""
        failure, self._failure = self._failure, None
        return failure


def on_host(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A copy of a checkpoint that nothing changes any more; its tensors are on the CPU.

    Tensors that share memory share it in the copy, so that a file of it is as large.

    Args:
        checkpoint: Tensors and plain values in dicts, lists and tuples.
    """
    copies: dict[int, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _copied_tensor(value, copies)
        if type(value) in DICTS:
            same = copy.copy(value)  # with its attributes, such as the versions of modules
            for key, item in value.items():
                same[key] = copied(item)
            return same
        if type(value) in (list, tuple):
            return type(value)(map(copied, value))
        return value

    found: dict[str, Any] = copied(checkpoint)
    return found


def _copied_tensor(tensor: Tensor, copies: dict[int, Tensor]) -> Tensor:
    """A tensor on the CPU; ``copies`` has the bytes of the storages that were copied already."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return tensor.detach().to("cpu", copy=True)
    storage = tensor.untyped_storage()
    if storage._cdata not in copies:
        whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        copies[storage._cdata] = whole.to("cpu", copy=True)
    same = torch.empty(0, dtype=tensor.dtype).set_(
        copies[storage._cdata].untyped_storage(),
        tensor.storage_offset(),
        tensor.shape,
        tensor.stride(),
    )
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(same, requires_grad=tensor.requires_grad)
    return same.requires_grad_(tensor.requires_grad)


def has_room(size: int) -> bool:
    """True if a copy of so many bytes fits into the memory that is free, as far as that is known.

    Args:
        size: Bytes of the copy.
    """
    free = [amount for amount in (_machine_bytes(), _group_bytes()) if amount is not None]
    return not free or size <= _USABLE * min(free)


def _machine_bytes() -> int | None:
    """Free memory of the machine, in bytes."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    return None


def _group_bytes() -> int | None:
    """Bytes that the control group of this process may still take; None: no limit."""
    folder = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):
        limit = int((folder / "memory.max").read_text())
        return limit - int((folder / "memory.current").read_text())
    return None
