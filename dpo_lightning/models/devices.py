"""Devices as they compute: their kind, autocast's type, torch's own attention, copies to them.

What a step takes of a device is traced on tensors without memory. They compute as a GPU would, and
as a CPU where that is said, so that a trace takes the branches of the device that it is about.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

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


def is_cuda(device: torch.device) -> bool:
    """True for CUDA, and for what stands for it."""
    return kind_of(device) == "cuda"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes products in on a device; None where it is off."""
    kind = kind_of(device)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Context in which each operation computes in the type that it is given."""
    return torch.autocast(kind_of(device), enabled=False)


def settle_attention(device: torch.device) -> None:
    """Chooses among torch's own attention kernels; once, before anything is computed on a device.

    That of cuDNN makes a plan for each new shape, which takes half a second on some GPUs, and here
    nearly every call has a new one.
    """
    if is_cuda(device):
        torch.backends.cuda.enable_cudnn_sdp(False)


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor that the host has just made, on a device; the host does not wait for it."""
    return tensor.to(device, non_blocking=True)
