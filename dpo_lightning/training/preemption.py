"""Stops a training at a step's boundary, on all ranks at the same one, and saves it there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from dpo_lightning.processes.child_ranks import PARENT, ChildRanks
from dpo_lightning.processes.signals import SignalWatch, Stopped
from dpo_lightning.training.checkpoints.files import checkpoint_path, prune
from dpo_lightning.training.checkpoints.writer import DurableCheckpointIO, save_now


def take_over(trainer: pl.Trainer, children: ChildRanks) -> None:
    """Takes from Lightning what it does about signals, and about ranks that ended.

    Its handler of SIGTERM sends a message to all ranks, which hangs where they do not all send one;
    and before each step another one asks whether rank 0 had that signal. Our ranks ask each other
    once a step, after the backward pass, about everything at once. Its observer of the other ranks
    kills this one, so that nothing says how the run ended.
    """
    trainer._signal_connector = _NoHandlers(trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = _nothing  # type: ignore[method-assign]
    launcher = trainer.strategy.launcher
    if type(launcher) is _SubprocessScriptLauncher:
        trainer.strategy._launcher = _ObservedLauncher(launcher, children)


def _nothing() -> None:
    pass


class _NoHandlers(_SignalConnector):
    """Leaves the signals to whoever has them."""

    def register_signal_handlers(self) -> None:
        """Registers none."""

    def teardown(self) -> None:
        """There is nothing to restore."""


class _ObservedLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks as Lightning does; ``children`` looks after them."""

    def __init__(self, launcher: _SubprocessScriptLauncher, children: ChildRanks) -> None:
        super().__init__(launcher.cluster_environment, launcher.num_processes, launcher.num_nodes)
        self._children = children

    def launch(
        self, function: Any, *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any
    ) -> Any:
        """Starts them, once, and calls the function."""
        environment = self.cluster_environment
        environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not environment.creates_processes_externally:
            os.environ[PARENT] = str(os.getpid())
            try:
                self._call_children_scripts()
            finally:
                del os.environ[PARENT]
            self._children.observe(self.procs)
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)


class Preemption(Callback):
    """Saves and stops after the step, or the batch of an evaluation, during which a signal came.

    It has to be the last callback: what the others do after a step is part of what is saved.

    Args:
        signals: Those that stop the run.
        folder: The run's ``checkpoints`` folder.
        keep: How many checkpoints stay.
    """

    def __init__(self, signals: SignalWatch, folder: Path, *, keep: int) -> None:
        self._signals = signals
        self._folder = folder
        self._keep = keep

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on there is something to finish."""
        self._signals.defer()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """All ranks know the same by now."""
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
        """An evaluation may take longer than a scheduler waits; it is done again on resume."""
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
        """Whatever it is, the run is on its way out."""
        self._signals.notice()

    def _stop(self, trainer: pl.Trainer, signum: int) -> None:
        path = checkpoint_path(self._folder, trainer.global_step)
        io = trainer.strategy.checkpoint_io
        # Rank 0 writes; what it knows counts.
        saved = isinstance(io, DurableCheckpointIO) and io.last_saved == path
        if not trainer.strategy.broadcast(saved):
            save_now(trainer, path)
            if trainer.is_global_zero:
                prune(self._folder, newest=path, keep=self._keep)
        self._signals.notice()
        raise Stopped(signum, f"resume={path} goes on after step {trainer.global_step}")
