"""A policy on held-out rows, in memory: metrics, groups one by one, answers, the partition check.

All that decides a number is decided where a run decides it: plan, micro-batches, precision, prompts
and draws are the run's own.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.data.datamodule import EvalSteps
from dpo_lightning.data.evaluations import HeldOut
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.items import GroupItems, measure_groups
from dpo_lightning.files import RESULT_FILE, read_json
from dpo_lightning.memory.estimate import memory_settings, step_memory_of
from dpo_lightning.memory.hardware import Hardware, decide_hardware
from dpo_lightning.memory.peaks import bound_product_caches
from dpo_lightning.models.devices import settle_attention
from dpo_lightning.models.master_weights import cast_parameters
from dpo_lightning.objectives.betas import BetaPlan
from dpo_lightning.processes.phases import Say, ShowPhase, unshown
from dpo_lightning.reference.fill import Watch
from dpo_lightning.run.build import make_trainer
from dpo_lightning.run.conclude import draw_answers, exact_metrics, kl_facts
from dpo_lightning.run.inputs import prefer_cache_without_network, read_sources
from dpo_lightning.run.loaded import load_opened
from dpo_lightning.run.opened import Opened, last_step
from dpo_lightning.run.page.values import as_mapping
from dpo_lightning.run.placement import Placed, choose_answering, place, with_reference
from dpo_lightning.run.plan import RunPlan, choose_folders, make_plan, trainer_plan
from dpo_lightning.run.prepare import (
    Prepared,
    all_evaluated,
    choose_judge,
    controlled_data,
    prepare_groups,
    resolve_source,
    set_threads,
)
from dpo_lightning.settings.credentials import redact
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.schema import Config
from dpo_lightning.tracking.quiet import quiet_libraries
from dpo_lightning.training.batch_logps import batch_logps
from dpo_lightning.training.devices import take_device
from dpo_lightning.training.traced import traced_optimizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Measurements of a policy.

    Attributes:
        metrics: By their names as in ``metrics.jsonl``.
        items: The held-out groups, one by one.
        groups: Those groups.
        samples: Answers that were drawn, a row each.
        kl: Origin of their KL; None where none were drawn.
        beta: That of the rewards.
        device: Where it was computed.
        max_length: Longest prompt with one response, in tokens.
    """

    metrics: dict[str, float]
    items: GroupItems
    groups: Sequence[TokenGroup]
    samples: Sequence[dict[str, Any]]
    kl: dict[str, Any] | None
    beta: float
    device: str
    max_length: int


def evaluate(
    opened: Opened, config: Config, *, rows_named: bool, show: ShowPhase = unshown
) -> Evaluation:
    """Measures a policy on held-out rows.

    Args:
        opened: The policy.
        config: Its settings, from :func:`~dpo_lightning.run.opened.compose_opened`.
        rows_named: True if rows of their own are all held out; else those that the run held out.
        show: Shows how far long phases are.

    Raises:
        UserError: If there are no held-out rows, or data and models are gone.
    """
    config = _on_one_device(config)
    quiet_libraries()
    take_device(config.trainer.accelerator, config.trainer.devices)
    hardware = decide_hardware(config.trainer, half_weights=config.model.dtype == "bfloat16")
    settle_attention(hardware.beside)
    if hardware.kind == "cpu":
        bound_product_caches()
    prefer_cache_without_network(config)
    prepared = _prepare(opened, config, hardware, rows_named=rows_named, show=show)
    if not prepared.data.eval:
        raise UserError(
            f"run={opened.name}: it held out no rows; name some with data.eval=<file or hub id>"
        )
    plan = _plan(config, hardware, prepared)
    beta = _beta_of(opened, plan.learning.beta)
    return _measure(plan, prepared, (beta, _running_of(opened, beta)), show)


def _on_one_device(config: Config) -> Config:
    """The settings for one process that draws no rounds, whatever the run was trained on."""
    devices = config.trainer.devices
    one = devices[:1] if isinstance(devices, list) else 1
    trainer = replace(
        config.trainer, devices=one, num_nodes=1, profiler=None, enable_progress_bar=False
    )
    return replace(
        config,
        trainer=trainer,
        strategy=replace(config.strategy, name="auto"),
        rounds=replace(config.rounds, count=0),
    )


def _beta_of(opened: Opened, beta: BetaPlan) -> float:
    """Beta of the last step, which an evaluation at the end has."""
    steps = None if opened.run is None else last_step(opened.run)
    if steps is None:
        return beta.start
    taken, planned = steps
    return replace(beta, total_steps=planned).at(taken - 1)


def _running_of(opened: Opened, beta: float) -> float | None:
    """Mean log-ratio that a run's last evaluation compared with; None where none says it."""
    if opened.run is None:
        return None
    metrics = read_json(opened.run / RESULT_FILE).get("metrics")
    delta = as_mapping(metrics).get("eval/bco/delta")
    return delta / beta if isinstance(delta, int | float) else None


# Models and data --------------------------------------------------------------------------------


def _prepare(
    opened: Opened, config: Config, hardware: Hardware, *, rows_named: bool, show: ShowPhase
) -> Prepared:
    source = resolve_source(config, hardware)
    threads = set_threads(config, source) or torch.get_num_threads()
    data, chat = None, None
    # Rows that cannot be read were named, and set aside, when the run read them.
    rows = read_sources(
        config,
        Path.cwd(),
        when_begun=lambda write: None,
        key="data.eval" if rows_named else "data.train",
    )
    tokens = choose_folders(config, Path.cwd()).tokens
    if rows is not None and rows_named:
        whole = replace(config, data=all_evaluated(config.data))
        data, chat = prepare_groups(whole, rows, source, tokens, key="data.eval", show=show)
        data.train, data.eval = [], data.train
    elif rows is not None:
        data, chat = prepare_groups(config, rows, source, tokens, show=show)
    models = load_opened(
        opened,
        config,
        source,
        kind=config.reference.kind,
        needed=objective_settings(config.loss).uses_reference,
        show=show,
    )
    task, reference_logps = None, None
    if data is None:
        task = ControlledTask()
        start = models.make_reference()
        with models.scorer.plain(start) as plain:
            reference_logps = task.outcome_logps(plain)
        data = controlled_data(config, task, reference_logps)
    data.choose_evaluated(config.evaluation.max_prompts)
    settings = memory_settings(config)
    return Prepared(
        source=source,
        memory=step_memory_of(settings, source.config, make_optimizer=traced_optimizer),
        models=models,
        data=data,
        identity={},
        task=task,
        reference_outcome_logps=reference_logps,
        judge=choose_judge(config, hardware, judges=True, show=show),
        threads=threads,
        chat=chat,
    )


def _plan(config: Config, hardware: Hardware, prepared: Prepared) -> RunPlan:
    """The plan of a run that takes no step."""
    plan = make_plan(
        config,
        # Nothing is written there.
        folders=choose_folders(config, Path.cwd()),
        hardware=hardware,
        trainer=trainer_plan(config),
        source=prepared.source,
        groups=max(1, len(prepared.data.train)),
        resolved=asdict(config),
    )
    return replace(plan, schedule=replace(plan.schedule, total_steps=0))


# Measuring --------------------------------------------------------------------------------------


_At = tuple[float, float | None]
"""Beta of the loss, and the mean log-ratio of the training, where that is known."""


def _measure(plan: RunPlan, prepared: Prepared, at: _At, show: ShowPhase) -> Evaluation:
    metrics: dict[str, float] = {}
    if prepared.task is not None:
        # Of the weights as they are exported; what follows is of those that are computed with.
        metrics, _ = exact_metrics(plan, prepared, prepared.models.policy, None)
    trainer = make_trainer(plan, loggers=[], callbacks=[], manifest={})
    placed = place(plan, prepared, trainer)
    prepared.models.scorer.choose_kernel(
        placed.device, placed.computation.dtype(prepared.source.dtype)
    )
    prepared = with_reference(plan, prepared, placed, watch=Watch(lambda: None, show))
    policy = prepared.models.policy
    if placed.computation.master_dtype is not None:
        cast_parameters(policy, placed.computation.master_dtype)
    policy = policy if prepared.source.quantization is not None else policy.to(placed.device)
    policy.eval()
    measured, items = _groups(plan, prepared, placed, at, show)
    asked, answering = choose_answering(plan, prepared, placed.computation)
    answering = replace(answering, show=show)
    sampled = draw_answers(plan, prepared, asked, answering, placed.device)
    if sampled.failure is not None:
        log.warning("the answers are not judged: %s", redact(" ".join(sampled.failure.split())))
    named = {f"eval/{name}": value for name, value in measured.items()}
    return Evaluation(
        metrics=named | sampled.metrics | metrics,
        items=items,
        groups=prepared.data.evaluated_groups(),
        samples=sampled.rows,
        kl=kl_facts(plan, answering, sampled.metrics),
        beta=plan.beta,
        device=f"{placed.device.type}, {placed.computation.describe()}",
        max_length=prepared.source.max_length,
    )


def _groups(
    plan: RunPlan, prepared: Prepared, placed: Placed, at: _At, show: ShowPhase
) -> tuple[dict[str, float], GroupItems]:
    """Metrics of the held-out sets, and the groups of the first one by one."""
    sets = prepared.data.evaluated_sets()
    held_out = HeldOut(tuple(map(len, sets.values())), tuple(sets))
    metrics: dict[str, float] = {}
    first: GroupItems | None = None
    for number, groups in enumerate(sets.values()):
        measured, items = _set(plan, prepared, placed, at, groups, show)
        first = first or items
        for beginning in held_out.metrics_of(number):
            metrics |= {f"{beginning}{name}": value for name, value in measured.items()}
    assert first is not None
    return metrics, first


def _set(
    plan: RunPlan,
    prepared: Prepared,
    placed: Placed,
    at: _At,
    groups: Sequence[TokenGroup],
    show: ShowPhase,
) -> tuple[dict[str, float], GroupItems]:
    models = prepared.models
    scorer, reference = models.scorer, models.reference
    assert reference is not None
    reference.to(placed.device)
    steps = EvalSteps(
        groups,
        HeldOut((len(groups),)).batches(4 * plan.batches.size),
        rank=0,
        world_size=1,
        micro_batch_tokens=placed.budget.tokens,
        shared=scorer.shared,
        gathers=scorer.gathers,
    )
    objective = plan.learning.objective
    shown = show("evaluation", total=len(steps), unit="batches")
    with placed.context(), shown as say:
        return measure_groups(
            _told(steps, say),
            count=len(groups),
            objective=objective,
            logps=lambda batch: batch_logps(
                batch,
                policy=models.policy,
                reference=reference,
                scorer=scorer,
                objective=objective,
            ),
            device=placed.device,
            betas=(at[0], plan.beta),
            running=at[1],
        )


def _told(steps: EvalSteps, say: Say) -> Iterator[Any]:
    """The batches of an evaluation; each is told when it is over."""
    for number in range(len(steps)):
        yield steps[number]
        say(number + 1)
