"""Facts in the header of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from dpo_lightning.data.splits import PreparedData
from dpo_lightning.data.tokens import DROP_REASONS
from dpo_lightning.models.adapters import count_parameters
from dpo_lightning.reference.kinds import NoReference
from dpo_lightning.reference.pair import Models
from dpo_lightning.run.placement import Placed
from dpo_lightning.run.plan import RunPlan
from dpo_lightning.run.prepare import Prepared


def header_facts(plan: RunPlan, prepared: Prepared, placed: Placed) -> dict[str, str]:
    """A line per fact: model, data and what was dropped, loss, steps, device, folder."""
    models, names = prepared.models, plan.names
    total, trainable = count_parameters(models.policy)
    parameters = f"{total:,} parameters"
    if trainable != total:
        parameters += f", {trainable:,} trainable"
    device = placed.device.type
    if device == "cuda":
        device = torch.cuda.get_device_name()
    devices = f"{placed.world_size} x {device}"
    if plan.trainer.strategy != "auto":
        devices += f", {plan.trainer.strategy}"
    facts = {
        "model": f"{prepared.source.name}: {parameters}",
        **({} if models.adapters is None else {"peft": models.adapters.describe()}),
        "data": f"{names.data}: {_counts(prepared.data)}",
        **_chat(prepared),
        "loss": f"{names.loss}, beta {plan.beta:g}",
        "reference": _reference(plan, models),
        "steps": _steps(plan),
        **_rounds(plan),
        **_evaluations(plan),
        "device": f"{devices}, {placed.computation.describe()}, torch {torch.__version__}",
        "attention": models.scorer.attention,
        "memory": _memory(plan, placed),
        "folder": str(plan.folders.run),
    }
    if device == "cpu" and _has_nvidia_gpu():
        why = "this torch is a CPU build" if torch.version.cuda is None else "see nvidia-smi"
        facts["note"] = f"this machine has an NVIDIA GPU that torch cannot use: {why}"
    return facts


def _steps(plan: RunPlan) -> str:
    """Steps, prompts of each, the learning rate and why it is what it is, warm-up steps."""
    schedule = plan.schedule
    reason = f" ({schedule.learning_rate_of})" if schedule.learning_rate_of else ""
    warmup = f"{schedule.warmup_steps:,} warm-up {_plural('step', schedule.warmup_steps)}"
    return (
        f"{schedule.total_steps:,} {_plural('step', schedule.total_steps)} x {plan.batches.size} "
        f"prompts, learning rate {schedule.learning_rate:g}{reason}, {warmup}"
    )


def _rounds(plan: RunPlan) -> dict[str, str]:
    """The line of the rounds, where there are some."""
    if plan.batches.rounds is None:
        return {}
    settings, rounds = plan.batches.rounds.settings, plan.batches.rounds.plan
    groups = {"best_worst": "best and worst", "ranking": "rankings", "margin": "pairs by margin"}
    line = (
        f"{rounds.count:,} of {rounds.steps:,} {_plural('step', rounds.steps)}, "
        f"{settings.num_generations} answers a prompt, {groups.get(settings.groups, 'pairs')}"
    )
    if settings.noise == "bradley_terry":
        line += " with drawn labels"
    if settings.offline_fraction:
        line += f", {settings.offline_fraction:.0%} of each step given rows"
    return {"rounds": line}


def _plural(word: str, count: int) -> str:
    return word if count == 1 else f"{word}s"


def _evaluations(plan: RunPlan) -> dict[str, str]:
    """The line of the evaluations, and of what selects checkpoints."""
    course = plan.evaluation.course
    if course is None:
        return {}
    facts = {"evaluation": course.describe()}
    if course.selection is not None:
        facts["selection"] = course.selection.describe()
    return facts


def _memory(plan: RunPlan, placed: Placed) -> str:
    """Estimate, tokens of a micro-batch, and what is done to need no more."""
    budget, training = placed.budget, placed.estimate.training
    line = f"{placed.estimate.describe()}; micro-batches of up to {budget.tokens:,} tokens"
    if budget.checkpointing:
        line += ", activation checkpointing"
    if training.shards > 1:
        often = "once a step" if training.whole_gradients else "in every micro-batch"
        chosen = " (by the memory)" if plan.memory.whole_gradients is None else ""
        line += f", gradients reduced {often}{chosen}"
    return line


def _chat(prepared: Prepared) -> dict[str, str]:
    """The line of the chat template, where rows go through one."""
    chat, leads = prepared.chat, prepared.data.leads
    return {} if chat is None or not leads else {"template": chat.line(leads)}


def _counts(data: PreparedData) -> str:
    rows = f"{len(data.train):,} training and {len(data.eval):,} evaluation rows"
    if data.sets:
        rows += f" ({', '.join(f'{size:,} in {name}' for name, size in data.sets.items())})"
    if data.evaluated is not None:
        rows += f", a fixed sample of {len(data.evaluated):,} of these is evaluated"
    counts = [rows]
    labels = data.labels()
    if labels:
        counts.append(f"of the training rows {labels['train']}")
    if data.unrated:
        counts.append(f"{data.unrated:,} unrated {_plural('answer', data.unrated)} left out")
    for reason, count in data.dropped.items():
        counts.append(f"{count:,} {_plural('row', count)} dropped: {DROP_REASONS[reason]}")
    for change, count in data.changed.items():
        counts.append(f"{count:,} with a {change.replace('_', ' ')}")
    return "; ".join(counts)


def _reference(plan: RunPlan, models: Models) -> str:
    names, rounds = plan.names, plan.batches.rounds
    if isinstance(models.reference, NoReference):
        return "none"
    if rounds is not None and rounds.settings.previous:
        return "the policy at the start of each round"
    reference, state = names.reference or "initial policy", "frozen"
    if models.adapters is not None and names.reference is None:
        adapter = names.frozen_adapter
        reference = f"adapter {adapter}" if adapter else "base model without the adapter"
    if models.movement is not None:
        state = models.movement.describe()
    elif models.reference is None:
        state += ", log-probs cached"
    return f"{reference} ({state})"


def _has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
