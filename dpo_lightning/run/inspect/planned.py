"""Plan of a run, its memory and its time, by its settings, its rows and its model's config."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.data.datamodule import groups_in_order, rows_of_steps, steps_per_epoch
from dpo_lightning.data.mismatched import mismatched_group
from dpo_lightning.data.packing import plan_step
from dpo_lightning.data.refused import Refuse
from dpo_lightning.data.splits import PreparedData
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.memory.budget import Budget, Room, memory_of
from dpo_lightning.memory.estimate import (
    MemoryEstimate,
    estimate_run,
    memory_settings,
    plan_training,
    step_memory_of,
)
from dpo_lightning.memory.hardware import Hardware
from dpo_lightning.memory.lengths import GroupLengths
from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.probe import known_unshared
from dpo_lightning.models.source import ModelSource
from dpo_lightning.run.evaluations import EvaluationCourse, plan_evaluations
from dpo_lightning.run.inspect.speed import Workload, estimated_time
from dpo_lightning.run.plan import LearningPlan, learning_plan
from dpo_lightning.settings.schema import Config
from dpo_lightning.training.schedule import Schedule, make_schedule
from dpo_lightning.training.traced import traced_optimizer

# Steps that are shared out over ranks and micro-batches one by one; the mean of more is the same.
_STEPS = 500


@dataclass(frozen=True, slots=True)
class Planned:
    """Plan of a run, and its demands.

    Attributes:
        plan: Entry ``plan`` of the JSON object.
        memory: Entry ``memory``.
        time: Entry ``time``.
        estimate: The memory, to be judged.
    """

    plan: dict[str, Any]
    memory: dict[str, Any]
    time: dict[str, Any]
    estimate: MemoryEstimate


def plan_run(
    config: Config,
    source: ModelSource,
    hardware: Hardware,
    data: PreparedData,
    *,
    outputs: Path,
    refuse: Refuse,
) -> Planned:
    """The plan of a run, as it would be made; nothing is loaded.

    Args:
        config: The settings.
        source: The model.
        hardware: Devices and precision.
        data: The groups; some are to be trained on.
        outputs: Parent of the folders of runs and sweeps, where earlier ones are looked for.
        refuse: Takes the reason for which the evaluations would stop the run.

    Raises:
        UserError: If the loss needs a whole step at once and the settings allow less.
    """
    unshared = known_unshared(meta_model(source.config), max_length=source.max_length)
    shared = unshared is None
    schedule = make_schedule(config, groups=len(data.train), bundled=source.bundled)
    learning = learning_plan(config, schedule)
    costs = _costs(data.train, shared=shared)
    budget, estimate = _memory(config, source, hardware, data, learning, shared=shared)
    return Planned(
        plan=_plan(config, schedule, budget, data, estimate.devices, costs, unshared)
        | {"evaluations": _evaluations(config, schedule, data, shared, refuse)},
        memory=_memory_entry(estimate, budget),
        time=estimated_time(
            Workload(
                parameters=estimate.memory.parameters,
                trained=estimate.memory.trained(estimate.training),
                adapters=estimate.training.adapters is not None,
                recomputed=budget.checkpointing,
                tokens=_tokens(config, schedule, _computed(data.train, costs)),
                reference_tokens=_reference_tokens(config, schedule, learning, data, shared),
            ),
            name=source.name,
            outputs=outputs,
        ),
        estimate=estimate,
    )


def _memory(
    config: Config,
    source: ModelSource,
    hardware: Hardware,
    data: PreparedData,
    learning: LearningPlan,
    *,
    shared: bool,
) -> tuple[Budget, MemoryEstimate]:
    """Budget and estimate with the lengths of these groups, as the run itself makes them."""
    settings = memory_settings(config)
    lengths = GroupLengths.of([*data.train, *data.eval], shared=shared)
    memory = step_memory_of(settings, source.config, make_optimizer=traced_optimizer)
    memory = memory.with_lengths(lengths, "flat" if shared else "padded")
    room = memory_of(torch.device(hardware.kind)) if hardware.is_here else None
    return estimate_run(
        memory,
        plan_training(
            settings,
            hardware.kind,
            devices=hardware.count,
            mixed=hardware.mixed,
            float16=hardware.float16,
        ),
        Room(room, lengths.most, settings.tokens, settings.checkpointing),
        costs=_costs(data.train, shared=shared),
        batch_size=config.data.batch_size,
        coupling=learning.coupling,
        devices=hardware.count,
        float16=hardware.float16,
    )


def _memory_entry(estimate: MemoryEstimate, budget: Budget) -> dict[str, Any]:
    return {
        "bytes": estimate.footprint.total,
        "parts": estimate.footprint.parts(),
        "device_bytes": estimate.device_bytes,
        "devices": estimate.devices,
        "device": estimate.training.kind,
        "micro_batch_tokens": budget.tokens,
        "activation_checkpointing": budget.checkpointing,
        "fits": estimate.fits,
        "says": estimate.describe(),
    }


def _costs(groups: Sequence[TokenGroup], *, shared: bool) -> list[int]:
    return [group.tokens if shared else group.padded_tokens for group in groups]


def _computed(groups: Sequence[TokenGroup], costs: Sequence[int]) -> list[int]:
    """Tokens that a step computes of each group, with what it measures behind other prompts."""
    return [
        cost if group.mismatched is None else cost + mismatched_group(group).tokens
        for group, cost in zip(groups, costs, strict=True)
    ]


def _plan(
    config: Config,
    schedule: Schedule,
    budget: Budget,
    data: PreparedData,
    devices: int,
    costs: Sequence[int],
    unshared: str | None,
) -> dict[str, Any]:
    looked_at = min(schedule.total_steps, _STEPS)
    steps = list(
        groups_in_order(
            len(costs), batch_size=config.data.batch_size, steps=looked_at, seed=config.seed
        )
    )
    shares = [
        plan_step(
            [costs[row] for row in rows],
            world_size=devices,
            micro_batch_tokens=budget.tokens,
            equal_counts=config.strategy.name == "fsdp",
        )
        for rows in steps
    ]
    counts = [max(map(len, ranks)) for ranks in shares]
    computed = _computed(data.train, costs)
    tokens = [sum(computed[row] for row in rows) for rows in steps]
    padded = sum(group.padded_tokens for group in data.train)
    # Of each prompt all copies but one.
    saved = padded - sum(group.tokens for group in data.train)
    return {
        "groups": len(costs),
        "pairs": sum(group.pairs for group in data.train),
        "batch_size": config.data.batch_size,
        "steps": schedule.total_steps,
        "steps_per_epoch": steps_per_epoch(len(costs), config.data.batch_size),
        "warmup_steps": schedule.warmup_steps,
        "learning_rate": schedule.learning_rate,
        "steps_looked_at": looked_at,
        "micro_batches": _range(counts),
        "tokens_per_step": _range(tokens),
        "prompts_shared": unshared is None,
        "not_shared_because": unshared,
        "prompt_tokens_saved": 0 if unshared else saved,
        "share_saved": 0.0 if unshared else saved / padded,
    }


def _evaluations(
    config: Config, schedule: Schedule, data: PreparedData, shared: bool, refuse: Refuse
) -> dict[str, Any] | None:
    """Evaluations of the run; None where it would stop because of them."""
    try:
        course = plan_evaluations(
            config.evaluation,
            config.checkpoint,
            data,
            total_steps=schedule.total_steps,
            round_steps=schedule.round_steps,
            batch_size=config.data.batch_size,
            shared=shared,
        )
    except UserError as error:
        refuse(error)
        return None
    return _course(course)


def _course(course: EvaluationCourse) -> dict[str, Any]:
    names = [name for name in course.held_out.names if name is not None]
    return {
        "every_n_steps": course.every,
        "on_start": course.on_start,
        "before_last": course.before_last,
        "rows": course.rows if course.before_last else 0,
        "rows_at_the_end": sum(course.held_out.sizes),
        "sets": dict(zip(names, course.held_out.sizes, strict=True)) if names else {},
        "max_token_share": course.share,
        "answers": course.samples,
        "says": course.describe(),
    }


def _range(values: Sequence[int]) -> dict[str, float]:
    return {"min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def _tokens(config: Config, schedule: Schedule, costs: Sequence[int]) -> int:
    """Tokens of all steps: whole epochs at once, the rest group by group."""
    epochs, rest = divmod(schedule.total_steps, steps_per_epoch(len(costs), config.data.batch_size))
    seen = groups_in_order(
        len(costs),
        batch_size=config.data.batch_size,
        steps=schedule.total_steps,
        seed=config.seed,
        first=schedule.total_steps - rest,
    )
    return epochs * sum(costs) + sum(costs[row] for rows in seen for row in rows)


def _reference_tokens(
    config: Config,
    schedule: Schedule,
    learning: LearningPlan,
    data: PreparedData,
    shared: bool,
) -> int:
    """Tokens of the reference: of each step with a live one, else of each group that is seen.

    Beside one that moves held-out groups are computed once all the same.
    """
    if not learning.objective.uses_reference or config.reference.kind == "none":
        return 0
    held_out = data.all_evaluated_groups()
    evaluated = _computed(held_out, _costs(held_out, shared=shared))
    costs = _computed(data.train, _costs(data.train, shared=shared))
    moves = config.reference.sync_every is not None
    if moves or config.reference.kind == "live":
        return _tokens(config, schedule, costs) + (sum(evaluated) if moves else 0)
    seen = rows_of_steps(
        len(costs),
        batch_size=config.data.batch_size,
        steps=schedule.total_steps,
        seed=config.seed,
    )
    return sum(cost for cost, used in zip(costs, seen, strict=True) if used) + sum(evaluated)
