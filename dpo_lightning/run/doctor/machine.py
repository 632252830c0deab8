"""Checks of what is installed, of devices, disks and servers."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from urllib.parse import urlparse

from dpo_lightning.memory.budget import memory_of
from dpo_lightning.memory.footprint import GIB, in_gib
from dpo_lightning.memory.gpus import list_gpus, short_name
from dpo_lightning.run.doctor.checks import Finding
from dpo_lightning.run.record import package_versions
from dpo_lightning.settings.folders import cache_folder
from dpo_lightning.tracking.wandb_runs import server_state

OUTPUTS = Path("outputs")
"""Parent of the folders of runs and sweeps, seen from where the command is typed."""

_SECONDS = 5.0
# Below the first not even the embedded model has room for a checkpoint.
_LEAST_FREE, _LITTLE_FREE = 64 << 20, GIB


def check_versions() -> Finding:
    """Versions of what is installed, within the ranges that this package asks for."""
    from packaging.requirements import Requirement

    said = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    try:
        wanted = importlib.metadata.requires("dpo-lightning") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = []  # a clone that is not installed
    wrong = []
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found = "none"
        if found == "none" or not requirement.specifier.contains(found, prereleases=True):
            wrong.append(f"{requirement} is needed, and there is {found}")
    if wrong:
        return "failed", f"{'; '.join(wrong)}; install again with `pip install dpo-lightning`"
    return "ok", said


def check_devices() -> Finding:
    """The devices that torch sees, beside those that the driver lists."""
    import torch

    listed = list_gpus()
    if torch.cuda.is_available():
        facts = []
        for number in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(number)
            capability = f"{card.major}.{card.minor}"
            facts.append(f"{card.name}, {in_gib(card.total_memory)} GiB, capability {capability}")
        sliced = [short_name(device) for gpu in listed for device in gpu.slices]
        return "ok", "; ".join([*facts, *([f"MIG slices: {', '.join(sliced)}"] if sliced else [])])
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed and hidden is None:
        why = (
            f"this torch ({torch.__version__}) is a build without CUDA; install one with it"
            if torch.version.cuda is None
            else f"this torch is built for CUDA {torch.version.cuda}; update the driver"
        )
        return "failed", f"nvidia-smi lists {len(listed)} GPUs and torch sees none: {why}"
    memory = memory_of(torch.device("cpu"))
    room = "" if memory is None else f", {in_gib(memory)} GiB"
    unseen = f"; CUDA_VISIBLE_DEVICES={hidden} hides the GPUs" if listed else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "ok", f"cpu, {cores} cores{room}{unseen}"


def check_driver() -> Finding:
    """Version of the driver, and of CUDA in torch."""
    import torch

    if not torch.cuda.is_available():
        return "ok", "no GPU is used"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
        driver = ", ".join(dict.fromkeys(done.stdout.split()))
    except (OSError, subprocess.SubprocessError):
        return "warning", "nvidia-smi does not answer, so a sweep does not see the GPUs"
    cudnn = torch.backends.cudnn.version()
    return "ok", f"driver {driver}, torch for CUDA {torch.version.cuda}, cuDNN {cudnn}"


def check_bfloat16() -> Finding:
    """True arithmetic in bfloat16, and no emulation of it."""
    import torch

    if not torch.cuda.is_available():
        return "ok", "float32 is the precision of a CPU"
    without = [
        torch.cuda.get_device_name(number)
        for number in range(torch.cuda.device_count())
        if torch.cuda.get_device_capability(number) < (8, 0)
    ]
    if without:
        return "warning", (
            f"{', '.join(dict.fromkeys(without))} would emulate it, which is slow; another "
            "precision is taken unless trainer.precision asks for it"
        )
    return "ok", "computed by the device"


def check_folder(folder: Path, remedy: str, *, needs_locks: bool) -> Finding:
    """Room, atomic renames and locks between processes, where a folder is or would be made.

    Args:
        folder: The folder; it need not exist, and is not made.
        remedy: What to do where it is of no use.
        needs_locks: True if nothing works there without locks.
    """
    parent = folder.expanduser().absolute()
    while not parent.is_dir():
        parent = parent.parent
    try:
        free = shutil.disk_usage(parent).free
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=parent) as own:
            locks = _try_files(Path(own))
    except OSError as error:
        return "failed", f"{folder}: {error.strerror or error}; {remedy}"
    said = f"{folder}: {in_gib(free)} GiB free, renames are atomic"
    if not locks:
        state: Finding = ("failed" if needs_locks else "warning", f"{said}, no locks; {remedy}")
        return state
    if free < _LITTLE_FREE:
        return "failed" if free < _LEAST_FREE else "warning", f"{said}; make room, or {remedy}"
    return "ok", f"{said}, locks work"


def _try_files(folder: Path) -> bool:
    """Replaces a file and locks it; True if a second lock is refused.

    Raises:
        OSError: If a file cannot be written or replaced.
    """
    staged, target = folder / "staged", folder / "target"
    target.write_bytes(b"old")
    staged.write_bytes(b"new")
    with staged.open("rb+") as file:
        os.fsync(file.fileno())
    staged.replace(target)
    if target.read_bytes() != b"new" or staged.exists():
        raise OSError("a file that was renamed is not there under its new name")
    with target.open("rb+") as first, target.open("rb+") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def check_cache() -> Finding:
    """Files that are kept for all runs, and the folder of downloads."""
    from huggingface_hub import constants

    cache = cache_folder(None)
    kept = []
    for name in ("reference", "tokens"):
        files = [path for path in (cache / name).glob("**/*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        kept.append(f"{name} {len(files)} files, {in_gib(size)} GiB")
    return "ok", f"{cache}: {'; '.join(kept)}; downloads are in {constants.HF_HUB_CACHE}"


def check_hub() -> Finding:
    """The hub answers; a run whose model and data are here does without."""
    from huggingface_hub import constants, get_session, get_token

    host = urlparse(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE:
        return "ok", f"{host} is not asked, as HF_HUB_OFFLINE says"
    try:
        get_session().head(constants.ENDPOINT, timeout=_SECONDS)
    except Exception as error:  # of whatever client the hub's library uses
        return "warning", (
            f"{host} does not answer ({type(error).__name__}); models and data sets that are not "
            "here cannot be loaded"
        )
    return "ok", f"{host} answers, {'logged in' if get_token() else 'without a token'}"


def check_wandb() -> Finding:
    """The wandb server answers; a run is recorded offline where it does not."""
    found = server_state()
    if not found.answers:
        return "warning", f"{found.host} does not answer; runs are recorded offline"
    if not found.logged_in:
        return "ok", f"{found.host} answers, not logged in; runs are recorded offline"
    return "ok", f"{found.host} answers, logged in"
