"""The end of a run that overfits a few groups on purpose: their loss has fallen to half."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)

_SHARE = 0.5


class UntilOverfit(Callback):
    """Ends the training where the loss has fallen to half of its first value, and says so.

    Args:
        groups: Groups that are trained on.
    """

    def __init__(self, groups: int) -> None:
        self._groups = groups
        self._first: float | None = None
        self._last = 0.0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks at the loss, which is the mean over all ranks."""
        loss = trainer.callback_metrics.get("train/loss")
        if loss is None:
            return  # a step that was passed over
        self._last = float(loss)
        if self._first is None:
            self._first = self._last
        if self._has_fallen:
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Says what came of it."""
        if self._first is None or not trainer.is_global_zero:
            return
        course = (
            f"loss {self._first:.4g} -> {self._last:.4g} on {self._groups} groups in "
            f"{trainer.global_step} steps"
        )
        if self._has_fallen:
            log.info("overfit: %s", course)
        else:
            log.warning(
                "did not overfit: %s; try a larger optimizer.lr= or trainer.max_steps=, and "
                "inspect the rows",
                course,
            )

    @property
    def _has_fallen(self) -> bool:
        return self._first is not None and self._last <= _SHARE * self._first
