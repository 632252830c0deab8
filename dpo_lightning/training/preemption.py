"""Stops a training at the same step's boundary on all ranks, and saves it there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from dpo_lightning.processes.signals import SignalWatch, Stopped
from dpo_lightning.training.checkpoints.files import checkpoint_path
from dpo_lightning.training.checkpoints.writer import is_saved, save_now


class Preemption(Callback):
    """Saves and stops after the step, or the batch of an evaluation, during which a signal came.

    It has to be the last callback: what the others do after a step is part of what is saved.

    Args:
        signals: Those that stop the run.
        folder: The run's ``checkpoints`` folder.
        keep: Number of checkpoints that stay.
    """

    def __init__(self, signals: SignalWatch, folder: Path, *, keep: int) -> None:
        self._signals = signals
        self._folder = folder
        self._keep = keep

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Defers signals: from now on there is a step to finish."""
        self._signals.defer()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops after the step if any rank has had a signal, which all of them know by now."""
        if pl_module.stop_signal:
            self._stop(trainer, pl_module.stop_signal)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stops between batches of an evaluation, which may take long; a resume does it again."""
        if not self._signals.deferring:
            return
        signum = self._signals.received
        if trainer.world_size > 1:
            agreed = torch.full((), signum, dtype=torch.int64, device=pl_module.device)
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MAX)
            signum = int(agreed)
        if signum:
            self._stop(trainer, signum)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Notes that the run is about to end, whatever the reason."""
        self._signals.notice()

    def _stop(self, trainer: pl.Trainer, signum: int) -> None:
        save_and_stop(trainer, signum, signals=self._signals, folder=self._folder, keep=self._keep)


def save_and_stop(
    trainer: pl.Trainer, signum: int, *, signals: SignalWatch, folder: Path, keep: int
) -> NoReturn:
    """Saves the step that was taken last and ends the run; all ranks call it together.

    Args:
        trainer: The trainer.
        signum: The signal that they agreed on.
        signals: Those that stop the run.
        folder: The run's ``checkpoints`` folder.
        keep: Number of checkpoints that stay.

    Raises:
        Stopped: Always.
    """
    step = trainer.global_step
    if not step:
        signals.notice()
        raise Stopped(signum)
    path = checkpoint_path(folder, step)
    if not is_saved(trainer, path):
        save_now(trainer, path, keep=keep)
    signals.notice()
    raise Stopped(signum, f"resume={path} resumes after step {step}")
