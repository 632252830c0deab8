"""The optimizer of a run, by its name: torch's AdamW, one that takes less memory, or a plugin's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.errors import UserError
from dpo_lightning.plugins import OPTIMIZERS
from dpo_lightning.training.low_memory import LowMemoryAdamW


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Settings of a run's optimizer.

    Attributes:
        name: ``adamw``; ``adamw_8bit`` for moments of 8 bits; or the name of a plugin's.
        lr: Peak learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, of matrices only: vectors (norms, biases) are not decayed.
        stochastic_rounding: True rounds bfloat16 weights by chance; None: yes.
        seed: Of the rounding.
        options: Options of a plugin's.
    """

    name: str = "adamw"
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    stochastic_rounding: bool | None = None
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


def make_optimizer(
    parameters: Iterable[Tensor], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Makes the optimizer of a run.

    Args:
        parameters: Weights to train, all of them on one kind of device; shards of FSDP2 too.
        settings: Name, rates and rounding.

    Raises:
        UserError: If a plugin's function makes something else.
    """
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name in OPTIMIZERS:
        return _plugin_optimizer(groups, settings)
    half = any(p.dtype == torch.bfloat16 for p in trained)
    by_chance = half and settings.stochastic_rounding is not False
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.name == "adamw_8bit" or by_chance:
        return LowMemoryAdamW(
            groups,
            **common,
            eight_bit=settings.name == "adamw_8bit",
            stochastic_rounding=by_chance,
            seed=settings.seed,
        )
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW(groups, **common, fused=fused)


def _plugin_optimizer(
    groups: list[dict[str, Any]], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    entry = OPTIMIZERS[settings.name]
    shared = {name: getattr(settings, name) for name in entry.shared}
    made = entry.build(groups, **shared, **settings.options)
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(
            f"optimizer={settings.name}: its plugin's function made a {type(made).__name__}; it "
            "has to return a torch.optim.Optimizer"
        )
    return made
