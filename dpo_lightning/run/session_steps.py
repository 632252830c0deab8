"""Steps of a session: loggers, trainer, models in place, training, and its end."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.errors import (
    CorruptArtifactError,
    DivergedError,
    DpoLightningError,
    OutOfMemoryError,
    UserError,
)
from dpo_lightning.evaluation.answers import SHOWN
from dpo_lightning.files import DIVERGED_FILE, write_json
from dpo_lightning.memory.budget import say_if_over
from dpo_lightning.memory.estimate import check_fits
from dpo_lightning.memory.peaks import (
    giving_back,
    keep_freed_memory,
    reset_peak,
)
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.reference.fill import Watch
from dpo_lightning.reference.moving import say_if_still
from dpo_lightning.run.build import (
    Beginning,
    SessionCallbacks,
    make_data_module,
    make_measure,
    make_module,
    make_session_callbacks,
    make_trainer,
    measuring_work,
    say_forecast,
    what_is_pending,
)
from dpo_lightning.run.conclude import Trained
from dpo_lightning.run.evaluations import say_selection
from dpo_lightning.run.header import header_facts
from dpo_lightning.run.identity import allowed_changes
from dpo_lightning.run.placement import (
    Placed,
    choose_answering,
    place,
    with_reference,
    with_shards,
)
from dpo_lightning.run.plan import (
    RunPlan,
)
from dpo_lightning.run.prepare import Prepared
from dpo_lightning.run.record import RunRecord, reference_counts
from dpo_lightning.run.rounds.work import make_round_work
from dpo_lightning.run.session_end import (
    conclude_session,
    evaluate_last,
    say_where,
    with_last_checkpoint,
)
from dpo_lightning.run.session_state import Session, Supervision
from dpo_lightning.tracking import display
from dpo_lightning.tracking.destinations import make_loggers
from dpo_lightning.tracking.loggers import JsonlLogger
from dpo_lightning.tracking.progress import Progress
from dpo_lightning.tracking.rungs import AtRung
from dpo_lightning.tracking.tracked import TrackedRun
from dpo_lightning.training.checkpoints.files import (
    read_manifest,
    run_of,
)
from dpo_lightning.training.launching import start_others, take_over
from dpo_lightning.training.module import DPOModule

# Blocks of a reference pass after which a CPU's freed memory is given back; each time costs little
# beside so many.
_BLOCKS = 32


def run_session(
    plan: RunPlan,
    prepared: Prepared,
    checkpoint: Path | None,
    record: RunRecord,
    supervision: Supervision,
    show: ShowPhase,
) -> None:
    """Trains, evaluates, exports and says so; loggers are closed in every ending.

    Args:
        plan: The run's.
        prepared: Models and data.
        checkpoint: What to resume from.
        record: What is known of the run; filled.
        supervision: What may end the run from outside.
        show: Shows how far long phases are.
    """
    session = _open_session(plan, prepared, checkpoint, record, supervision, show)
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
            session.supervision.children.release()  # all ranks end here
            raise
        evaluate_last(session, trainer, module, datamodule, callbacks)
        conclude_session(session, trainer, trained, callbacks)
    if session.is_first:
        say_where(session)


# The steps --------------------------------------------------------------------------------------


def _open_session(
    plan: RunPlan,
    prepared: Prepared,
    checkpoint: Path | None,
    record: RunRecord,
    supervision: Supervision,
    show: ShowPhase,
) -> Session:
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
    return Session(
        plan,
        prepared,
        record,
        supervision,
        metrics=metrics,
        loggers=loggers,
        show=show,
    )


@contextlib.contextmanager
def _reported(session: Session) -> Iterator[None]:
    """Traces of an error: ``diverged.json``, and the last checkpoint in its message."""
    run_dir = session.plan.folders.run
    try:
        yield
    except DpoLightningError as error:
        if isinstance(error, DivergedError) and error.report and session.is_first:
            # A step that cannot be taken is an outcome, the first one too.
            session.supervision.folder.begin(resumed=session.record.resumed is not None)
            write_json(run_dir / DIVERGED_FILE, error.report)
        if isinstance(error, OutOfMemoryError):
            raise with_last_checkpoint(error, run_dir) from error
        raise


def _make_trainer(session: Session, checkpoint: Path | None) -> tuple[SessionCallbacks, pl.Trainer]:
    """All callbacks, then the trainer; the ranks that it starts are looked after."""
    assert session.record.config_hash is not None
    callbacks = make_session_callbacks(
        session.plan,
        session.prepared,
        metrics=session.metrics,
        throughput=session.throughput,
        config_hash=session.record.config_hash,
        signals=session.supervision.signals,
        first=Beginning(session.supervision.folder, resumed=session.record.resumed is not None),
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
    take_over(trainer, session.supervision.children)
    return callbacks, trainer


def _place(session: Session, trainer: pl.Trainer) -> Placed:
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
        session.supervision.folder.put("config.yaml", text.encode)
        display.show_header(session.console, header_facts(plan, prepared, placed))
    return placed


def _with_models_in_place(session: Session, placed: Placed) -> Prepared:
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
    if models.reference is None or models.movement is not None:
        start_others(session.trainer)
    check = session.supervision.children.check
    if placed.device.type == "cpu":
        check = giving_back(check, every=_BLOCKS)
    watch = Watch(check, session.show if session.is_first else unshown)
    prepared = with_reference(session.plan, prepared, placed, watch=watch)
    reference = prepared.models.reference
    assert reference is not None
    session.record.reference = reference_counts(reference.rows, reference.computed)
    return prepared


def _build(
    session: Session, prepared: Prepared, placed: Placed, callbacks: SessionCallbacks
) -> tuple[DPOModule, PreferenceDataModule, Trained]:
    """Module and data, and what the end of the run needs of them."""
    plan, models = session.plan, prepared.models
    groups, answering = choose_answering(plan, prepared, placed.computation)
    callbacks.samples.ask(groups[:SHOWN], models=models, answering=answering)
    within = replace(answering, show=_show_within(session, callbacks))
    if callbacks.answers is not None:
        callbacks.answers.ask(groups, models=models, answering=within, judge=prepared.judge)
    if callbacks.rung is not None:
        measure = make_measure(
            plan, prepared, groups=groups, answering=within, signals=session.supervision.signals
        )
        callbacks.rung.ask(measure, work=measuring_work(plan, prepared))
    pending = what_is_pending(session.trainer, session.supervision.signals)
    module = make_module(plan, prepared, placed, pending_signal=pending)
    if callbacks.rounds is not None:
        callbacks.rounds.ask(
            make_round_work(
                plan,
                prepared,
                placed,
                answering=answering,
                check=session.supervision.children.check,
                show=within.show if session.is_first else unshown,
            )
        )
    datamodule = make_data_module(plan, prepared, placed, callbacks.rounds)
    if session.is_first:
        say_forecast(plan, prepared, groups, answering)
        say_if_over(prepared.data.train, placed.budget, shared=models.scorer.shared)
        say_selection(plan.evaluation.course)
        say_if_still(prepared.models.movement, total_steps=plan.schedule.total_steps)
    return (
        module,
        datamodule,
        Trained(
            plan,
            prepared,
            module,
            groups,
            replace(answering, show=session.show),
            callbacks.curve,
            placed.device,
            session.show,
        ),
    )


def _show_within(session: Session, callbacks: SessionCallbacks) -> ShowPhase:
    """Shows phases inside the training: below its bar, where there is one."""
    bars = [own.beside for own in callbacks.all if isinstance(own, Progress)]
    return bars[0] if bars else session.show


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
