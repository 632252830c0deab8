"""State that makes a resumed run bit-identical, beside weights and optimizer.

The order of the data is a function of seed and step, so a checkpoint needs no more of it than the
step. What it does need: the states of the random number generators, for an adapter's dropout; a
loop progress that says nothing but the step; and an evaluation that was due when it was saved.
"""

from __future__ import annotations

import logging
import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

log = logging.getLogger(__name__)

_KEY = "random_states"


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators as plain values and tensors.

    Args:
        device: Device with the generator that counts beside the CPU's.
    """
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            *(int(position), int(has_gauss), float(cached)),
        ],
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Restores generators to the states that :func:`random_state` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def evaluate_now(trainer: pl.Trainer) -> None:
    """Evaluates ahead of a step, as a fit does between two; Lightning would take it as done."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    loop.restarting = False
    trainer.validating = True
    loop.run()
    trainer.training = True


class ExactResume(Callback):
    """Saves and restores what Lightning does not; stands before callbacks that draw numbers."""

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves the generators of every rank: each has its own."""
        own = random_state(pl_module.device)
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint[_KEY] = states
        checkpoint["epoch"] = 0
        _settle(checkpoint["loops"]["fit_loop"], trainer.global_step)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the states for later: something may still draw before the first step."""
        self._states = checkpoint[_KEY]
        if len(self._states) != trainer.world_size:
            log.info(
                "resume: the checkpoint is of %d processes, this run has %d: the data keeps "
                "their order, random numbers (adapter dropout) start again",
                len(self._states),
                trainer.world_size,
            )
            self._states = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Does the evaluation that was due when the checkpoint was saved."""
        step = trainer.global_step
        every = trainer.val_check_batch
        if not step or not every or step % every or pl_module.last_evaluation == step:
            return
        self._restore(trainer, pl_module)
        evaluate_now(trainer)
        self._states = [random_state(pl_module.device)] * trainer.world_size

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restores the generators before the first step: data loaders have drawn their seeds."""
        self._restore(trainer, pl_module)
        self._states = None

    def _restore(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._states is not None:
            set_random_state(self._states[trainer.global_rank], pl_module.device)


def _settle(loops: dict[str, Any], step: int) -> None:
    """Resets the loop progress to that right after a step, wherever the checkpoint is saved.

    The run is one Lightning epoch; what its loops count beside the step would make a difference
    between a checkpoint of an undisturbed run and one of a resumed run.
    """
    done = {"ready": step, "started": step, "processed": step, "completed": max(step - 1, 0)}
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    none = dict.fromkeys(done, 0)
    loops["epoch_loop.batch_progress"] |= {
        "total": dict(done),
        "current": dict(done),
        "is_last_batch": False,
    }
    loops["epoch_loop.state_dict"] |= {"_batches_that_stepped": max(step - 1, 0)}
    loops["epoch_loop.val_loop.batch_progress"] |= {
        "total": dict(none),
        "current": dict(none),
        "is_last_batch": False,
    }
    loops["epoch_progress"] |= {"total": dict(begun), "current": dict(begun)}
