"""What the header of a run says."""

from __future__ import annotations

import shutil
from pathlib import Path

import lightning.pytorch as pl
import torch

from dpo_lightning.data.splits import PreparedData
from dpo_lightning.memory.budget import Budget
from dpo_lightning.memory.estimate import MemoryEstimate
from dpo_lightning.models.adapters import count_parameters
from dpo_lightning.models.source import ModelSource
from dpo_lightning.reference.kinds import NoReference
from dpo_lightning.reference.pair import Models
from dpo_lightning.settings.schema import BASE, Config
from dpo_lightning.training.schedule import Schedule


def header_facts(
    config: Config,
    source: ModelSource,
    models: Models,
    data: PreparedData,
    schedule: Schedule,
    *,
    trainer: pl.Trainer,
    precision: str,
    estimate: MemoryEstimate,
    budget: Budget,
    folder: Path,
) -> dict[str, str]:
    """A line per fact: model, data and what was dropped, loss, steps, device, folder."""
    device = trainer.strategy.root_device.type
    if device == "cuda":
        device = torch.cuda.get_device_name()
    counts = f"{len(data.train):,} training and {len(data.eval):,} evaluation groups"
    for what in ("dropped", "changed"):
        reasons = getattr(data, what)
        if reasons:
            listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            counts += f"; {what}: {listed}"
    total, trainable = count_parameters(models.policy)
    parameters = f"{total:,} parameters"
    if trainable != total:
        parameters += f", {trainable:,} of them trained"
    reference = config.reference.pretrained or "the policy's start, frozen"
    if models.adapters is not None and config.reference.pretrained is None:
        named = config.reference.adapter or config.peft.adapter
        without = named is None or named == BASE
        reference = "the base model, adapter off" if without else f"the adapter {named}, frozen"
    if isinstance(models.reference, NoReference):
        reference = "none"
    elif models.reference is None:
        reference += ", cached"
    devices = f"{trainer.world_size} x {device}"
    if config.strategy.name != "auto":
        devices += f", {config.strategy.name}"
    memory = f"{estimate.describe()}; up to {budget.tokens:,} tokens at once"
    if budget.checkpointing:
        memory += ", activations computed again in the backward pass"
    facts = {
        "model": f"{source.name}: {parameters}",
        **({} if models.adapters is None else {"peft": models.adapters.describe()}),
        "data": f"{config.data.train or 'controlled task'}: {counts}",
        "loss": f"{config.loss.name}, beta {config.beta:g}, reference {reference}",
        "steps": f"{schedule.total_steps:,} of {config.data.batch_size} groups, learning rate "
        f"{schedule.learning_rate:g}, {schedule.warmup_steps:,} of warm-up",
        "device": f"{devices}, {precision}, torch {torch.__version__}",
        "memory": memory,
        "folder": str(folder),
    }
    if device == "cpu" and _has_nvidia_gpu():
        why = "this torch is a CPU build" if torch.version.cuda is None else "see nvidia-smi"
        facts["note"] = f"this machine has an NVIDIA GPU that torch cannot use: {why}"
    return facts


def _has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
