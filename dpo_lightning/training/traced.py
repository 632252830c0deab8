"""Optimizers of steps that are traced for their memory alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dpo_lightning.training.optimizers import OptimizerSettings, make_optimizer


def traced_optimizer(name: str, parameters: list[Tensor]) -> Any:
    """The optimizer of a name; of its settings only those that decide its memory are a run's.

    Args:
        name: ``optimizer.name``.
        parameters: Weights on the meta device.
    """
    settings = OptimizerSettings(
        name=name,
        lr=1e-6,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        # Rounding by chance keeps the same states. Beside them it takes nothing in a GPU's kernel,
        # and on a CPU buffers of 1 to 15 MB, of which a trace knows nothing.
        stochastic_rounding=False,
    )
    return make_optimizer(parameters, settings)
