"""Leases on the devices of a machine, one for each trial of a sweep. Imports no torch."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.memory.gpus import Gpu, devices_named, is_slice, list_gpus, short_name
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.sweeps.places.sharing import Shares

log = logging.getLogger(__name__)

# More processes on one CPU's memory than this only wait for it; each gets more threads instead.
_MOST_CPU_SLOTS = 4
THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
"""By what the libraries below torch are told how many threads to start."""


@dataclass(frozen=True, slots=True)
class Lease:
    """Devices that one trial holds, alone or beside others.

    Attributes:
        kind: Their kind.
        devices: Their names: of CUDA devices UUIDs, or what else CUDA_VISIBLE_DEVICES takes; else
            numbers.
        share: The part of each that it holds; all of it alone.
    """

    kind: DeviceKind
    devices: tuple[str, ...]
    share: Fraction = Fraction(1)

    @property
    def labels(self) -> list[str]:
        """The devices as a reader knows them, such as ``cpu:3`` or ``cuda:GPU-5d5ba0d6``."""
        return [f"{self.kind}:{short_name(device)}" for device in self.devices]


class DevicePool:
    """The devices of one kind, and what of each is free.

    Args:
        kind: Their kind.
        devices: Their names.
    """

    def __init__(self, kind: DeviceKind, devices: Sequence[str]) -> None:
        self.kind: DeviceKind = kind
        self.devices = tuple(devices)
        self._free = dict.fromkeys(devices, Fraction(1))

    def has(self, width: int, shares: Shares | None = None) -> bool:
        """True if ``width`` devices are free, or the trial's share of one."""
        return width <= len(self._fitting(width, shares or {}))

    def _fitting(self, width: int, shares: Shares) -> list[str]:
        """Devices with room; those with most of it first, else in their order."""
        part = shares if width == 1 else {}
        found = [device for device in self.devices if part.get(device, 1) <= self._free[device]]
        return sorted(found, key=lambda device: -self._free[device])

    def take(self, width: int, shares: Shares | None = None) -> Lease | None:
        """A lease, or None while there is no room.

        Args:
            width: Number of devices; of several each is taken whole.
            shares: Part of each device that the trial takes of one; None: all of it.
        """
        taken = self._fitting(width, shares or {})[:width]
        if len(taken) < width:
            return None
        share = (shares or {}).get(taken[0], Fraction(1)) if width == 1 else Fraction(1)
        for device in taken:
            self._free[device] -= share
        return Lease(self.kind, tuple(taken), share)

    def give_back(self, lease: Lease) -> None:
        """Ends a lease; the order of the devices stays theirs."""
        for device in lease.devices:
            self._free[device] += lease.share

    def environment(self, lease: Lease) -> dict[str, str]:
        """Variables of a trial's environment that limit it to its devices."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(lease.devices) if self.kind == "cuda" else ""}


def thread_limits(slots: int, given: Mapping[str, str]) -> dict[str, str]:
    """Variables that give each trial of a sweep its share of the cores.

    They are the same for all of its trials, however many run at a time: the last bits of a result
    may depend on them.

    Args:
        slots: Number of trials that run at a time at most.
        given: The environment that they inherit; a limit in it is the user's and stays.
    """
    threads = max(1, len(_cores()) // max(1, slots))
    limits = {name: str(threads) for name in THREAD_LIMITS}
    # NumPy starts its threads when it is imported, and a trial has no products for them.
    limits["OPENBLAS_NUM_THREADS"] = "1"
    return {name: count for name, count in limits.items() if name not in given}


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
                    f"({', '.join(map(short_name, gpus))}), numbered from 0"
                )
            chosen.append(gpus[int(number)])
        else:
            # As CUDA itself, which knows a device by the beginning of its name.
            meant = [gpu for gpu in gpus if gpu.startswith(str(number))]
            chosen.append(meant[0] if len(meant) == 1 else str(number))
    twice = next((name for name in chosen if chosen.count(name) > 1), None)
    if twice is not None:
        raise UserError(
            f"hydra.launcher.devices={wanted}: {short_name(twice)} is named twice, and a device "
            "is one trial's at a time; name it once"
        )
    return chosen


def check_width(width: int, pool: DevicePool) -> None:
    """Refuses trials for which there are too few devices.

    Args:
        width: ``trainer.devices``, counted.
        pool: The devices of their kind.

    Raises:
        UserError: If they want more than there are, or several where some are slices of a GPU.
    """
    there = len(pool.devices)
    if width > there:
        raise UserError(
            f"trainer.devices={width}: the sweep has {there} {pool.kind} devices; lower it, or "
            f"give it more with hydra.launcher.devices={width}"
        )
    slices = [device for device in pool.devices if is_slice(device)]
    if width > 1 and slices:
        raise UserError(
            f"trainer.devices={width}: {short_name(slices[0])} is a slice of a GPU (MIG), and a "
            "program sees one slice at most; use trainer.devices=1, or name whole GPUs with "
            "hydra.launcher.devices=[<UUIDs>]"
        )


def visible_gpus(environment: Mapping[str, str] | None = None) -> list[str]:
    """The CUDA devices that a trial could use, as CUDA_VISIBLE_DEVICES names them.

    UUIDs where ``nvidia-smi`` lists the devices; what is in CUDA_VISIBLE_DEVICES as it is where it
    does not. None where torch is a build without CUDA: there a trial would run on the CPU.

    Args:
        environment: The environment; None is this process's.
    """
    environment = os.environ if environment is None else environment
    if not _torch_has_cuda():
        return []
    given = environment.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        return [device for gpu in list_gpus() for device in gpu.devices]
    names = [name.strip() for name in given.split(",")]
    # CUDA itself stops at the first name that is none.
    end = next((i for i, name in enumerate(names) if name in ("", "-1")), len(names))
    names = names[:end]
    gpus = list_gpus() if names else []
    if not gpus:
        return names
    if any(map(str.isdecimal, names)):
        _say_order(gpus, environment)
    found: list[str] = []
    for name in names:
        meant = devices_named(name, gpus)
        if not meant:
            log.warning(
                "CUDA_VISIBLE_DEVICES=%s: nvidia-smi lists no %s, so it and what follows is left "
                "out, as CUDA does; `nvidia-smi -L` shows what there is",
                *(given, name),
            )
            break
        found += [device for device in meant if device not in found]
    return found


def _say_order(gpus: Sequence[Gpu], environment: Mapping[str, str]) -> None:
    """Says which GPU a number means where CUDA and the bus may number them differently."""
    if environment.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({g.model for g in gpus}) == 1:
        return
    log.warning(
        "CUDA_VISIBLE_DEVICES=%s: there are several models of GPU, and the numbers are taken in "
        "the order of the bus, as nvidia-smi shows them; UUIDs (`nvidia-smi -L`), or "
        "CUDA_DEVICE_ORDER=PCI_BUS_ID, mean the same to every program",
        environment["CUDA_VISIBLE_DEVICES"],
    )


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


def core_count() -> int:
    """Number of cores that this process may use."""
    return len(_cores())


def _cores() -> Sequence[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)
