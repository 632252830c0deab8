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

from dpo_lightning.memory.hardware import device_kind

# In Lightning's order, which decides by the first that is there.
_LAUNCHERS = (TorchElasticEnvironment, SLURMEnvironment, LSFEnvironment, MPIEnvironment)


def local_rank() -> int:
    """This process's number on its machine, by what started it; 0 where it was started alone."""
    for launcher in _LAUNCHERS:
        if launcher.detect():
            return int(launcher().local_rank())
    return int(LightningEnvironment().local_rank())


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
