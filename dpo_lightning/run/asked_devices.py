"""Devices that a run asks for, judged before anything is loaded. Imports no torch."""

from __future__ import annotations

import os

from dpo_lightning.errors import UserError
from dpo_lightning.memory.gpus import no_gpu, no_gpu_because
from dpo_lightning.settings.schema import TrainerConfig


def check_devices(trainer: TrainerConfig) -> str | None:
    """Judges the devices that the settings ask for, as far as this machine tells without torch.

    Args:
        trainer: The group of settings.

    Returns:
        A warning of more processes than CPU cores; None where there is nothing to say.

    Raises:
        UserError: If they are GPUs, and torch can use none here.
    """
    reason = no_gpu_because()
    if reason is not None and trainer.accelerator in ("gpu", "cuda"):
        raise UserError(no_gpu(trainer.accelerator, reason))
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and reason is not None)
    count, cores = trainer.devices, cpu_cores()
    if not on_cpu or not isinstance(count, int) or count <= cores:
        return None
    return (
        f"trainer.devices={count}: {count} processes share {cores} CPU "
        f"{'core' if cores == 1 else 'cores'}, which is slower than trainer.devices={cores}"
    )


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
