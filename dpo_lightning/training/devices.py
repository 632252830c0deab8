"""The GPU that this process computes on, as Lightning will choose it, taken before anything loads.

What is loaded straight onto a GPU, such as weights in 4 bits, goes to the current one, which in
every process is the first until somebody says otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.lsf import LSFEnvironment
from lightning.fabric.plugins.environments.mpi import MPIEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from dpo_lightning.errors import UserError
from dpo_lightning.memory.gpus import no_gpu
from dpo_lightning.memory.hardware import device_kind

# In Lightning's order, which decides by the first that is there.
_LAUNCHERS = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)


def local_rank() -> int:
    """This process's number on its machine, by what started it; 0 where it was started alone."""
    for launcher in _LAUNCHERS:
        if launcher.detect():
            return int(launcher().local_rank())
    return int(LightningEnvironment().local_rank())


def check_there(accelerator: str, devices: Any) -> None:
    """Refuses devices of which torch sees none, before a model or rows are loaded for them.

    Args:
        accelerator: ``trainer.accelerator``.
        devices: A count, a list of numbers, or ``auto``.

    Raises:
        UserError: If there are no such devices.
    """
    has_cuda, has_mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if accelerator == "mps" and not has_mps:
        raise UserError("trainer.accelerator=mps: torch sees no such device; use trainer=cpu")
    # As Lightning reads it, a Mac's is a GPU too.
    if accelerator in ("gpu", "cuda") and not has_cuda and not (accelerator == "gpu" and has_mps):
        is_cpu_build = torch.version.cuda is None and torch.version.hip is None
        build = f"torch {torch.__version__} is a CPU build"
        raise UserError(no_gpu(accelerator, build if is_cpu_build else "torch sees no GPU here"))
    if devices == "auto" or not has_cuda or device_kind(accelerator) != "cuda":
        return
    there = torch.cuda.device_count()
    asked = devices if isinstance(devices, list) else range(devices)
    if missing := [number for number in asked if number >= there]:
        raise UserError(
            f"trainer.devices={devices}: there is no GPU {missing[0]}, torch sees {there} here, "
            f"numbered from 0; use trainer.devices={there}"
        )


def take_device(accelerator: str, devices: Any) -> None:
    """Makes this process's own GPU the current one; nothing without a GPU.

    Args:
        accelerator: As the next one, what Lightning's trainer takes by that name.
        devices: A count, a list of numbers, or ``auto``.
    """
    if device_kind(accelerator) != "cuda" or not torch.cuda.is_available():
        return
    place = local_rank()
    numbers = devices if isinstance(devices, list) else range(torch.cuda.device_count())
    # What is not there Lightning refuses, with its own words.
    if place < len(numbers) and numbers[place] < torch.cuda.device_count():
        torch.cuda.set_device(numbers[place])
