"""From what a sweeper asks for to trials that run: composed, checked, placed and dispatched.

This is the part of the launcher that speaks Hydra; the rest of the package does not.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict
from rich.console import Console

from dpo_lightning.config import CONF, RANKING_METRICS, Config
from dpo_lightning.errors import UserError
from dpo_lightning.fingerprint import settings_hash
from dpo_lightning.sweeps.dispatch import Dispatcher
from dpo_lightning.sweeps.leases import DevicePool, Kind, device_kind, make_pool, visible_gpus
from dpo_lightning.sweeps.trials import Plan, Trial, place_trials
from dpo_lightning.sweeps.view import SweepView
from dpo_lightning.validation import validate

# What is the sweep's own and none of a trial's business.
_NOT_PASSED_ON = (
    *("hydra.sweep.", "hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper"),
    *("hydra.mode", "hydra.run.", "hydra.job.config.override_dirname", "sweep.", "sweep="),
)


def launch(
    context: HydraContext,
    base: DictConfig,
    task: Any,
    job_overrides: Sequence[Sequence[str]],
    *,
    first: int,
    devices: Any,
    max_failures: int | None,
    retries: int,
) -> list[JobReturn]:
    """Runs one batch of a sweep.

    Args:
        context: Hydra's.
        base: The sweep's config.
        task: The task function; its ``trials`` are added to.
        job_overrides: The settings of each trial.
        first: Number of the first one in the sweep.
        devices: ``auto``, a count or a list.
        max_failures: After more failed trials than this no other is started.
        retries: How often a trial that crashed is started again.

    Raises:
        UserError: If a setting is wrong, or another sweep is at work in the folder.
    """
    setup_globals()
    configure_log(base.hydra.hydra_logging, base.hydra.verbose)
    check_options(devices, max_failures, retries)
    sweep_dir = Path(str(base.hydra.sweep.dir))
    sweep_dir.mkdir(parents=True, exist_ok=True)
    gpus = visible_gpus()
    composed = []
    for number, overrides in enumerate(job_overrides, start=first):
        cfg = context.config_loader.load_sweep_config(base, list(overrides))
        with open_dict(cfg):
            cfg.hydra.job.id = str(number)
            cfg.hydra.job.num = number
        composed.append((cfg, _plan(cfg, overrides, gpus)))
    plans = [plan for _, plan in composed]
    widths: dict[Kind, int] = {}
    for plan in plans:
        widths[plan.kind] = max(widths.get(plan.kind, 0), plan.width)
    pools = _make_pools(widths, devices, gpus)
    lock = FileLock(sweep_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"hydra.sweep.dir={sweep_dir}: another sweep is at work there; wait for it, or name "
            "another folder"
        ) from None
    try:
        trials = place_trials(plans, sweep_dir)
        _add(task.trials, trials)
        failures = sum(trial.failed for trial in task.trials)
        with SweepView(trials, Console()) as view:
            Dispatcher(
                trials,
                pools=pools,
                script=CONF.parent / "train.py",
                # wandb reads it; a group in the settings wins.
                environment={"WANDB_RUN_GROUP": sweep_dir.resolve().name},
                # Those of earlier batches count.
                max_failures=None if max_failures is None else max_failures - failures,
                retries=retries,
                view=view,
            ).run()
    finally:
        lock.release()
    by_hash = {trial.plan.settings_hash: trial for trial in trials}
    return [
        _job_return(cfg, overrides, by_hash[plan.settings_hash])
        for (cfg, plan), overrides in zip(composed, job_overrides, strict=True)
    ]


def _add(known: list[Trial], trials: Sequence[Trial]) -> None:
    """Adds a batch; a sweeper may have asked for some of its trials before."""
    again = {trial.folder for trial in trials}
    known[:] = [*(trial for trial in known if trial.folder not in again), *trials]


def check_trials(launcher: DictConfig, configs: Sequence[Config]) -> None:
    """Checks before anything is made that each trial can have the devices it wants.

    Args:
        launcher: ``hydra.launcher``.
        configs: The settings of all trials.

    Raises:
        UserError: If the launcher's own settings are wrong, or a trial would never fit.
    """
    check_options(launcher.devices, launcher.max_failures, launcher.retries)
    gpus = visible_gpus()
    widths: dict[Kind, int] = {}
    for config in configs:
        if config.trainer.num_nodes > 1:
            raise UserError(
                f"trainer.num_nodes={config.trainer.num_nodes}: this launcher starts trials on "
                "this machine; use trainer.num_nodes=1"
            )
        kind = device_kind(config.trainer.accelerator, gpus)
        widths[kind] = max(widths.get(kind, 0), _width(config))
    _make_pools(widths, launcher.devices, gpus)


def check_options(devices: Any, max_failures: int | None, retries: int) -> None:
    """Checks the launcher's own settings.

    Raises:
        UserError: Naming the first that is wrong.
    """
    is_list = not isinstance(devices, str | int) and len(devices) > 0
    if not (devices == "auto" or is_list or (type(devices) is int and devices > 0)):
        raise UserError(
            f"hydra.launcher.devices={devices}: needs auto, a count of at least 1, or a list of "
            "device numbers such as [0,1]"
        )
    for name, value in (("max_failures", max_failures), ("retries", retries)):
        if value is not None and value < 0:
            raise UserError(f"hydra.launcher.{name}={value}: needs a whole number, at least 0")


def _plan(cfg: DictConfig, overrides: Sequence[str], gpus: Sequence[str]) -> Plan:
    config = validate(cfg, explicit_run_dir=True)
    width = _width(config)
    own = [line for line in overrides if not line.lstrip("+~").startswith(_NOT_PASSED_ON)]
    if isinstance(config.trainer.devices, list):
        # Its lease decides which; to the trial there are just so many.
        config.trainer.devices = width
        own = [line for line in own if not line.startswith("trainer.devices=")]
        own.append(f"trainer.devices={width}")
    of_hydra = [
        line
        for line in cfg.hydra.overrides.hydra
        if not line.lstrip("+~").startswith(_NOT_PASSED_ON)
    ]
    not_swept = set(cfg.hydra.job.config.override_dirname.exclude_keys)
    return Plan(
        name=str(cfg.hydra.sweep.subdir),
        overrides=tuple(line for line in own if line.lstrip("+~").split("=")[0] not in not_swept),
        arguments=(*_flags(cfg), *own, *of_hydra),
        settings_hash=settings_hash(config),
        kind=device_kind(config.trainer.accelerator, gpus),
        width=width,
        facts={
            "beta": config.beta,
            "loss": config.loss.name,
            "seed": config.seed,
            "command": shlex.join(["python", "train.py", *own]),
        },
        batch_size=config.data.batch_size,
    )


def _width(config: Config) -> int:
    devices = config.trainer.devices
    if devices == "auto":
        return 1
    return devices if isinstance(devices, int) else len(devices)


def _flags(cfg: DictConfig) -> Iterator[str]:
    """The flags by which a trial finds the same config files."""
    yield from ("--config-name", str(cfg.hydra.job.config_name))
    for source in cfg.hydra.runtime.config_sources:
        path = str(source.path)
        if source.provider == "main" and Path(path) != CONF:
            yield from ("--config-path", path)
        elif source.provider == "command-line":
            yield from ("--config-dir", path)


def _make_pools(
    widths: Mapping[Kind, int], devices: Any, gpus: Sequence[str]
) -> dict[Kind, DevicePool]:
    """A pool for each kind of device, as wide as the widest trial of the kind at least."""
    pools: dict[Kind, DevicePool] = {}
    for kind, width in widths.items():
        pools[kind] = make_pool(kind, devices, gpus)
        there = len(pools[kind].devices)
        if width > there:
            raise UserError(
                f"trainer.devices={width}: the sweep has {there} {kind} devices; lower it, or give "
                f"it more with hydra.launcher.devices={width}"
            )
    return pools


def _job_return(cfg: DictConfig, overrides: Sequence[str], trial: Trial) -> JobReturn:
    """The outcome as sweepers take it; the value of a trial that has none is None."""
    value = None
    if trial.status == "finished":
        names = [cfg.sweep.metric] if cfg.sweep.metric else RANKING_METRICS
        found = [trial.metrics[name] for name in names if trial.metrics.get(name) is not None]
        value = float(found[0]) if found else None
    # Not FAILED, at which sweepers stop: the others' results count, and the exit code tells.
    return JobReturn(
        overrides=list(overrides),
        cfg=cfg,
        hydra_cfg=cfg,
        working_dir=str(trial.folder),
        task_name=trial.folder.name,
        status=JobStatus.COMPLETED,
        _return_value=value,
    )
