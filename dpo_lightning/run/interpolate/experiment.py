"""The frontier of one policy, from its run's settings: models, prompts, answers, points."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.data.controlled import PROMPTS, ControlledTask
from dpo_lightning.data.rows import prompt_of_key
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answers import choose_prompts
from dpo_lightning.evaluation.interpolated import Pair
from dpo_lightning.evaluation.one_policy import (
    LAMBDAS,
    MOST_PROMPTS,
    Axis,
    Drawn,
    ExactGains,
    decoded_point,
    plan_mixtures,
    weighted_point,
)
from dpo_lightning.evaluation.sampling import Precision
from dpo_lightning.memory.hardware import Hardware, decide_hardware
from dpo_lightning.models.loading import max_positions
from dpo_lightning.models.source import ModelSource
from dpo_lightning.objectives.optimum import MOST_LAMBDA
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.run.beta_path import why_no_beta_of
from dpo_lightning.run.inputs import prefer_cache_without_network, read_sources
from dpo_lightning.run.interpolate.drawing import Drawer, Questions
from dpo_lightning.run.loaded import load_opened
from dpo_lightning.run.opened import Opened
from dpo_lightning.run.prepare import (
    all_evaluated,
    choose_judge,
    prepare_groups,
    resolve_source,
    set_threads,
)
from dpo_lightning.settings.folders import cache_folder
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.schema import Config
from dpo_lightning.tracking.quiet import quiet_transformers


def interpolate(
    config: Config,
    opened: Opened,
    *,
    beta_known: bool,
    rows_named: bool,
    betas: Sequence[float],
    lambdas: Sequence[float],
    show: ShowPhase = unshown,
) -> dict[str, Any]:
    """The frontier of one policy, as plain values.

    Args:
        config: The settings of the policy.
        opened: The policy.
        beta_known: True if ``beta`` is that at which it was trained.
        rows_named: True if rows of their own are asked, and not those that its run held out.
        betas: Values of beta that are asked for.
        lambdas: The same by their place.
        show: Shows how far long phases are.

    Raises:
        UserError: If a beta is asked of a loss that has none, or data and models are gone.
    """
    no_beta = why_no_beta_of(config) if beta_known else _UNKNOWN
    asked = [*_places(config, betas, no_beta), *lambdas]
    ready = opened_on_prompts(config, opened, rows_named=rows_named, show=show)
    with ready as (pair, questions, drawer):
        mixtures = plan_mixtures(asked or LAMBDAS, prompts=len(questions.ids), seed=config.seed)
        drawn = drawer.draw(mixtures)
        axis = Axis(config.beta if no_beta is None else None, questions.task is not None)
        points, hidden = _points(drawn, sorted({*(asked or LAMBDAS)}), axis)
        if questions.task is not None:
            gains = ExactGains.of(questions.task, pair)
            for point in points:
                point["gain_ratio"] = gains.gain_ratio(point["lambda"], point["method"])
    for number, mixture in enumerate(mixtures):
        for point in points:
            if point["method"] == "decoded" and point["lambda"] == mixture.lam:
                point["samples"] = drawer.samples(drawn, number)
    return {
        "axis": "lambda" if no_beta is not None else "beta",
        "loss": ",".join(objective_settings(config.loss).terms),
        "beta": config.beta if beta_known else None,
        "points": points,
        "not_shown": hidden,
        "notes": _notes(config, no_beta, questions),
        "drawn": drawer.facts(drawn),
    }


@contextlib.contextmanager
def opened_on_prompts(
    config: Config, opened: Opened, *, rows_named: bool = False, show: ShowPhase = unshown
) -> Iterator[tuple[Pair, Questions, Drawer]]:
    """Context with policy and reference in memory, held-out prompts, and who draws answers.

    Args:
        config: The settings of the policy.
        opened: The policy.
        rows_named: True if rows of their own are asked, and not those that its run held out.
        show: Shows how far long phases are.

    Raises:
        UserError: If data and models are gone.
    """
    quiet_transformers()
    hardware = decide_hardware(config.trainer, half_weights=config.model.dtype == "bfloat16")
    prefer_cache_without_network(config)
    source = resolve_source(config, hardware)
    set_threads(config, source)
    questions = _questions(config, source, hardware, opened.name, rows_named=rows_named, show=show)
    with _pair(config, source, opened, hardware.beside, show) as pair:
        yield pair, questions, Drawer(config, source, pair, questions, precision_of(hardware), show)


_UNKNOWN = "it is not known at which beta this model was trained; beta= names it"


def _places(config: Config, betas: Sequence[float], no_beta: str | None) -> list[float]:
    """Places of betas.

    Raises:
        UserError: If there are none, or one is too far.
    """
    typed = f"--betas={','.join(f'{beta:g}' for beta in betas)}"
    if betas and no_beta is not None:
        raise UserError(
            f"{typed}: {no_beta}, so that no place on the way is that of a beta; give --lambdas, "
            "where 0 is the reference and 1 the policy"
        )
    for beta in betas:
        if config.beta / beta > MOST_LAMBDA:
            raise UserError(
                f"{typed}: at β {beta:g} the logits' difference would count "
                f"{config.beta / beta:g} times; give at least {config.beta / MOST_LAMBDA:g}"
            )
    return [config.beta / beta for beta in betas]


def _points(
    drawn: Drawn, lambdas: Sequence[float], axis: Axis
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Points that are shown, in the order of their places, and those that are not."""
    points, hidden = [], []
    for number, mixture in enumerate(drawn.mixtures):
        if mixture.lam in (0.0, *lambdas):
            points.append(decoded_point(drawn, number, axis))
    for lam in lambdas:
        if lam == 0:
            continue  # its own answers say all
        point, why = weighted_point(drawn, lam, axis)
        if why is None:
            points.append(point)
        else:
            hidden.append(point | {"why": why})
    return sorted(points, key=lambda p: (p["lambda"], p["method"])), hidden


def _notes(config: Config, no_beta: str | None, questions: Questions) -> list[str]:
    """Facts that a reader of the points needs, a sentence each."""
    notes = []
    if no_beta is None:
        notes.append(
            f"β is {config.beta:g}/λ. It is exact only if the policy is the optimum "
            f"π_ref·exp(r/β)/Z at β = {config.beta:g}, and training comes close to it at best."
        )
    else:
        notes.append(f"The axis is λ, not β: {no_beta}. 0 is the reference, 1 the policy.")
    if questions.task is None:
        notes.append("Intervals are of prompts like these; those within are of these alone.")
    else:
        notes.append("There are no other prompts than these, so intervals are of answers alone.")
        notes.append("The gain is of the exact policies, over the closed form's at the same KL.")
    if questions.task is None and questions.marker is None:
        notes.append("No judge: evaluation.judge= names one, and the points have a reward.")
    return notes


# Models and prompts -----------------------------------------------------------------------------


def precision_of(hardware: Hardware) -> Precision:
    """The context that the run computed in, on the device that is here."""
    if not hardware.mixed or hardware.precision == "bf16-true":
        return contextlib.nullcontext
    half = torch.float16 if hardware.float16 else torch.bfloat16
    return lambda: torch.autocast(hardware.beside.type, dtype=half)


@contextlib.contextmanager
def _pair(
    config: Config, source: ModelSource, opened: Opened, device: torch.device, show: ShowPhase
) -> Iterator[Pair]:
    """Policy and reference on the device; of an adapter both are one model."""
    models = load_opened(opened, config, source, kind="auto", needed=True, show=show)
    policy = models.policy if source.quantization is not None else models.policy.to(device)
    policy.requires_grad_(False).eval()
    with models.reference_model(device) as frozen:
        yield Pair(policy, frozen, models.scorer)


def _questions(
    config: Config,
    source: ModelSource,
    hardware: Hardware,
    name: str,
    *,
    rows_named: bool,
    show: ShowPhase,
) -> Questions:
    """Held-out prompts, each once, and their judge."""
    judge = choose_judge(config, hardware, judges=True, show=show)
    # Rows that cannot be read were named, and set aside, when the run read them.
    key = "data.eval" if rows_named else "data.train"
    rows = read_sources(config, Path.cwd(), when_begun=lambda write: None, key=key)
    if rows is None:
        task = ControlledTask()
        ids = [row.numpy().astype("int32") for row in task.prompt_ids]
        return Questions(ids, list(PROMPTS), task, None)
    whole = replace(config, data=all_evaluated(config.data))
    data, _ = prepare_groups(
        whole if rows_named else config,
        rows,
        source,
        cache_folder(config.reference.cache_dir) / "tokens",
        key=key,
        show=show,
    )
    positions = max_positions(source.config)
    groups = choose_prompts(
        data.ranking() or data.train,
        count=MOST_PROMPTS,
        max_tokens=min(source.max_length, positions or source.max_length),
    )
    if not groups:
        raise UserError(f"run={name}: no prompt of its data leaves room for an answer")
    texts = [prompt_of_key(group.prompt_key) for group in groups]
    return Questions([group.prompt for group in groups], texts, None, judge)
