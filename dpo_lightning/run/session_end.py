"""End of a session: last evaluation, what is measured and exported, and what is said."""

from __future__ import annotations

import logging
from pathlib import Path

import lightning.pytorch as pl
import torch

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.errors import (
    OutOfMemoryError,
)
from dpo_lightning.evaluation.answer_rows import ANSWER_COLUMNS
from dpo_lightning.evaluation.answers import COLUMNS
from dpo_lightning.files import REPORT_FILE
from dpo_lightning.memory.peaks import (
    peak_bytes,
    reset_peak,
)
from dpo_lightning.reference.kinds import CachedReference
from dpo_lightning.run.build import (
    SessionCallbacks,
)
from dpo_lightning.run.closing import closing_lines
from dpo_lightning.run.conclude import Trained, conclude
from dpo_lightning.run.exported import choose_exported, say_shares
from dpo_lightning.run.finished import EXPORT
from dpo_lightning.run.record import reference_counts
from dpo_lightning.run.session_state import Session
from dpo_lightning.tracking import display
from dpo_lightning.training.checkpoints.files import (
    saved_checkpoints,
)
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.profiling import PROFILE

log = logging.getLogger(__name__)


def evaluate_last(
    session: Session,
    trainer: pl.Trainer,
    module: DPOModule,
    data: PreferenceDataModule,
    callbacks: SessionCallbacks,
) -> None:
    """The last evaluation, where that is not of these weights already; ranks part after it."""
    session.supervision.folder.begin(
        resumed=session.record.resumed is not None
    )  # there was no step left
    module.require_finite()
    device = trainer.strategy.root_device
    session.record.memory["training_peak_bytes"] = peak_bytes(device)
    reset_peak(device)
    session.supervision.signals.release()
    seen, accuracies = module.last_evaluation == trainer.global_step, module.eval_accuracies
    # A checkpoint's may be of another evaluation.max_prompts.
    seen = seen and accuracies is not None and len(accuracies) == len(data.eval_groups)
    if data.eval_groups and not seen:
        trainer.validate(module, datamodule=data, verbose=False)
    choose_exported(
        session.record,
        trainer=trainer,
        module=module,
        data=data,
        callbacks=callbacks,
        folder=session.plan.folders.run,
    )
    session.record.reference = _count_reference_rows(trainer, module)
    if session.prepared.ranks is None:
        session.supervision.children.release()  # what is left is rank 0's alone


def conclude_session(
    session: Session, trainer: pl.Trainer, trained: Trained, callbacks: SessionCallbacks
) -> None:
    """Measures, exports and shows what came of the training."""
    session.supervision.folder.check()
    rows = callbacks.samples.rows
    report: dict[str, float] = {}
    if trainer.is_global_zero or session.prepared.ranks is not None:
        report = conclude(
            trained,
            answers=[dict(zip(COLUMNS, row, strict=True)) for row in rows],
            record=session.record,
            metrics=session.metrics.last,
        )
    if trainer.is_global_zero:
        say_shares(session.throughput, callbacks.answers)
        display.show_metrics(session.console, session.metrics.last | session.record.metrics)
        if report:
            display.show_measured(session.console, report)
        if rows:
            display.show_samples(session.console, COLUMNS, rows)
            session.loggers.write_table("samples", COLUMNS, rows)
        if callbacks.answers is not None and (table := callbacks.answers.rows.table()):
            session.loggers.write_table("answers", ANSWER_COLUMNS, table)
        if session.plan.logger.log_model:
            session.loggers.keep_model(session.plan.folders.run / EXPORT)
        for sign in session.record.signs:
            log.warning("warning sign: %s", sign["says"])
    session.record.memory["evaluation_peak_bytes"] = peak_bytes(trained.device)


def say_where(session: Session) -> None:
    """Says where the model is, what to do with it, and where the run is in its loggers."""
    plan = session.plan
    run_dir = plan.folders.run
    merged = run_dir / "model-merged" if plan.evaluation.merge else None
    profile = run_dir / PROFILE if plan.trainer.profiler else None
    lines = closing_lines(run_dir, merged=merged, profile=profile)
    page = {"report": str(run_dir / REPORT_FILE)}
    for name, line in (session.where | page | lines).items():
        log.info("%-9s %s", name, line)


def _count_reference_rows(trainer: pl.Trainer, module: DPOModule) -> dict[str, int]:
    """Counts of the reference rows that all ranks asked for and computed."""
    reference = module.reference
    counts = torch.tensor([reference.rows, reference.computed], device=module.device)
    rows, computed = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    if isinstance(reference, CachedReference):
        rows = reference.rows
    return reference_counts(rows, min(rows, computed))


def with_last_checkpoint(error: OutOfMemoryError, run_dir: Path) -> OutOfMemoryError:
    """The error with what the run can go on from."""
    saved = saved_checkpoints(run_dir)
    where = f"the last checkpoint is {saved[0]}" if saved else "no checkpoint was saved yet"
    return OutOfMemoryError(f"{error}; {where}")
