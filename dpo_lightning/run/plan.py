"""One frozen plan of a run, made once: devices, precision, steps, folders, all that is to be built.

It is made of checked settings as soon as model and data are known. What is built afterwards takes
the plan and plain values; nothing asks the settings a second time.
"""

from __future__ import annotations

import copy
import datetime
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.data.rounds import RoundPlan
from dpo_lightning.data.source_names import source_label
from dpo_lightning.memory.estimate import MemorySettings, memory_settings
from dpo_lightning.memory.hardware import Hardware
from dpo_lightning.models.source import ModelSource
from dpo_lightning.objectives.betas import BetaPlan
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.run.evaluations import EvaluationCourse
from dpo_lightning.settings.folders import cache_folder
from dpo_lightning.settings.generation import Backend, backend_of
from dpo_lightning.settings.judging import judge_label, longest_answer
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.names import model_label, name_of_trial, run_name
from dpo_lightning.settings.optimizer_group import optimizer_options
from dpo_lightning.settings.program import TRIAL
from dpo_lightning.settings.rounds import RoundSettings, round_settings
from dpo_lightning.settings.schema import BASE, Config
from dpo_lightning.tracking.logger_settings import LoggerSettings, logger_settings
from dpo_lightning.tracking.rungs import Goal, read_goal
from dpo_lightning.training.checkpoints.files import CHECKPOINTS
from dpo_lightning.training.optimizers import OptimizerSettings
from dpo_lightning.training.schedule import Schedule, make_schedule
from dpo_lightning.training.step_settings import StepSettings


@dataclass(frozen=True, slots=True)
class Folders:
    """Places that a run writes to.

    Attributes:
        run: The run's folder.
        checkpoints: Inside of it, what can be resumed from.
        references: Reference log-probabilities, kept for all runs.
        tokens: Token ids of rows, kept for all runs.
    """

    run: Path
    checkpoints: Path
    references: Path
    tokens: Path


@dataclass(frozen=True, slots=True)
class TrainerPlan:
    """Arguments of Lightning's trainer; names are those of the ``trainer`` group.

    Attributes:
        accelerator: Kind of device.
        devices: A count, a list of numbers, or ``auto``.
        num_nodes: Machines.
        strategy: ``auto``, ``ddp`` or ``fsdp``.
        find_unused_parameters: For models of which a step leaves weights unused.
        timeout: How long a rank waits for the others.
        max_time: Wall time of the training.
        deterministic: True if operations whose results vary are refused.
        detect_anomaly: True if the operation that made a NaN is named.
        profiler: One of Lightning's, or none.
        progress: True if progress is shown.
        callbacks: Names of callbacks, or mappings of a name to its arguments.
    """

    accelerator: str
    devices: Any
    num_nodes: int
    strategy: str
    find_unused_parameters: bool
    timeout: datetime.timedelta
    max_time: str | None
    deterministic: bool
    detect_anomaly: bool
    profiler: str | None
    progress: bool
    callbacks: tuple[Any, ...]

    @property
    def sharded(self) -> bool:
        """True where ranks share the weights of a model."""
        return self.strategy == "fsdp"


@dataclass(frozen=True, slots=True)
class CheckpointPlan:
    """Checkpoints to keep, and the changes that one to resume from may have.

    Attributes:
        every_n_steps: Steps between two; None: none but the last.
        keep: How many of those stay.
        last: True if there is one more at the end.
        may_change: True if a resumed experiment may have other settings.
        rung: Rung of its sweep at which the run is saved and stops; None: it runs to its end.
    """

    every_n_steps: int | None
    keep: int
    last: bool
    may_change: bool
    rung: Goal | None


@dataclass(frozen=True, slots=True)
class RoundsPlan:
    """Rounds of a run.

    Attributes:
        settings: How answers are drawn, and how they become groups.
        plan: Steps, prompts and groups of each.
        embedded: True on the embedded task, of which all is exactly known.
    """

    settings: RoundSettings
    plan: RoundPlan
    embedded: bool


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """Groups of a step, and how they are made ready.

    Attributes:
        size: Groups of a step, over all ranks.
        num_workers: Processes that make them ready.
        equal_counts: True if all ranks take as many micro-batches.
        overfit: True if a few groups are seen until their loss has fallen.
        rounds: Rounds whose groups the policy draws; None: all groups are given rows.
    """

    size: int
    num_workers: int
    equal_counts: bool
    overfit: bool
    rounds: RoundsPlan | None = None


@dataclass(frozen=True, slots=True)
class LearningPlan:
    """The objective, and the optimizer steps that minimise it.

    Attributes:
        objective: The losses.
        beta: Strength of the pull towards the reference, step by step.
        optimizer: What the optimizer is made of.
        steps: What a step may do.
    """

    objective: ObjectiveSettings
    beta: BetaPlan
    optimizer: OptimizerSettings
    steps: StepSettings

    @property
    def coupling(self) -> list[str]:
        """Names of the losses and options that compare all pairs of a step at once."""
        return [*self.objective.couples, *(["adaptive_beta"] if self.beta.adaptive else [])]


@dataclass(frozen=True, slots=True)
class EvaluationPlan:
    """Measurements of the trained policy, and its export.

    Attributes:
        samples: Answers that are drawn.
        partition_samples: Answers of the reference for the check of the log-probabilities.
        max_new_tokens: Longest answer.
        batch_size: Answers that are drawn at once.
        judge: Label of what judges them; None: nothing does.
        backend: Draws them.
        population: True if a tabular policy is fitted beside the trained one.
        merge: True if a merged model is exported beside an adapter.
        course: Evaluations while the training goes on; None: there is no training.
    """

    samples: int
    partition_samples: int
    max_new_tokens: int
    batch_size: int
    judge: str | None
    backend: Backend
    population: bool
    merge: bool
    course: EvaluationCourse | None


@dataclass(frozen=True, slots=True)
class Names:
    """Names and labels of a run, which decide no number.

    Attributes:
        run: Of the run in its loggers; the last part of its folder's where that is none of a sweep.
        model: Of the model.
        loss: Name of the loss.
        data: Source of the training rows, or the embedded task.
        reference: Another reference than the policy's start.
        frozen_adapter: Adapter of the reference; None: it is the base model.
        settings: The settings as plain values, with what was open decided.
    """

    run: str
    model: str
    loss: str
    data: str
    reference: str | None
    frozen_adapter: str | None
    settings: dict[str, Any]


@dataclass(frozen=True, slots=True)
class RunPlan:
    """All that is decided before anything is built.

    Attributes:
        folders: Places to write to.
        hardware: Devices and precision.
        schedule: How many steps, and what happens at which.
        trainer: Arguments of the trainer.
        checkpoints: What is kept of a training.
        batches: Groups of a step.
        learning: What is minimised, and how.
        memory: What decides the tokens of a micro-batch.
        evaluation: What happens at the end.
        logger: Where metrics go.
        names: What is said of the run.
        seed: Of all that is drawn.
    """

    folders: Folders
    hardware: Hardware
    schedule: Schedule
    trainer: TrainerPlan
    checkpoints: CheckpointPlan
    batches: BatchPlan
    learning: LearningPlan
    memory: MemorySettings
    evaluation: EvaluationPlan
    logger: LoggerSettings
    names: Names
    seed: int

    @property
    def facts(self) -> dict[str, Any]:
        """Facts that tell runs apart in a plot over them."""
        return {
            "model": self.names.model,
            "loss": self.names.loss,
            "beta": self.beta,
            "lr": self.learning.optimizer.lr,
            "seed": self.seed,
        }

    @property
    def beta(self) -> float:
        """Strength of the pull towards the reference, of the first step."""
        return self.learning.beta.start


def make_plan(
    config: Config,
    *,
    folders: Folders,
    hardware: Hardware,
    trainer: TrainerPlan,
    source: ModelSource,
    groups: int,
    resolved: dict[str, Any],
    course: EvaluationCourse | None = None,
) -> RunPlan:
    """Decides what the settings come to.

    Args:
        config: The validated settings.
        folders: Places to write to.
        hardware: Devices and precision.
        trainer: Arguments of the trainer.
        source: The model.
        groups: Training groups.
        resolved: The settings as plain values.
        course: Evaluations of the training; None where there is none.
    """
    schedule = make_schedule(config, groups=groups, bundled=source.bundled)
    return RunPlan(
        folders=folders,
        hardware=hardware,
        schedule=schedule,
        trainer=trainer,
        checkpoints=CheckpointPlan(
            every_n_steps=config.checkpoint.every_n_steps,
            keep=config.checkpoint.keep,
            last=config.checkpoint.last,
            may_change=config.resume_changed,
            # Whoever goes on with a trial by hand means its end.
            rung=read_goal(folders.run) if TRIAL in os.environ else None,
        ),
        batches=BatchPlan(
            size=config.data.batch_size,
            num_workers=config.data.num_workers,
            equal_counts=trainer.sharded,
            overfit=config.data.overfit_groups is not None,
            rounds=rounds_plan(config, schedule),
        ),
        learning=learning_plan(config, schedule),
        memory=memory_settings(config),
        evaluation=_evaluation_plan(config, course),
        logger=logger_settings(config.logger, run_name=config.name),
        names=_names(
            config,
            folders.run,
            _filled_in(resolved, source, schedule, longest=longest_answer(config)),
        ),
        seed=config.seed,
    )


def rounds_plan(config: Config, schedule: Schedule) -> RoundsPlan | None:
    """The rounds; None where there are none.

    Args:
        config: The settings.
        schedule: How many steps there are.
    """
    settings, steps = round_settings(config), schedule.round_steps
    if settings is None or steps is None:
        return None
    plan = RoundPlan(
        count=settings.count,
        steps=steps,
        prompts=settings.prompts,
        groups_per_prompt=settings.groups_per_prompt,
        batch_size=config.data.batch_size,
        offline_fraction=settings.offline_fraction,
        seed=config.seed,
    )
    return RoundsPlan(settings, plan, embedded=config.data.train is None)


def _evaluation_plan(config: Config, course: EvaluationCourse | None) -> EvaluationPlan:
    evaluation = config.evaluation
    return EvaluationPlan(
        samples=evaluation.samples,
        partition_samples=evaluation.partition_samples,
        max_new_tokens=longest_answer(config),
        batch_size=evaluation.batch_size,
        judge=judge_label(evaluation),
        backend=backend_of(config.generation),
        population=config.data.controlled.population,
        merge=config.peft.merge,
        course=course,
    )


def choose_folders(config: Config, run_dir: Path) -> Folders:
    """Places that a run writes to.

    Args:
        config: The settings.
        run_dir: The run's folder.
    """
    cache = cache_folder(config.reference.cache_dir)
    return Folders(run_dir, run_dir / CHECKPOINTS, cache / "reference", cache / "tokens")


def trainer_plan(config: Config) -> TrainerPlan:
    """Arguments of the trainer."""
    trainer, strategy = config.trainer, config.strategy
    return TrainerPlan(
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        strategy=strategy.name,
        find_unused_parameters=strategy.find_unused_parameters,
        timeout=datetime.timedelta(minutes=strategy.timeout_minutes),
        max_time=trainer.max_time,
        deterministic=trainer.deterministic,
        detect_anomaly=trainer.detect_anomaly,
        profiler=trainer.profiler,
        progress=trainer.enable_progress_bar,
        callbacks=tuple(trainer.callbacks),
    )


def learning_plan(config: Config, schedule: Schedule) -> LearningPlan:
    """The objective and the optimizer steps.

    Args:
        config: The settings.
        schedule: How many steps there are.
    """
    optimizer, loss = config.optimizer, config.loss
    first, second = optimizer.betas
    return LearningPlan(
        objective=objective_settings(loss),
        beta=BetaPlan(
            start=config.beta,
            end=loss.beta_end,
            schedule=loss.beta_schedule,
            total_steps=schedule.total_steps,
            adaptive=loss.adaptive_beta,
            momentum=loss.adaptive_momentum,
        ),
        optimizer=OptimizerSettings(
            name=optimizer.name,
            lr=schedule.learning_rate,
            betas=(first, second),
            eps=optimizer.eps,
            weight_decay=optimizer.weight_decay,
            stochastic_rounding=optimizer.stochastic_rounding,
            seed=config.seed,
            options=optimizer_options(optimizer),
        ),
        steps=StepSettings(
            total_steps=schedule.total_steps,
            warmup_steps=schedule.warmup_steps,
            schedule=optimizer.schedule,
            log_every_n_steps=schedule.log_every_n_steps,
            max_grad_norm=optimizer.max_grad_norm,
            max_skipped_steps=config.trainer.max_skipped_steps,
            smaller=smaller_settings(config.model.gradient_checkpointing),
        ),
    )


def smaller_settings(checkpointing: bool | None) -> list[str]:
    """Settings by which a step takes less memory, but for the size of its micro-batches.

    Args:
        checkpointing: ``model.gradient_checkpointing``.
    """
    others = ["peft=lora", "optimizer=adamw_8bit", "strategy=fsdp"]
    return others if checkpointing else ["model.gradient_checkpointing=true", *others]


def _names(config: Config, folder: Path, settings: dict[str, Any]) -> Names:
    adapter = config.reference.adapter or config.peft.adapter
    model = model_label(config.model.name, config.model.pretrained, config.model.config)
    facts = (model, config.loss.name, config.beta, config.seed)
    # The folder of a trial says what is swept.
    of_trial = config.name is None and TRIAL in os.environ
    return Names(
        run=name_of_trial(folder.name, *facts) if of_trial else run_name(config.name, *facts),
        model=model,
        loss=config.loss.name,
        data=source_label(config.data.train or "controlled task"),
        reference=config.reference.pretrained,
        frozen_adapter=None if adapter == BASE else adapter,
        settings=settings,
    )


def _filled_in(
    resolved: dict[str, Any], source: ModelSource, schedule: Schedule, *, longest: int
) -> dict[str, Any]:
    """The settings with what was open decided: what a reader of config.yaml or wandb looks for."""
    filled = copy.deepcopy(resolved)
    filled["optimizer"]["lr"] = schedule.learning_rate
    filled["trainer"]["max_steps"] = schedule.total_steps
    filled["trainer"]["log_every_n_steps"] = schedule.log_every_n_steps
    filled["data"]["max_length"] = source.max_length
    if filled["data"]["train"] is not None:
        # The embedded task ends its answers itself.
        filled["evaluation"]["max_new_tokens"] = longest
    if filled["data"]["train"] is not None and filled["data"]["name"] == "controlled":
        filled["data"]["name"] = "rows"
    return filled
