"""Devices as they compute: autocast's type, torch's own attention, and copies to them."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.models.device_kinds import kind_of


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
