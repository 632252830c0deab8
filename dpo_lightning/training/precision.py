"""Computation of a run: float32, bfloat16 behind float32 master weights, or autocast."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision

from dpo_lightning.memory.hardware import PrecisionName
from dpo_lightning.models.master_weights import cast_frozen


@dataclass(frozen=True, slots=True)
class Computation:
    """Number types that a run computes in.

    Attributes:
        precision: ``trainer.precision``, decided.
        weights: What the weights are rounded to while float32 masters of them are trained; None
            computes in the weights' own type.
        autocast: True if each operation chooses its type.
        sharded: True if the weights are shared out; they are then rounded as they are gathered.
        held: True if the frozen weights are of that type as they are, and only masters are not.
    """

    precision: PrecisionName
    weights: torch.dtype | None
    autocast: bool
    sharded: bool = False
    held: bool = False

    @property
    def master_dtype(self) -> torch.dtype | None:
        """Type that this process rounds its float32 weights to after each step; None for none."""
        return None if self.sharded else self.weights

    @property
    def name(self) -> str:
        """Tells computations apart whose numbers are not the same."""
        if self.weights is not None and not self.held:
            return f"{self.precision}, weights in {self.weights}"
        return f"{self.precision}, autocast" if self.autocast else self.precision

    def dtype(self, weights: torch.dtype) -> torch.dtype:
        """Type of the products, of weights that are held in the given one."""
        return torch.bfloat16 if self.autocast else self.weights or weights

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context of a step, for what is computed outside of one."""
        if self.autocast:
            return torch.autocast(device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    def cast(self, model: Any) -> Any:
        """The frozen weights of a model in the type that the policy computes in; in place."""
        dtype = self.master_dtype
        return model if dtype is None else cast_frozen(model, dtype)


def make_computation(
    precision: PrecisionName,
    trainer: pl.Trainer,
    *,
    sharded: bool,
    half_weights: bool,
    adapters: bool,
) -> Computation:
    """Decides how to compute, and tells the trainer.

    One process rounds its weights once per step, which is faster than autocast's casts in every
    layer; weights that are shared out are rounded as they are gathered. Over several processes with
    whole models, gradients are averaged by a strategy that knows only the model's own weights:
    there it is autocast.

    Args:
        precision: What is computed in.
        trainer: The trainer, which knows the number of processes.
        sharded: True if the strategy shares the weights out.
        half_weights: True if the weights are held in bfloat16.
        adapters: True if adapters are trained beside them.
    """
    if precision == "32-true":
        return Computation(precision, weights=None, autocast=False, sharded=sharded)
    if trainer.world_size > 1 and not sharded:
        return Computation(precision, weights=None, autocast=True)
    trainer.strategy.precision_plugin = Precision()
    # PEFT keeps matrices in float32 also beside weights in bfloat16.
    rounds = not half_weights or adapters
    return Computation(
        precision,
        weights=torch.bfloat16 if rounds else None,
        autocast=False,
        sharded=sharded,
        held=half_weights,
    )
