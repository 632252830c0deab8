"""Kinds of devices, and the one that meta tensors stand for.

What a step takes of a device is traced on tensors without memory. They compute as a GPU would, and
as a CPU where that is said, so that a trace takes the branches of the device that it is about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_meta_is: ContextVar[str] = ContextVar("meta_is", default="cuda")


def kind_of(device: torch.device) -> str:
    """The kind whose ways of computing are taken on a device, such as ``cpu``."""
    return _meta_is.get() if device.type == "meta" else device.type


@contextlib.contextmanager
def meta_stands_for(kind: str) -> Iterator[None]:
    """Context in which meta tensors are taken for those of a kind of device.

    Args:
        kind: ``cpu``, ``cuda`` or ``mps``.
    """
    token = _meta_is.set(kind)
    try:
        yield
    finally:
        _meta_is.reset(token)
