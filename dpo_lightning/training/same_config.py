"""Check that all ranks of a run were started with the same settings."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from dpo_lightning.errors import UserError


class SameConfig(Callback):
    """Refuses to train when the ranks of a run were started with different settings.

    Args:
        config_hash: Hash of this rank's settings, data and weights, hexadecimal.
    """

    def __init__(self, config_hash: str) -> None:
        self._config_hash = config_hash

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compares the hashes of all ranks.

        Raises:
            UserError: On every rank, if two differ.
        """
        if trainer.world_size == 1:
            return
        # 31 bits at a time: exact in whatever type a device gathers.
        parts = [int(self._config_hash[i : i + 7], 16) for i in range(0, 28, 7)]
        own = torch.tensor(parts, dtype=torch.int64, device=pl_module.device)
        everyone: Any = trainer.strategy.all_gather(own)
        if not torch.equal(everyone, own.expand_as(everyone)):
            raise UserError(
                "the processes of this run have different settings, data or weights: start each "
                "with the same command, and a sweep with hydra/launcher=devices"
            )
