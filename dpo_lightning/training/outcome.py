"""The outcome of a step's backward passes, agreed over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """Facts about a step that is about to be taken, the same on all ranks.

    Attributes:
        loss: True if the loss is finite on each of them.
        gradients: True if the gradients' norm is.
        signal: Number of the signal that any of them has had, 0 for none.
    """

    loss: bool
    gradients: bool
    signal: int

    @property
    def finite(self) -> bool:
        """True if the step can be taken."""
        return self.loss and self.gradients


@torch.no_grad()
def agree(loss: Tensor, grad_norm: Tensor, *, signal: int, world_size: int) -> Outcome:
    """Asks all ranks about a step.

    The one time in a step that the host waits for the device, and that ranks wait for an answer of
    each other.

    Args:
        loss: Sum of this rank's losses, shape ().
        grad_norm: Norm of the step's gradient, shape ().
        signal: Number of the signal that this rank has had, 0 for none.
        world_size: How many ranks there are.
    """
    bad = [~torch.isfinite(value).to(loss.device) for value in (loss, grad_norm)]
    received = loss.new_full((), signal, dtype=torch.float32)
    flags = torch.stack([*(flag.float() for flag in bad), received])
    if world_size > 1:
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    no_loss, no_gradients, signum = flags.tolist()
    return Outcome(not no_loss, not no_gradients, int(signum))


def of_all_ranks(own: Any, *, world_size: int) -> list[Any]:
    """A value of each rank, on every rank.

    Args:
        own: This rank's.
        world_size: How many ranks there are.
    """
    if world_size == 1:
        return [own]
    found: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(found, own)
    return found
