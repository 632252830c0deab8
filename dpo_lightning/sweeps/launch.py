"""Launch of a sweep's trials: composed, checked, placed and dispatched.

This is the part of the launchers that speaks Hydra; but for the class that Hydra calls, the rest of
the package does not.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.console import Console

from dpo_lightning.errors import UserError
from dpo_lightning.memory.estimate import memory_settings
from dpo_lightning.settings.fingerprint import settings_hash
from dpo_lightning.settings.program import RUN, STARTED_AS, TRIAL, started_as, typed
from dpo_lightning.settings.pruning import pool_of, prune_settings
from dpo_lightning.settings.schema import CONF, RANKING_METRICS, Config
from dpo_lightning.settings.validation import validate
from dpo_lightning.sweeps.course import Course
from dpo_lightning.sweeps.dispatch import Dispatcher
from dpo_lightning.sweeps.places.base import Demand, Site, Work
from dpo_lightning.sweeps.places.local import LocalSite
from dpo_lightning.sweeps.places.ray_tasks import RaySite
from dpo_lightning.sweeps.places.slurm_site import SlurmSite
from dpo_lightning.sweeps.trials import Plan, Trial, place_trials
from dpo_lightning.sweeps.view import SweepView

# What is the sweep's own and none of a trial's business.
_NOT_PASSED_ON = (
    *("hydra.sweep.", "hydra.launcher", "hydra/launcher", "hydra.sweeper", "hydra/sweeper"),
    *("hydra.mode", "hydra.run.", "hydra.job.config.override_dirname", "sweep.", "sweep="),
)

_SITES: dict[str, Callable[..., Site]] = {
    "DevicesLauncher": LocalSite,
    "SlurmLauncher": SlurmSite.of,
    "RayLauncher": RaySite,
}


def launch(
    context: HydraContext,
    base: DictConfig,
    task: Any,
    job_overrides: Sequence[Sequence[str]],
    *,
    first: int,
) -> list[JobReturn]:
    """Runs one batch of a sweep.

    Args:
        context: Hydra's.
        base: The sweep's config; its ``hydra.launcher`` says where and how.
        task: The task function; its ``trials`` are added to.
        job_overrides: The settings of each trial.
        first: Number of the first one in the sweep.

    Raises:
        UserError: If a setting is wrong, or another sweep is at work in the folder.
    """
    setup_globals()
    configure_log(base.hydra.hydra_logging, base.hydra.verbose)
    site = find_site(base.hydra.launcher)
    assert site is not None
    site.check()
    sweep_dir = Path(str(base.hydra.sweep.dir))
    sweep_dir.mkdir(parents=True, exist_ok=True)
    composed, configs = [], []
    for number, overrides in enumerate(job_overrides, start=first):
        cfg = context.config_loader.load_sweep_config(base, list(overrides))
        with open_dict(cfg):
            cfg.hydra.job.id = str(number)
            cfg.hydra.job.num = number
        config = validate(cfg, explicit_run_dir=True)
        configs.append(config)
        composed.append((cfg, _plan(cfg, config, overrides, site)))
    site.check_trials([_demand(config) for config in configs])
    pruning = prune_settings(configs)
    plans = [plan for _, plan in composed]
    with _alone_in(sweep_dir):
        trials = place_trials(plans, sweep_dir)
        _add(task.trials, trials)
        failures = sum(trial.failed for trial in task.trials)
        course = None
        if pruning is not None:
            pools = zip(plans, (pool_of(config, pruning.within) for config in configs), strict=True)
            by_trial = {plan.settings_hash: pool for plan, pool in pools}
            course = Course(pruning, trials, by_trial, sweep_dir)
            course.begin()
        _run_trials(site, plans, trials, sweep_dir, failures=failures, before=first, course=course)
    by_hash = {trial.plan.settings_hash: trial for trial in trials}
    return [
        _job_return(cfg, overrides, by_hash[plan.settings_hash])
        for (cfg, plan), overrides in zip(composed, job_overrides, strict=True)
    ]


@contextlib.contextmanager
def _alone_in(sweep_dir: Path) -> Iterator[None]:
    """Keeps other sweeps out of the folder.

    Raises:
        UserError: If one is at work there.
    """
    lock = FileLock(sweep_dir / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"hydra.sweep.dir={sweep_dir}: another sweep is running there; wait for it, or name "
            "another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _run_trials(
    site: Site,
    plans: Sequence[Plan],
    trials: list[Trial],
    sweep_dir: Path,
    *,
    failures: int,
    before: int,
    course: Course | None,
) -> None:
    """Runs the trials that wait.

    Args:
        site: Where they run.
        plans: Of all trials.
        trials: All of the batch.
        sweep_dir: The sweep's folder.
        failures: Trials that have failed before.
        before: Trials of earlier batches.
        course: Where they stop on their way; None: nowhere.
    """
    if not any(trial.status in ("waiting", "paused") for trial in trials):
        with SweepView(trials, Console()):
            return  # it says that all are done
    work = Work(
        plans=plans,
        folder=sweep_dir,
        program=RUN,
        environment={
            # wandb reads it; a group in the settings wins, and so does the user's own.
            "WANDB_RUN_GROUP": os.environ.get("WANDB_RUN_GROUP") or sweep_dir.resolve().name,
            STARTED_AS: started_as(),
            TRIAL: "1",
        },
        before=before,
    )
    most = site.max_failures
    with site.open(work) as place, SweepView(trials, Console()) as view:
        Dispatcher(
            trials,
            place=place,
            # Those of earlier batches count.
            max_failures=None if most is None else most - failures,
            retries=site.retries,
            view=view,
            course=course,
        ).run()


def _add(known: list[Trial], trials: Sequence[Trial]) -> None:
    """Adds a batch; a sweeper may have asked for some of its trials before."""
    again = {trial.folder for trial in trials}
    known[:] = [*(trial for trial in known if trial.folder not in again), *trials]


def find_site(launcher: DictConfig) -> Site | None:
    """Place that ``hydra.launcher`` describes; None for a launcher that is not ours.

    Args:
        launcher: ``hydra.launcher``.
    """
    maker = _SITES.get(str(launcher.get("_target_", "")).rpartition(".")[2])
    if maker is None:
        return None
    options = OmegaConf.to_container(launcher, resolve=True)
    assert isinstance(options, dict)
    return maker(**{str(key): value for key, value in options.items() if key != "_target_"})


def check_launcher(launcher: DictConfig, configs: Sequence[Config]) -> None:
    """Checks before anything is made that the launcher can run each trial.

    Args:
        launcher: ``hydra.launcher``.
        configs: The settings of all trials that are known.

    Raises:
        UserError: If the launcher's own settings are wrong, or a trial would never fit.
    """
    site = find_site(launcher)
    if site is not None:
        site.check()
        site.check_trials([_demand(config) for config in configs])


def check_pruning(cfg: DictConfig, configs: Sequence[Config]) -> None:
    """Checks before anything is made that a sweep can be pruned as it asks.

    Args:
        cfg: The sweep's settings.
        configs: Those of all trials; empty where the sweeper finds them on its way.

    Raises:
        UserError: If it cannot.
    """
    if all(config.sweep.prune == "none" for config in configs) and cfg.sweep.prune == "none":
        return
    key = "sweep.prune=halving"
    if find_site(cfg.hydra.launcher) is None:
        raise UserError(
            f"{key}: this launcher runs each trial to its end; use hydra/launcher=devices, slurm "
            "or ray, or sweep.prune=none"
        )
    if not configs or OmegaConf.select(cfg, "hydra.sweeper.max_batch_size") is not None:
        raise UserError(
            f"{key}: all trials have to be known when the sweep begins; use hydra/sweeper=basic "
            "without max_batch_size, or sweep.prune=none"
        )
    prune_settings(configs)


def _demand(config: Config) -> Demand:
    return Demand(config.trainer.accelerator, _width(config), config.trainer.num_nodes)


def _plan(cfg: DictConfig, config: Config, overrides: Sequence[str], site: Site) -> Plan:
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
    typed_blocks = any(line.startswith("sweep.trials=") for line in overrides)
    of_experiment = cfg.hydra.runtime.choices.get("experiment") is not None or not typed_blocks
    if config.sweep.trials is not None and of_experiment:
        own.append("sweep.trials=null")  # a trial is of one of the blocks that its file holds
    not_swept = {*cfg.hydra.job.config.override_dirname.exclude_keys, "sweep.trials"}
    return Plan(
        name=str(cfg.hydra.sweep.subdir),
        overrides=tuple(line for line in own if line.lstrip("+~").split("=")[0] not in not_swept),
        arguments=(*_flags(cfg), *own, *of_hydra),
        settings_hash=settings_hash(config),
        kind=site.kind(config.trainer.accelerator),
        width=width,
        nodes=config.trainer.num_nodes,
        accelerator=config.trainer.accelerator,
        facts={
            "beta": config.beta,
            "loss": config.loss.name,
            "seed": config.seed,
            "command": shlex.join([*typed(), *own]),
        },
        batch_size=config.data.batch_size,
        memory=repr((memory_settings(config), config.model, config.trainer.precision)),
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
