"""The GPUs of this machine by names that nothing renumbers: their UUIDs. Imports no torch.

CUDA numbers devices by their speed unless ``CUDA_DEVICE_ORDER`` says otherwise, ``nvidia-smi`` by
their place on the bus, and a slice of a GPU (MIG) has no number of its own. A UUID means the same
device to all of them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

_GPU = re.compile(r"GPU (\d+): (.*) \(UUID: (GPU-[0-9A-Za-z-]+)\)$")
_SLICE = re.compile(r"\s+MIG .*\(UUID: (MIG-[^)\s]+)\)$")
# A slice by its GPU and two numbers, as drivers before R470 name it.
_OLD_SLICE = re.compile(r"MIG-GPU-[^/]+/\d+/\d+$")
_UUID = re.compile(r"(?:GPU|MIG)-[0-9a-f]{8}(?=-)")


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU as ``nvidia-smi -L`` lists it.

    Attributes:
        number: Its number, in the order of the bus.
        model: Name of its model.
        uuid: Its UUID.
        slices: UUIDs of the MIG slices that it is cut into; a GPU that has some is used by them.
    """

    number: int
    model: str
    uuid: str
    slices: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the parts that a program may be given, as CUDA_VISIBLE_DEVICES takes them."""
        return self.slices or (self.uuid,)


# Nodes of drivers of NVIDIA, of AMD, and of either under WSL.
_DEVICE_NODES = ("nvidia*", "nvhost*", "kfd", "dxg")


def no_gpu_because(folder: Path = Path("/dev")) -> str | None:
    """Reason why torch can use no GPU here, found without importing it; None where it may.

    Args:
        folder: The folder of device nodes.
    """
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None
    if version.endswith("+cpu"):
        return f"torch {version} is a CPU build"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all GPUs"
    nodes = any(any(folder.glob(pattern)) for pattern in _DEVICE_NODES)
    if sys.platform == "linux" and not nodes and shutil.which("nvidia-smi") is None:
        return "this machine has no GPU"
    return None


def no_gpu(accelerator: str, reason: str) -> str:
    """The answer to a GPU that is asked for and not there.

    Args:
        accelerator: ``trainer.accelerator``.
        reason: Why there is none.
    """
    return f"trainer.accelerator={accelerator}: {reason}; use trainer=cpu, or a machine with a GPU"


def list_gpus() -> list[Gpu]:
    """The GPUs of this machine in the order of the bus; none where ``nvidia-smi`` lists none."""
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    found: list[Gpu] = []
    for line in map(str.rstrip, listed.stdout.splitlines()):
        if gpu := _GPU.match(line):
            found.append(Gpu(int(gpu[1]), gpu[2], gpu[3]))
        elif found and (part := _SLICE.match(line)):
            found[-1] = replace(found[-1], slices=(*found[-1].slices, part[1]))
    return found


def memory_of_gpus() -> dict[str, int]:
    """Bytes of memory of each GPU that takes several programs at a time, by its UUID.

    None where ``nvidia-smi`` does not say; a slice of a GPU is not among them.
    """
    query = "--query-gpu=uuid,memory.total,compute_mode"
    try:
        listed = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    found: dict[str, int] = {}
    for line in listed.stdout.splitlines():
        uuid, *rest = (part.strip() for part in line.split(","))
        if len(rest) == 2 and rest[0].isdecimal() and rest[1] == "Default":
            found[uuid] = int(rest[0]) << 20
    return found


def devices_named(name: str, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """The devices that an entry of CUDA_VISIBLE_DEVICES means; none where it means none.

    Args:
        name: A number in the order of the bus, a UUID, or the beginning of one.
        gpus: Those of this machine. One that is cut into slices stands for all of them.
    """
    if name.isdecimal():
        return next((gpu.devices for gpu in gpus if gpu.number == int(name)), ())
    if _OLD_SLICE.match(name):
        return (name,)
    # The beginning of a UUID is enough for CUDA, if it is that of one device alone.
    known = {gpu.uuid: gpu.devices for gpu in gpus}
    known |= {device: (device,) for gpu in gpus for device in gpu.slices}
    found = [devices for uuid, devices in known.items() if uuid.startswith(name)]
    return found[0] if len(found) == 1 else ()


def is_slice(device: str) -> bool:
    """True for a part of a GPU, of which a program sees one at most."""
    return device.startswith("MIG-")


def short_name(device: str) -> str:
    """A device's name as a person reads it: the beginning of a UUID, any other name as it is."""
    found = _UUID.match(device)
    return found[0] if found else device
