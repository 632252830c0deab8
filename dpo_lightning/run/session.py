"""One session: trainer, header, fit, evaluation, export and what is said at the end."""

from __future__ import annotations

import contextlib
import logging
import pickle
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from dpo_lightning.data.datamodule import PreferenceDataModule, steps_per_epoch
from dpo_lightning.errors import (
    CorruptArtifactError,
    DivergedError,
    DpoLightningError,
    OutOfMemoryError,
    UserError,
)
from dpo_lightning.evaluation.answers import COLUMNS, SHOWN
from dpo_lightning.files import DIVERGED_FILE, write_json
from dpo_lightning.memory.budget import say_if_over
from dpo_lightning.memory.estimate import check_fits
from dpo_lightning.memory.hardware import Hardware, decide_hardware
from dpo_lightning.memory.peaks import (
    bound_product_caches,
    giving_back,
    keep_freed_memory,
    peak_bytes,
    reset_peak,
)
from dpo_lightning.models.devices import settle_attention
from dpo_lightning.processes.child_ranks import ChildRanks
from dpo_lightning.processes.signals import SignalWatch
from dpo_lightning.reference.fill import Watch
from dpo_lightning.reference.kinds import CachedReference
from dpo_lightning.run.build import (
    Beginning,
    SessionCallbacks,
    make_data_module,
    make_measure,
    make_module,
    make_session_callbacks,
    make_trainer,
    say_forecast,
    shows_bar,
    what_is_pending,
)
from dpo_lightning.run.closing import closing_lines
from dpo_lightning.run.conclude import Trained, conclude
from dpo_lightning.run.evaluations import plan_evaluations, say_selection
from dpo_lightning.run.exported import choose_exported, say_shares
from dpo_lightning.run.finished import EXPORT
from dpo_lightning.run.folder import RunFolder
from dpo_lightning.run.header import header_facts
from dpo_lightning.run.identity import allowed_changes
from dpo_lightning.run.inputs import SourceRows
from dpo_lightning.run.placement import (
    Placed,
    choose_answering,
    place,
    with_reference,
    with_shards,
)
from dpo_lightning.run.plan import (
    Folders,
    RunPlan,
    TrainerPlan,
    choose_folders,
    make_plan,
    trainer_plan,
)
from dpo_lightning.run.prepare import Prepared, prepare
from dpo_lightning.run.record import RunRecord, reference_counts
from dpo_lightning.settings.schema import Config
from dpo_lightning.tracking import display
from dpo_lightning.tracking.destinations import (
    RunLoggers,
    TrackedRun,
    make_loggers,
    summary_of,
)
from dpo_lightning.tracking.loggers import JsonlLogger
from dpo_lightning.tracking.progress import PassProgress, Throughput
from dpo_lightning.tracking.quiet import quiet_libraries
from dpo_lightning.tracking.rungs import AtRung
from dpo_lightning.training.checkpoints.files import (
    find_checkpoint,
    read_manifest,
    run_of,
    saved_checkpoints,
)
from dpo_lightning.training.devices import check_there, take_device
from dpo_lightning.training.launching import start_others, take_over
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.profiling import PROFILE
from dpo_lightning.training.ranks import Ranks, leave_ranks, start_ranks
from dpo_lightning.training.schedule import make_schedule

log = logging.getLogger(__name__)

# Blocks of a reference pass after which a CPU's freed memory is given back; each time costs little
# beside so many.
_BLOCKS = 32


@dataclass(frozen=True, slots=True)
class Supervision:
    """Signals, ranks and the folder of a run: whatever may end it from outside.

    Attributes:
        signals: Those that stop it.
        children: The other ranks, once they are started.
        folder: The run's folder, which it holds.
    """

    signals: SignalWatch
    children: ChildRanks
    folder: RunFolder


def run_experiment(
    config: Config,
    rows: SourceRows | None,
    *,
    folder: RunFolder,
    resolved: dict[str, Any],
    record: RunRecord,
    signals: SignalWatch,
    children: ChildRanks,
) -> None:
    """Trains, evaluates and exports; fills ``record`` as facts become known.

    Args:
        config: The validated settings.
        rows: The rows that were read, or None for the controlled task.
        folder: The run's folder, which this process holds.
        resolved: The settings as plain values.
        record: What is known of the run.
        signals: Those that stop the run.
        children: The other ranks, once they are started.
    """
    quiet_libraries()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    folders = choose_folders(config, folder.path)
    check_there(config.trainer.accelerator, config.trainer.devices)
    take_device(config.trainer.accelerator, config.trainer.devices)
    hardware = decide_hardware(config.trainer, half_weights=config.model.dtype == "bfloat16")
    _settle_libraries(hardware)
    trainer = trainer_plan(config)
    # Lightning shares the cores out over the ranks that it starts; one pass serves any number.
    threads = torch.get_num_threads()
    ranks = _start_ranks(trainer, children)
    checkpoint = _find_checkpoint(config.resume, folder.path, ranks)
    prepared = prepare(
        config,
        rows,
        hardware=hardware,
        ranks=ranks,
        threads=threads,
        tokens=folders.tokens,
        resolved=resolved,
        record=record,
        folder=folder,
    )
    plan = _plan(config, folders, hardware, trainer, prepared, resolved)
    try:
        run_session(plan, prepared, checkpoint, record, Supervision(signals, children, folder))
    except AtRung:
        if ranks is not None:
            leave_ranks()
        raise
    if ranks is not None:
        leave_ranks()


def _plan(
    config: Config,
    folders: Folders,
    hardware: Hardware,
    trainer: TrainerPlan,
    prepared: Prepared,
    resolved: dict[str, Any],
) -> RunPlan:
    """The run's plan, with its evaluations."""
    groups, source = len(prepared.data.train), prepared.source
    course = plan_evaluations(
        config.evaluation,
        config.checkpoint,
        prepared.data,
        total_steps=make_schedule(config, groups=groups, bundled=source.bundled).total_steps,
        batch_size=config.data.batch_size,
        shared=prepared.models.scorer.shared,
    )
    return make_plan(
        config,
        folders=folders,
        hardware=hardware,
        trainer=trainer,
        source=source,
        groups=groups,
        resolved=resolved,
        course=course,
    )


def _settle_libraries(hardware: Hardware) -> None:
    """Settings of torch's kernels, ahead of the first product."""
    settle_attention(hardware.beside)
    if hardware.kind == "cpu":
        bound_product_caches()


def _start_ranks(trainer: TrainerPlan, children: ChildRanks) -> Ranks | None:
    """The processes that share the models' weights; None where each has its own."""
    if not trainer.sharded:
        return None
    return start_ranks(
        children,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        timeout=trainer.timeout,
    )


def _find_checkpoint(resume: str | None, run_dir: Path, ranks: Ranks | None) -> Path | None:
    """The checkpoint to resume from; where ranks share a model the first checks it for all."""
    if ranks is None:
        return find_checkpoint(resume, run_dir)
    return ranks.from_first(lambda: find_checkpoint(resume, run_dir))


def run_session(
    plan: RunPlan,
    prepared: Prepared,
    checkpoint: Path | None,
    record: RunRecord,
    supervision: Supervision,
) -> None:
    """Trains, evaluates, exports and says so; loggers are closed in every ending.

    Args:
        plan: The run's.
        prepared: Models and data.
        checkpoint: What to resume from.
        record: What is known of the run; filled.
        supervision: What may end the run from outside.
    """
    session = _open_session(plan, prepared, checkpoint, record, supervision)
    with contextlib.ExitStack() as ending:
        ending.enter_context(session)
        ending.enter_context(_reported(session))
        callbacks, trainer = _make_trainer(session, checkpoint)
        placed = _place(session, trainer)
        prepared = _with_models_in_place(session, placed)
        module, datamodule, trained = _build(session, prepared, placed, callbacks)
        reset_peak(placed.device)
        try:
            _fit(trainer, module, datamodule, checkpoint)
        except AtRung:
            session.children.release()  # all ranks end here
            raise
        _evaluate(session, trainer, module, datamodule, callbacks)
        _conclude(session, trainer, trained, callbacks)
    if session.is_first:
        _say_where(session)


@dataclass(slots=True)
class _Session:
    """A session from its loggers to its end, which is left in the record however it comes.

    Attributes:
        plan: The run's.
        prepared: Models and data before they were placed.
        record: What is known of the run.
        signals: Those that stop the run.
        children: The other ranks, once they are started.
        folder: The run's folder.
        metrics: Logger of ``metrics.jsonl``.
        loggers: Those beside it.
        throughput: Counts pairs and tokens.
        console: Where a person reads.
        trainer: The trainer, once it is made.
        where: How to find the run in each logger, once it has ended.
    """

    plan: RunPlan
    prepared: Prepared
    record: RunRecord
    signals: SignalWatch
    children: ChildRanks
    folder: RunFolder
    metrics: JsonlLogger
    loggers: RunLoggers
    throughput: Throughput = field(default_factory=Throughput)
    console: Console = field(default_factory=Console)
    trainer: pl.Trainer | None = None
    where: dict[str, str] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """True in the process that writes and speaks for all, once there is a trainer."""
        return self.trainer is not None and self.trainer.is_global_zero

    def __enter__(self) -> None:
        """Nothing: its loggers are open."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Fills the record and ends the run in its loggers."""
        self.signals.notice()
        record, trainer = self.record, self.trainer
        if trainer is not None:
            record.step = trainer.global_step
            epoch = steps_per_epoch(len(self.prepared.data.train), self.plan.batches.size)
            record.epoch = trainer.global_step / epoch
        # What the conclusion measured is of the weights that are exported.
        record.metrics = self.metrics.last | record.metrics
        record.throughput |= {
            "pairs_per_second": self.throughput.pairs_per_second,
            "tokens_per_second": self.throughput.tokens_per_second,
            "seconds": self.throughput.seconds,
            "evaluating_seconds": self.throughput.evaluating_seconds,
        }
        if trainer is None or trainer.is_global_zero:
            summary = summary_of(self.plan.facts, record.metrics)
            self.where = self.loggers.finish(summary, exit_code=_exit_code(error))


def _exit_code(error: BaseException | None) -> int:
    """The code that a session ends with, as wandb is told it."""
    if isinstance(error, DpoLightningError):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 0 if error is None else 1


# The steps --------------------------------------------------------------------------------------


def _open_session(
    plan: RunPlan,
    prepared: Prepared,
    checkpoint: Path | None,
    record: RunRecord,
    supervision: Supervision,
) -> _Session:
    """Says what is resumed, and opens the loggers."""
    saved = {} if checkpoint is None else read_manifest(checkpoint)
    changed = None
    if checkpoint is not None:
        changed = allowed_changes(
            saved.get("identity", {}), prepared.identity, may_change=plan.checkpoints.may_change
        )
        record.resumed = {"from": str(checkpoint), "step": saved["step"], "changed": changed}
    folder = supervision.folder
    metrics = JsonlLogger(plan.folders.run)
    if not folder.begun:
        metrics.hold_back()
        folder.put("metrics.jsonl", metrics.kept)
        folder.when_begun(metrics.go_on)
    loggers = make_loggers(
        plan.logger,
        TrackedRun(
            name=plan.names.run,
            folder=plan.folders.run,
            config=plan.names.settings,
            facts=plan.facts,
            # What another experiment logs does not belong to the run of the first one.
            earlier=None if checkpoint is None or changed else run_of(checkpoint),
        ),
        rows=metrics.rows,
        wandb_run_id=saved.get("wandb_run_id"),
        when_begun=folder.when_begun,
    )
    return _Session(
        plan,
        prepared,
        record,
        signals=supervision.signals,
        children=supervision.children,
        folder=folder,
        metrics=metrics,
        loggers=loggers,
    )


@contextlib.contextmanager
def _reported(session: _Session) -> Iterator[None]:
    """Traces of an error: ``diverged.json``, and the last checkpoint in its message."""
    run_dir = session.plan.folders.run
    try:
        yield
    except DpoLightningError as error:
        if isinstance(error, DivergedError) and error.report and session.is_first:
            # A step that cannot be taken is an outcome, the first one too.
            session.folder.begin(resumed=session.record.resumed is not None)
            write_json(run_dir / DIVERGED_FILE, error.report)
        if isinstance(error, OutOfMemoryError):
            raise with_last_checkpoint(error, run_dir) from error
        raise


def _make_trainer(
    session: _Session, checkpoint: Path | None
) -> tuple[SessionCallbacks, pl.Trainer]:
    """All callbacks, then the trainer; the ranks that it starts are looked after."""
    assert session.record.config_hash is not None
    callbacks = make_session_callbacks(
        session.plan,
        session.prepared,
        metrics=session.metrics,
        throughput=session.throughput,
        config_hash=session.record.config_hash,
        signals=session.signals,
        first=Beginning(session.folder, resumed=session.record.resumed is not None),
        resumed=checkpoint,
    )
    identity, run_id = session.prepared.identity, session.loggers.wandb_run_id
    trainer = make_trainer(
        session.plan,
        loggers=[session.metrics, *session.loggers.all],
        callbacks=callbacks.all,
        manifest={"identity": identity, "wandb_run_id": run_id},
    )
    session.trainer = trainer
    take_over(trainer, session.children)
    return callbacks, trainer


def _place(session: _Session, trainer: pl.Trainer) -> Placed:
    """Precision and budget on the trainer's devices; the header says them."""
    plan, prepared = session.plan, session.prepared
    placed = place(plan, prepared, trainer)
    check_fits(placed.estimate, plan.memory.check)
    session.record.memory = {"estimated_bytes": placed.estimate.footprint.parts()}
    # What the header says of attention.
    prepared.models.scorer.choose_kernel(
        placed.device, placed.computation.dtype(prepared.source.dtype)
    )
    if trainer.is_global_zero:
        text = yaml.safe_dump(plan.names.settings)
        session.folder.put("config.yaml", text.encode)
        display.show_header(session.console, header_facts(plan, prepared, placed))
    return placed


def _with_models_in_place(session: _Session, placed: Placed) -> Prepared:
    """Shards and reference, in this order: one is computed with the other.

    The other ranks are started ahead of the reference pass, in which they take part.
    """
    prepared = session.prepared
    models = prepared.models
    if placed.device.type == "cpu":
        keep_freed_memory()
    if placed.budget.checkpointing:
        models.policy.activation_checkpointing_enable({"use_reentrant": False})
    prepared = with_shards(prepared, placed.computation)
    assert session.trainer is not None
    if models.reference is None:
        start_others(session.trainer)
    bar = shows_bar(session.plan.trainer) and session.is_first
    check = session.children.check
    if placed.device.type == "cpu":
        check = giving_back(check, every=_BLOCKS)
    watch = Watch(check, PassProgress(session.console if bar else None))
    prepared = with_reference(session.plan, prepared, placed, watch=watch)
    reference = prepared.models.reference
    assert reference is not None
    session.record.reference = reference_counts(reference.rows, reference.computed)
    return prepared


def _build(
    session: _Session, prepared: Prepared, placed: Placed, callbacks: SessionCallbacks
) -> tuple[DPOModule, PreferenceDataModule, Trained]:
    """Module and data, and what the end of the run needs of them."""
    plan, models = session.plan, prepared.models
    groups, answering = choose_answering(plan, prepared, placed.computation)
    callbacks.samples.ask(groups[:SHOWN], models=models, answering=answering)
    if callbacks.answers is not None:
        callbacks.answers.ask(groups, models=models, answering=answering)
    if callbacks.rung is not None:
        measure = make_measure(
            plan, prepared, groups=groups, answering=answering, signals=session.signals
        )
        callbacks.rung.ask(measure)
    pending = what_is_pending(session.trainer, session.signals)
    module = make_module(plan, prepared, placed, pending_signal=pending)
    datamodule = make_data_module(plan, prepared, placed)
    if session.is_first:
        say_forecast(plan, prepared, groups, answering)
        say_if_over(prepared.data.train, placed.budget, shared=models.scorer.shared)
        say_selection(plan.evaluation.course)
    return (
        module,
        datamodule,
        Trained(plan, prepared, module, groups, answering, callbacks.curve, placed.device),
    )


def _fit(
    trainer: pl.Trainer, module: DPOModule, data: PreferenceDataModule, checkpoint: Path | None
) -> None:
    """Trains; what ended the training early comes out as what it was."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:
        # Lightning exits so where a plugin raised what Ctrl-C does; any other exit means itself.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except MisconfigurationException as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    except pickle.UnpicklingError as error:
        raise CorruptArtifactError(
            f"resume={checkpoint}: it holds more than numbers, texts and their containers, which "
            "is never loaded, as it could run code; name a checkpoint that a run of this project "
            "wrote"
        ) from error


def _evaluate(
    session: _Session,
    trainer: pl.Trainer,
    module: DPOModule,
    data: PreferenceDataModule,
    callbacks: SessionCallbacks,
) -> None:
    """The last evaluation, where that is not of these weights already; ranks part after it."""
    session.folder.begin(resumed=session.record.resumed is not None)  # there was no step left
    module.require_finite()
    device = trainer.strategy.root_device
    session.record.memory["training_peak_bytes"] = peak_bytes(device)
    reset_peak(device)
    session.signals.release()
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
        session.children.release()  # what is left is rank 0's alone


def _conclude(
    session: _Session, trainer: pl.Trainer, trained: Trained, callbacks: SessionCallbacks
) -> None:
    """Measures, exports and shows what came of the training."""
    session.folder.check()
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
        if session.plan.logger.log_model:
            session.loggers.keep_model(session.plan.folders.run / EXPORT)
        for sign in session.record.signs:
            log.warning("a sign of a failed training: %s", sign["says"])
    session.record.memory["evaluation_peak_bytes"] = peak_bytes(trained.device)


def _say_where(session: _Session) -> None:
    """Says where the model is, what to do with it, and where the run is in its loggers."""
    plan = session.plan
    run_dir = plan.folders.run
    merged = run_dir / "model-merged" if plan.evaluation.merge else None
    profile = run_dir / PROFILE if plan.trainer.profiler else None
    lines = closing_lines(run_dir, merged=merged, profile=profile)
    for name, line in (lines | session.where).items():
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
