"""Computation of a run: float32, 16 bits behind or beside float32, or weights in bfloat16."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision

from dpo_lightning.memory.hardware import PrecisionName
from dpo_lightning.models.master_weights import cast_frozen
from dpo_lightning.training.loss_scale import Float16Precision


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
        frozen: Type that frozen weights take beside trained ones under autocast; None: they stay.
        sums: Type in which gradients add up over a step's micro-batches. It is that of the trained
            weights: float32, in which a sum is as good as exact, but for weights that are trained
            in bfloat16 themselves. Those have 8 bytes a parameter, of which float32 sums would
            make 10; in bfloat16 an entry of n micro-batches is off by at most (n - 1) 2^-8 of the
            largest partial sum, and by sqrt(n) 2^-9 or so: 0.6% of 8 micro-batches, where the
            rounding of each gradient is 0.4% at most.
    """

    precision: PrecisionName
    weights: torch.dtype | None
    autocast: bool
    sharded: bool = False
    held: bool = False
    frozen: torch.dtype | None = None
    sums: torch.dtype = torch.float32

    @property
    def master_dtype(self) -> torch.dtype | None:
        """Type that this process rounds its float32 weights to after each step; None for none."""
        return None if self.sharded else self.weights

    @property
    def half(self) -> torch.dtype:
        """The type of 16 bits that is computed in, where one is."""
        return torch.float16 if self.precision == "16-mixed" else torch.bfloat16

    @property
    def name(self) -> str:
        """Tells computations apart whose numbers are not the same."""
        if self.weights is not None and not self.held:
            return f"{self.precision}, weights in {self.weights}"
        return f"{self.precision}, autocast" if self.autocast else self.precision

    def describe(self) -> str:
        """The precision as the header says it, and what gradients add up in."""
        if self.precision == "32-true" and self.sums == torch.float32:
            return self.precision
        scaled = ", loss scaled" if self.precision == "16-mixed" else ""
        return f"{self.precision}{scaled}, gradients add up in {str(self.sums).partition('.')[2]}"

    def dtype(self, weights: torch.dtype) -> torch.dtype:
        """Type of the products, of weights that are held in the given one."""
        return self.half if self.autocast else self.weights or weights

    def context(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """The context of a step, for what is computed outside of one."""
        if self.autocast:
            return torch.autocast(device.type, dtype=self.half)
        return contextlib.nullcontext()

    def cast(self, model: Any) -> Any:
        """The frozen weights of a model in the type that the policy computes in; in place."""
        dtype = self.master_dtype or self.frozen
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
    there it is autocast, and so it is for float16, whose gradients are float32 only then.

    Args:
        precision: What is computed in.
        trainer: The trainer, which knows the number of processes.
        sharded: True if the strategy shares the weights out.
        half_weights: True if the weights are held in bfloat16.
        adapters: True if adapters are trained beside them.
    """
    strategy = trainer.strategy
    several = trainer.world_size > 1 and not sharded
    # PEFT keeps matrices in float32 also beside weights in bfloat16.
    sums = torch.bfloat16 if half_weights and not adapters else torch.float32
    if precision == "32-true":
        return Computation(precision, weights=None, autocast=False, sharded=sharded, sums=sums)
    if precision == "16-mixed":
        strategy.precision_plugin = Float16Precision(
            strategy.root_device.type, autocast=not sharded
        )
        return Computation(
            precision,
            weights=torch.float16 if sharded else None,
            autocast=not sharded,
            sharded=sharded,
            frozen=torch.float16 if adapters and not sharded else None,
        )
    if several and precision == "bf16-mixed":
        return Computation(precision, weights=None, autocast=True, sums=sums)
    strategy.precision_plugin = Precision()
    rounds = not half_weights or (adapters and not several)
    return Computation(
        precision,
        weights=torch.bfloat16 if rounds else None,
        autocast=False,
        sharded=sharded,
        held=half_weights,
        sums=sums,
    )


def trainer_precision(precision: PrecisionName) -> Literal["32-true", "bf16-mixed"]:
    """The precision as Lightning's trainer is told it; :func:`make_computation` decides the rest.

    Of 16-mixed it would make bfloat16 on a CPU, and of bf16-true it would cast what is cast here.
    """
    return "bf16-mixed" if precision == "bf16-mixed" else "32-true"
