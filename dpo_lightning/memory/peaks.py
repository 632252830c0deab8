"""Memory of the process: how libraries keep it, and how much was used at most."""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable, MutableMapping
from pathlib import Path

import torch

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_INT = 2**31 - 1
# Shapes of products of a step are some dozens; each takes about a quarter of a MiB.
_PRODUCTS = "256"


def keep_freed_memory() -> None:
    """Lets the C library use freed memory again instead of giving it back and asking anew.

    By default glibc takes every large tensor from the system and gives it back, and the system
    clears each page of it: on a CPU a sixth of a training step and more. Does nothing elsewhere, or
    where the user has set the library's own variables.
    """
    own = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if own or not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT)
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_INT)


def bound_product_caches(environment: MutableMapping[str, str] = os.environ) -> None:
    """Bounds the kernels that oneDNN, and torch in front of it, keep of bfloat16 products.

    Each keeps 1,024 by default, one for each shape: as micro-batches differ, a long run comes to
    half a GiB and more beside its tensors. Fewer were not slower. To be called ahead of the
    first product; what the user has set stays.

    Args:
        environment: Variables of the process.
    """
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        environment.setdefault(name, _PRODUCTS)


def give_back_memory() -> None:
    """Gives the system what the C library keeps of freed memory, which is used by others then.

    Does nothing where the library cannot.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # another C library
        return
    trim(0)


def giving_back(check: Callable[[], None], *, every: int) -> Callable[[], None]:
    """A check that also gives memory back with every so many calls.

    What is kept are pieces between tensors of many sizes: in a pass over many rows more and more.

    Args:
        check: Called each time.
        every: Number of calls.
    """
    calls = itertools.count(1)

    def checked() -> None:
        check()
        if next(calls) % every == 0:
            give_back_memory()

    return checked


def reset_peak(device: torch.device) -> None:
    """Begins to measure anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return


def peak_bytes(device: torch.device) -> int | None:
    """Most memory since :func:`reset_peak`: allocated on a GPU, resident on a CPU, else None."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found and device.type == "cpu" else None
