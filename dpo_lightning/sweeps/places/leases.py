"""Leases on the devices of a machine, one for each trial of a sweep. Imports no torch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.settings.names import DeviceKind

# More processes on one CPU's memory than this only wait for it; each gets more threads instead.
_MOST_CPU_SLOTS = 4
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""By what the libraries below torch are told how many threads to start."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Devices that one trial holds alone.

    Attributes:
        kind: Their kind.
        devices: Their names: of CUDA devices what CUDA_VISIBLE_DEVICES takes, else numbers.
    """

    kind: DeviceKind
    devices: tuple[str, ...]

    @property
    def labels(self) -> list[str]:
        """The devices as a reader knows them, such as ``cuda:3``."""
        return [f"{self.kind}:{device}" for device in self.devices]


class DevicePool:
    """The devices of one kind, and which of them are free.

    Args:
        kind: Their kind.
        devices: Their names.
    """

    def __init__(self, kind: DeviceKind, devices: Sequence[str]) -> None:
        self.kind: DeviceKind = kind
        self.devices = tuple(devices)
        self._free = list(devices)

    def has(self, width: int) -> bool:
        """True if ``width`` devices are free."""
        return width <= len(self._free)

    def take(self, width: int) -> Lease | None:
        """A lease on ``width`` devices, or None while fewer are free."""
        if not self.has(width):
            return None
        taken, self._free = self._free[:width], self._free[width:]
        return Lease(self.kind, tuple(taken))

    def give_back(self, lease: Lease) -> None:
        """Ends a lease; the order of the devices stays theirs."""
        free = {*self._free, *lease.devices}
        self._free = [device for device in self.devices if device in free]

    def environment(self, lease: Lease, given: Mapping[str, str]) -> dict[str, str]:
        """Variables of a trial's environment that limit it to its devices and its share of cores.

        Args:
            lease: The trial's lease.
            given: The environment it inherits; a thread limit in it is the user's and stays.
        """
        visible = ",".join(lease.devices) if self.kind == "cuda" else ""
        threads = max(1, len(_cores()) // len(self.devices))
        limits = {name: str(threads) for name in THREAD_LIMITS if name not in given}
        return {"CUDA_VISIBLE_DEVICES": visible, **limits}


def kind_of_trial(accelerator: str, gpus: Sequence[str]) -> DeviceKind:
    """The kind of device that ``trainer.accelerator`` means on this machine."""
    if accelerator in ("cpu", "mps"):
        return "cpu" if accelerator == "cpu" else "mps"
    if accelerator == "auto":
        return "cuda" if gpus else "cpu"
    return "cuda"


def make_pool(kind: DeviceKind, wanted: Any, gpus: Sequence[str]) -> DevicePool:
    """The devices that ``hydra.launcher.devices`` names.

    Args:
        kind: Kind of device that the trials run on.
        wanted: ``auto`` (all there are), a count, or a list: of CUDA devices their numbers among
            the visible ones, or names as CUDA_VISIBLE_DEVICES takes them.
        gpus: The visible CUDA devices.

    Raises:
        UserError: If it names devices that are not there.
    """
    if kind == "cuda":
        return DevicePool(kind, _chosen_gpus(wanted, gpus))
    if kind == "mps":
        return DevicePool(kind, ["0"])
    if wanted == "auto":
        return DevicePool(kind, [str(n) for n in range(min(_MOST_CPU_SLOTS, len(_cores())))])
    if isinstance(wanted, int):
        return DevicePool(kind, [str(number) for number in range(wanted)])
    return DevicePool(kind, [str(name) for name in wanted])


def _chosen_gpus(wanted: Any, gpus: Sequence[str]) -> list[str]:
    if not gpus:
        raise UserError(
            "trainer.accelerator=gpu: no CUDA device is visible here; use trainer.accelerator=cpu"
        )
    if wanted == "auto":
        return list(gpus)
    numbers = list(range(wanted)) if isinstance(wanted, int) else list(wanted)
    chosen = []
    for number in numbers:
        if isinstance(number, int) or str(number).isdigit():
            if int(number) >= len(gpus):
                raise UserError(
                    f"hydra.launcher.devices={wanted}: {len(gpus)} CUDA devices are visible "
                    f"({', '.join(gpus)}), numbered from 0"
                )
            chosen.append(gpus[int(number)])
        else:
            chosen.append(str(number))
    return chosen


def visible_gpus(environment: Mapping[str, str] | None = None) -> list[str]:
    """The CUDA devices that a trial could use, as CUDA_VISIBLE_DEVICES names them.

    None where torch is a build without CUDA: there a trial would run on the CPU.
    """
    environment = os.environ if environment is None else environment
    if not _torch_has_cuda():
        return []
    if "CUDA_VISIBLE_DEVICES" in environment:
        names = [name.strip() for name in environment["CUDA_VISIBLE_DEVICES"].split(",")]
        # CUDA itself stops at the first name that is none.
        end = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
        return names[:end]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.stdout.splitlines() if line.strip().isdigit()]


def _torch_has_cuda() -> bool:
    """True if the installed torch was built for GPUs; torch is not imported for it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    try:
        text = (Path(spec.origin).parent / "version.py").read_text()
    except OSError:
        return True  # unknown: nvidia-smi decides
    return re.search(r"^(cuda|hip)\b[^=]*= *['\"]", text, flags=re.MULTILINE) is not None


def _cores() -> Sequence[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)
