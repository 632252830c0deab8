"""Makes callbacks, trainer, module and data module of a session out of its plan."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.rounds import RoundsDataModule
from dpo_lightning.data.rows import prompt_of_key
from dpo_lightning.data.splits import digest_of
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answer_rows import AnswerRows, Keeper
from dpo_lightning.evaluation.answers import Answering, SampleAnswers
from dpo_lightning.evaluation.exact import ExactCurve
from dpo_lightning.evaluation.on_the_way import AnswersOnTheWay, StartEvaluation
from dpo_lightning.evaluation.rungs import (
    Measure,
    RungStop,
    exact_rewards,
    held_out,
    judged,
    work_of,
)
from dpo_lightning.processes.signals import SignalWatch
from dpo_lightning.run.evaluations import monitored_rows
from dpo_lightning.run.folder import RunFolder
from dpo_lightning.run.placement import Placed
from dpo_lightning.run.plan import RunPlan, TrainerPlan
from dpo_lightning.run.prepare import Prepared
from dpo_lightning.run.rounds.conduct import RoundConductor
from dpo_lightning.run.rounds.kept import Saving
from dpo_lightning.settings.metric_names import JUDGE_METRIC
from dpo_lightning.tracking.loggers import JsonlLogger
from dpo_lightning.tracking.progress import LogProgress, MetricRows, Progress, Throughput
from dpo_lightning.training.checkpoints.best import BestCheckpoint
from dpo_lightning.training.checkpoints.exact_resume import ExactResume
from dpo_lightning.training.checkpoints.writer import (
    PARTS,
    WRITE_FAILED,
    Checkpoints,
    DurableCheckpointIO,
)
from dpo_lightning.training.library_callbacks import make_all_callbacks
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.overfit import UntilOverfit
from dpo_lightning.training.precision import trainer_precision
from dpo_lightning.training.preemption import Preemption
from dpo_lightning.training.profiling import make_profiler
from dpo_lightning.training.ranks import refuse_as_user_error
from dpo_lightning.training.same_config import SameConfig
from dpo_lightning.training.strategies import ShardedStrategy

log = logging.getLogger(__name__)

# Steps of a round from which on its end is saved, so that a kill in the next round's drawing costs
# no step; of shorter ones each would be.
_SAVED_ROUND = 20


class Beginning(Callback):
    """The first callback of all: after a step this run's files take the place of an earlier one's.

    Args:
        folder: The run's folder.
        resumed: True if the run goes on from a checkpoint.

    Attributes:
        folder: The run's folder.
    """

    def __init__(self, folder: RunFolder, *, resumed: bool) -> None:
        self.folder = folder
        self._resumed = resumed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begins after the first step, and looks after each if the folder is still there."""
        if trainer.is_global_zero:
            self.folder.check()
        self.folder.begin(resumed=self._resumed)


@dataclass(frozen=True, slots=True)
class SessionCallbacks:
    """Callbacks of a session.

    Attributes:
        all: In the order in which the trainer calls them.
        samples: Those of them that collect answers,
        curve: and measure what is exactly true; None but for the controlled task.
        rung: Ends the run at a rung of its sweep; None where it has none.
        answers: Draws answers at evaluations; None where it draws none.
        best: Knows the best checkpoint; None where nothing selects one.
        rounds: Makes the groups of rounds; None where all are given rows.
    """

    all: list[Callback]
    samples: SampleAnswers
    curve: ExactCurve | None
    rung: RungStop | None
    answers: AnswersOnTheWay | None
    best: BestCheckpoint | None
    rounds: RoundConductor | None = None


def make_session_callbacks(
    plan: RunPlan,
    prepared: Prepared,
    *,
    metrics: JsonlLogger,
    throughput: Throughput,
    config_hash: str,
    signals: SignalWatch,
    first: Beginning,
    resumed: Path | None,
) -> SessionCallbacks:
    """All callbacks, the package's own and those of plugins.

    Args:
        plan: The run's.
        prepared: Models and data.
        metrics: Where rows of metrics go.
        throughput: Counts what progress shows.
        config_hash: What all ranks have to agree about.
        signals: Those that stop the run.
        first: Puts the run's files in their place.
        resumed: The checkpoint that the run goes on from.
    """
    # Before all others but that: what they ask at evaluations is no part of the loop's time.
    samples, curve, answers = SampleAnswers(), _curve(plan, prepared), _answers(plan, first.folder)
    own: list[Callback] = [first, samples, *(x for x in (curve, answers) if x is not None)]
    own += [SameConfig(config_hash), MetricRows(metrics), throughput]
    own += [ExactResume(), *make_all_callbacks(plan.trainer.callbacks)]
    kept = plan.checkpoints
    folder = plan.folders.checkpoints
    rounds = _rounds(plan, first.folder, signals=signals, throughput=throughput, resumed=resumed)
    if rounds is not None:
        own.append(rounds)
    own.append(
        Checkpoints(
            folder,
            every_n_steps=kept.every_n_steps,
            keep=kept.keep,
            last=kept.last,
            round_steps=_saved_rounds(plan),
        )
    )
    own += _progress(plan, throughput)
    if plan.trainer.max_time is not None:
        # The trainer's own would come last, where what is saved at a signal has to be.
        own.append(Timer(duration=plan.trainer.max_time))
    if plan.batches.overfit:
        own.append(UntilOverfit(len(prepared.data.train)))
    best = _best(plan, prepared, metrics, resumed)
    if best is not None:
        own.append(best)
    course = plan.evaluation.course
    if course is not None and course.on_start:
        own.append(StartEvaluation())
    rung = _rung(plan)
    if rung is not None:
        own.append(rung)
    own.append(Preemption(signals, folder, keep=kept.keep))
    return SessionCallbacks(own, samples, curve, rung, answers, best, rounds)


def _rung(plan: RunPlan) -> RungStop | None:
    """The end at a rung of the sweep, where the run has one."""
    kept = plan.checkpoints
    if kept.rung is None:
        return None
    return RungStop(
        plan.folders.run,
        plan.folders.checkpoints,
        kept.rung,
        total_steps=plan.schedule.total_steps,
        warmup_steps=plan.schedule.warmup_steps,
        keep=kept.keep,
    )


def _rounds(
    plan: RunPlan,
    folder: RunFolder,
    *,
    signals: SignalWatch,
    throughput: Throughput,
    resumed: Path | None,
) -> RoundConductor | None:
    """The one who makes the groups of rounds, where there are some."""
    if plan.batches.rounds is None:
        return None
    return RoundConductor(
        plan.batches.rounds,
        Saving(folder, plan.folders.checkpoints, plan.checkpoints.keep, resumed),
        signals=signals,
        throughput=throughput,
        seed=plan.seed,
    )


def _saved_rounds(plan: RunPlan) -> int | None:
    """Steps of a round, where each one's end is worth a checkpoint; None: it is not."""
    steps = plan.schedule.round_steps
    return steps if steps is not None and steps >= _SAVED_ROUND else None


def _progress(plan: RunPlan, throughput: Throughput) -> list[Callback]:
    """The bar, or lines in its place."""
    if shows_bar(plan.trainer):
        return [Progress(throughput)]
    if plan.trainer.progress:
        return [LogProgress(throughput, total_steps=plan.schedule.total_steps)]
    return []


def _curve(plan: RunPlan, prepared: Prepared) -> ExactCurve | None:
    """Exact quantities at evaluations, where they are known."""
    task, reference_logps = prepared.task, prepared.reference_outcome_logps
    if task is None or reference_logps is None:
        return None
    course = plan.evaluation.course
    always = course is None or course.exact
    return ExactCurve(
        task,
        reference_logps,
        prepared.models.scorer,
        beta=plan.beta,
        from_step=0 if always else plan.schedule.total_steps,
    )


def _answers(plan: RunPlan, keeper: Keeper) -> AnswersOnTheWay | None:
    """Answers at evaluations before the last."""
    course = plan.evaluation.course
    if course is None or not course.samples:
        return None
    selects = course.selection is not None and course.selection.monitor == JUDGE_METRIC
    return AnswersOnTheWay(
        count=course.samples,
        total_steps=plan.schedule.total_steps,
        seed=plan.seed,
        last_too=selects,
        rows=AnswerRows(plan.folders.run, keeper),
        # A curve of each round needs it; on the embedded task it is exactly known.
        always_kl=plan.batches.rounds is not None and not plan.batches.rounds.embedded,
    )


def _best(
    plan: RunPlan, prepared: Prepared, metrics: JsonlLogger, resumed: Path | None
) -> BestCheckpoint | None:
    """Keeper of the best checkpoint, where a metric selects one."""
    course = plan.evaluation.course
    if course is None or course.selection is None:
        return None
    groups = prepared.data.all_evaluated_groups()
    rows = monitored_rows(course.selection.monitor, course.held_out)
    return BestCheckpoint(
        plan.folders.checkpoints,
        course.selection,
        sample=digest_of(groups[row] for row in rows),
        every=course.every,
        total_steps=plan.schedule.total_steps,
        keep=plan.checkpoints.keep,
        resumed=resumed,
        logged=lambda: metrics.last,
    )


def shows_bar(trainer: TrainerPlan) -> bool:
    """Rich draws a bar on a terminal; in a file its control characters would be noise."""
    return trainer.progress and sys.stdout.isatty()


def make_trainer(
    plan: RunPlan,
    *,
    loggers: list[Logger],
    callbacks: list[Callback],
    manifest: dict[str, Any],
) -> pl.Trainer:
    """The trainer.

    Args:
        plan: The run's.
        loggers: Where metrics go.
        callbacks: In this order.
        manifest: What the manifest of each checkpoint says of the run.

    Raises:
        UserError: If Lightning refuses the settings.
    """
    trainer, schedule, course = plan.trainer, plan.schedule, plan.evaluation.course
    strategy = _make_strategy(trainer)
    with refuse_as_user_error():
        return pl.Trainer(
            accelerator=trainer.accelerator,
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=strategy,
            precision=trainer_precision(plan.hardware.precision),
            max_steps=schedule.total_steps,
            max_epochs=-1,
            logger=loggers,
            callbacks=callbacks,
            # The module decides when to log, so that an interval's mean is logged.
            log_every_n_steps=1,
            val_check_interval=schedule.total_steps if course is None else course.every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_checkpointing=False,  # Lightning's own
            plugins=[DurableCheckpointIO(manifest, PARTS, background=True)],
            enable_progress_bar=shows_bar(trainer),
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=False,
            deterministic=trainer.deterministic,
            detect_anomaly=trainer.detect_anomaly,
            profiler=make_profiler(trainer.profiler, plan.folders.run),
            default_root_dir=plan.folders.run,
        )


def _make_strategy(trainer: TrainerPlan) -> Any:
    """Lightning's strategy, or the name of one that needs no arguments."""
    if trainer.strategy == "ddp":
        return DDPStrategy(
            find_unused_parameters=trainer.find_unused_parameters, timeout=trainer.timeout
        )
    return ShardedStrategy(timeout=trainer.timeout) if trainer.sharded else trainer.strategy


def make_measure(
    plan: RunPlan,
    prepared: Prepared,
    *,
    groups: Sequence[TokenGroup],
    answering: Answering,
    signals: SignalWatch,
) -> Measure:
    """The measure of a run at its rung.

    Args:
        plan: The run's.
        prepared: Models and data.
        groups: Whose prompts are answered.
        answering: How.
        signals: Those that stop the run.

    Raises:
        UserError: If the run has nothing to measure by.
    """
    goal = plan.checkpoints.rung
    assert goal is not None
    if goal.metric == "controlled/expected_reward":
        assert prepared.task is not None
        return exact_rewards(prepared.task, prepared.models.scorer)
    if goal.metric == "samples/judge":
        assert prepared.judge is not None
        return judged(
            prepared.models,
            groups,
            count=plan.evaluation.samples,
            seed=plan.seed,
            answering=answering,
            judge=prepared.judge,
        )
    if not prepared.data.eval:
        raise UserError(
            f"sweep.prune_metric={goal.metric}: no held-out rows to compare trials by; set "
            "data.eval= or a larger data.eval_fraction="
        )
    return held_out(goal.metric, prepared.data.evaluated_groups(), signals)


def measuring_work(plan: RunPlan, prepared: Prepared) -> float:
    """Work of a run's measure at its rung, in optimizer steps; that of answers is not counted.

    Args:
        plan: The run's.
        prepared: Models and data.
    """
    goal = plan.checkpoints.rung
    if goal is None or goal.metric in ("controlled/expected_reward", "samples/judge"):
        return 0.0
    return work_of(len(prepared.data.evaluated_groups()), batch_size=plan.batches.size)


def say_forecast(
    plan: RunPlan, prepared: Prepared, groups: Sequence[TokenGroup], answering: Answering
) -> None:
    """Says what the judging of a run's answers may cost, before the training.

    Args:
        plan: The run's.
        prepared: Models and data.
        groups: Whose prompts are answered, in turn.
        answering: How.
    """
    if prepared.judge is None or not groups:
        return
    asked = [groups[i % len(groups)] for i in range(plan.evaluation.samples)]
    prompts = [prompt_of_key(group.prompt_key) for group in asked]
    cost = prepared.judge.forecast(prompts, answer_tokens=answering.max_new_tokens)
    if cost is not None:
        log.info("judge: after the training %s; an answer's token counts as two", cost)


def what_is_pending(trainer: pl.Trainer | None, signals: SignalWatch) -> Callable[[], int]:
    """Asks for what is to end the training on all ranks: a failed write, or a signal's number."""
    io = None if trainer is None else trainer.strategy.checkpoint_io

    def pending() -> int:
        failed = isinstance(io, DurableCheckpointIO) and io.has_failed
        return WRITE_FAILED if failed else signals.received

    return pending


def make_module(
    plan: RunPlan, prepared: Prepared, placed: Placed, *, pending_signal: Callable[[], int]
) -> DPOModule:
    """The module; its reference is ready."""
    return DPOModule(**module_arguments(plan, prepared, placed), pending_signal=pending_signal)


def module_arguments(plan: RunPlan, prepared: Prepared, placed: Placed) -> dict[str, Any]:
    """Arguments of the module, but for the signal that stops it; its reference is ready."""
    models, learning = prepared.models, plan.learning
    assert models.reference is not None
    return {
        "policy": models.policy,
        "reference": models.reference,
        "scorer": models.scorer,
        "objective": learning.objective,
        "beta_plan": learning.beta,
        "optimizer": learning.optimizer,
        "steps": replace(learning.steps, sync_every_micro_batch=placed.sync_every_micro_batch),
        "starts_from_reference": models.starts_from_reference,
        "compute_dtype": placed.computation.master_dtype,
    }


def make_data_module(
    plan: RunPlan, prepared: Prepared, placed: Placed, rounds: RoundConductor | None = None
) -> PreferenceDataModule:
    """The data module of prepared groups, or of rounds of which they are the given rows."""
    served: dict[str, Any] = {
        "train_groups": prepared.data.train,
        "eval_groups": prepared.data.all_evaluated_groups(),
        "held_out": None if plan.evaluation.course is None else plan.evaluation.course.held_out,
        "batch_size": plan.batches.size,
        "micro_batch_tokens": placed.budget.tokens,
        "total_steps": plan.schedule.total_steps,
        "seed": plan.seed,
        "shared": prepared.models.scorer.shared,
        "num_workers": plan.batches.num_workers,
        "equal_counts": plan.batches.equal_counts,
        "gathers": prepared.models.scorer.gathers,
        "pinned": placed.device.type == "cuda",
    }
    if rounds is not None:
        return RoundsDataModule(rounds, **served)
    return PreferenceDataModule(**served)
