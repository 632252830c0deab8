"""The weights that a run evaluates at its end and exports: the last ones, or the best."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.errors import CorruptArtifactError
from dpo_lightning.evaluation.on_the_way import AnswersOnTheWay
from dpo_lightning.run.build import SessionCallbacks
from dpo_lightning.run.record import RunRecord
from dpo_lightning.tracking.progress import Throughput
from dpo_lightning.training.checkpoints.best import BestCheckpoint
from dpo_lightning.training.checkpoints.files import CHECKPOINTS, checkpoint_path, find_damage
from dpo_lightning.training.module import DPOModule

log = logging.getLogger(__name__)


def choose_exported(
    record: RunRecord,
    *,
    trainer: pl.Trainer,
    module: DPOModule,
    data: PreferenceDataModule,
    callbacks: SessionCallbacks,
    folder: Path,
) -> None:
    """Takes the best weights in place of the last ones, where the settings want those.

    What is measured of them is in the record; rows of metrics stay those of the training.

    Args:
        record: Takes the step, and what selected it.
        trainer: The trainer, after the last evaluation.
        module: The trained module.
        data: The groups.
        callbacks: Know the best step; answer again.
        folder: The run's.

    Raises:
        CorruptArtifactError: If the best checkpoint is gone or damaged.
    """
    best = callbacks.best
    record.exported_step = trainer.global_step
    if best is None:
        return
    record.selection = best.entry()
    if not best.exports or best.step == trainer.global_step:
        return
    if best.step is None:
        log.warning(
            "checkpoint.export=best: %s was never a number, so the last weights are exported",
            best.monitor,
        )
        return
    module.take_weights(load_best(trainer, best, folder)["state_dict"])
    record.exported_step = best.step
    trainer.validate(module, datamodule=data, verbose=False)
    record.metrics |= module.exported_metrics or {}
    callbacks.samples.ask_again(trainer)
    if trainer.is_global_zero:
        log.info("the weights of step %d are exported, the best by %s", best.step, best.monitor)


def load_best(trainer: pl.Trainer, best: BestCheckpoint, folder: Path) -> dict[str, Any]:
    """The best checkpoint, on every rank.

    Args:
        trainer: The trainer.
        best: Knows where it is.
        folder: The run's.

    Raises:
        CorruptArtifactError: If it is gone or damaged.
    """
    path = best.path_of_best()
    damage = "it is gone" if path is None else find_damage(path)
    if path is None or damage is not None:
        where = path or checkpoint_path(folder / CHECKPOINTS, best.step or 0)
        raise CorruptArtifactError(
            f"checkpoint.export=best: {where}: {damage}; resume={folder} checkpoint.export=last "
            "exports the last weights"
        )
    return trainer.strategy.load_checkpoint(path, weights_only=True)


def say_shares(throughput: Throughput, answers: AnswersOnTheWay | None) -> None:
    """Says how much of a training's wall time its evaluations and their answers took.

    Args:
        throughput: Knows the time of the evaluations.
        answers: Knows that of the answers; None where none were drawn.
    """
    evaluating = throughput.evaluating_seconds
    total = throughput.seconds + evaluating
    if not evaluating:
        return
    drawn = "" if answers is None else f", their answers {answers.seconds / total:.1%}"
    log.info(
        "evaluations took %s of the training's wall time%s", f"{evaluating / total:.1%}", drawn
    )
