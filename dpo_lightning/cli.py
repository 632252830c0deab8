"""The command line: Hydra composes, every setting is checked, and only then something starts.

Hydra makes a run's folder before it calls anything of ours, and reports its own errors as several
lines with exit code 1. So the settings are composed and checked before Hydra makes anything, and
Hydra runs what was composed: a wrong setting is one line, exit code 2, and leaves no folder. Of a
sweep in this process every trial is checked before the first one starts.
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import DpoLightningError, UserError
from dpo_lightning.memory.segments import allocate_in_segments
from dpo_lightning.processes.signals import stop_if_interrupted
from dpo_lightning.run.asked_devices import check_devices
from dpo_lightning.run.folder import (
    RunFolder,
    disk_fault,
    hold_run,
    is_rank_zero,
    nothing_to_do,
)
from dpo_lightning.run.guard import STOPPED, exit_code, guarded, report, show_traceback
from dpo_lightning.settings import compose as composing
from dpo_lightning.settings.compose import (
    ComposedOnce,
    by_sweep,
    check_shown,
    compose,
    help_of,
    is_called,
    lines_of,
    make_hydra,
    on_earlier,
    parse_words,
    ready_hydra,
    typed_overrides,
    unused_choices,
    with_folder,
    with_resumed_folder,
)
from dpo_lightning.settings.credentials import random_values
from dpo_lightning.settings.folders import (
    cannot_write,
    hydra_files,
    is_fixed,
    refuse_links,
)
from dpo_lightning.settings.generation import backend_of, check_trainable
from dpo_lightning.settings.grids import check_grid
from dpo_lightning.settings.hydra_node import hydra_problems
from dpo_lightning.settings.messages import shown
from dpo_lightning.settings.overrides import (
    flag_parser,
    hydra_error,
    needs_multirun,
    raise_all,
)
from dpo_lightning.settings.program import typed
from dpo_lightning.settings.recorded import is_alone
from dpo_lightning.settings.schema import CONF, Config, LoggerConfig
from dpo_lightning.settings.validation import validate
from dpo_lightning.sweeps.trials import SweepFacts, Trial
from dpo_lightning.tracking.terminal import WaitingLogs


class _Job:
    """The function that Hydra calls: for one run, or each trial of a sweep in this process.

    Args:
        sweep: What is known of the sweep; None for one run.
        in_process: True if the trials of a sweep share this process.
        grid: Settings of each trial, for the sweeper of blocks.

    Attributes:
        subdir: Folder of Hydra's files in that of a run, ``.hydra`` as a rule; None for none.
        codes: Exit codes of what ran in this process.
        trials: The trials that the launcher ran elsewhere; it adds them.
    """

    def __init__(
        self,
        sweep: SweepFacts | None,
        subdir: str | None = None,
        *,
        in_process: bool = True,
        grid: Sequence[list[str]] = (),
    ) -> None:
        self.sweep = sweep
        self.subdir = subdir
        self.in_process = in_process
        self.grid = grid
        self.codes: list[int] = []
        self.trials: list[Trial] = []

    def __call__(self, cfg: DictConfig) -> int:
        """Run one experiment in this process."""
        self.codes.append(_run_one(cfg, self.subdir, is_trial=self.sweep is not None))
        if self.sweep is not None and self.codes[-1] in STOPPED:
            raise SystemExit(self.codes[-1])  # whoever stopped a trial meant the sweep
        return self.codes[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the command line asks for.

    Args:
        argv: The arguments, without the program's name; None takes the process's own.

    Returns:
        The exit code: 0 finished, 1 unexpected or a trial of a sweep failed, 2 config or data, and
        what a run itself ended with.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    parser = flag_parser()
    args = parse_words(parser, argv)
    if args.shell_completion:
        _show(args, parser)
        return 0
    if args.help and not args.help_all:
        print(help_of(args))
        return 0
    if args.help_all or args.hydra_help or args.cfg is not None or args.info is not None:
        check_shown(args)
        args.help = args.help_all
        _show(args, parser)
        return 0
    raise_all(_flag_problems(args))
    allocate_in_segments(os.environ)
    hydra = make_hydra(args)
    checked = _check(args, hydra)
    stop_if_interrupted()
    job = checked.job
    if checked.is_done:
        return 0
    if job.sweep is None:
        _run(hydra, args, checked)
        return job.codes[0]
    from dpo_lightning.sweeps.finish import finish_sweep, show_stopped
    from dpo_lightning.tracking.wandb_runs import ready_for_trials

    ready_for_trials()
    try:
        with _hydra_errors("sweep.dir"):
            hydra.multirun(
                config_name=args.config_name,
                task_function=job,
                overrides=[*args.overrides, "hydra.mode=MULTIRUN"],
            )
    except (KeyboardInterrupt, SystemExit):
        show_stopped(job.sweep, job.trials)
        raise
    except UserError:
        if job.trials:  # the sweeper's own end; what its trials found is still there
            finish_sweep(job.sweep, job.trials)
        raise
    finished = finish_sweep(job.sweep, job.trials)
    return 0 if finished and not any(job.codes) else 1


def _flag_problems(args: argparse.Namespace) -> Iterator[str]:
    """Flags that do not go with a run or a sweep, one clause each."""
    if args.run and args.multirun:
        yield "--run and --multirun exclude each other: give one of them"
    if args.resolve:
        yield "--resolve is for what --cfg shows: add --cfg job"


def _never(cfg: DictConfig) -> NoReturn:
    raise AssertionError("Hydra ran a job where only its own output was asked for")


@dataclasses.dataclass(frozen=True, slots=True)
class _Checked:
    """A command whose settings are right, and whose folder is there.

    Attributes:
        job: The task that Hydra runs.
        cfg: The composed settings of a run; those of a sweep are composed again for its trials.
        is_done: True if just this run has finished in its folder.
    """

    job: _Job
    cfg: DictConfig
    is_done: bool = False


def _check(args: argparse.Namespace, hydra: Hydra) -> _Checked:
    """Check all that will run, and give it a folder of its own."""
    overrides = typed_overrides(args, hydra)
    fixed, swept = by_sweep(overrides)
    cfg = compose(hydra, args, lines_of(fixed))
    raise_all([*hydra_problems(cfg.hydra), *unused_choices(hydra, cfg, overrides)])
    subdir = OmegaConf.select(cfg, "hydra.output_subdir")
    if not args.multirun and cfg.hydra.mode != RunMode.MULTIRUN:
        raise_all(needs_multirun(override) for override in swept)
        cfg = on_earlier(hydra, args, cfg, fixed)
        folder, config = _check_run(args, cfg)
        return _Checked(_Job(None, subdir), cfg, is_done=nothing_to_do(config, folder))
    if args.config is not None:
        raise UserError(
            f"--config {args.config} does one run again, and a sweep is asked for; leave out -m, "
            "or resume a sweep with sweep.resume="
        )
    args.multirun = True  # also where hydra.mode says it
    in_process = is_called(cfg.hydra.launcher, "BasicLauncher")
    cfg = with_resumed_folder(hydra, args, cfg, lines_of(fixed))
    explicit = is_fixed(cfg, "sweep.dir")
    if OmegaConf.select(cfg, "resume") is not None and not in_process:
        raise UserError(
            f"resume={cfg.resume} continues one run; resume a sweep with sweep.resume=last or "
            "hydra.sweep.dir=<its folder>"
        )
    grid = check_grid(hydra, args, cfg, overrides, in_process=in_process, explicit_run_dir=explicit)
    from dpo_lightning.sweeps.launch import check_launcher, check_pruning

    check_launcher(cfg.hydra.launcher, grid.configs)
    check_pruning(cfg, grid.configs)
    folder = with_folder(args, cfg, "sweep.dir")
    logger = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LoggerConfig), cfg.logger))
    assert isinstance(logger, LoggerConfig)
    facts = SweepFacts(
        *(folder, explicit, cfg.sweep.metric, logger, cfg.sweep.margin, cfg.sweep.kl_budget)
    )
    if in_process:
        args.overrides.append("hydra.output_subdir=null")  # it is written by the run itself
    return _Checked(_Job(facts, subdir, in_process=in_process, grid=grid.trials), cfg)


def _check_run(args: argparse.Namespace, cfg: DictConfig) -> tuple[Path, Config]:
    """Check the settings of one run, and give it a folder of its own."""
    config = validate(cfg, explicit_run_dir=is_fixed(cfg, "run.dir"))
    for key in dict.fromkeys(random_values(dataclasses.asdict(config), "")):
        print(
            f"{key}: it looks random, as a credential does; settings go to the run's folder and to "
            "wandb, so take it out if it is one",
            flush=True,
        )
    if config.sweep.resume is not None:
        raise UserError(f"sweep.resume={config.sweep.resume} is for a sweep: add -m")
    if config.sweep.prune != "none" and not is_alone():
        raise UserError(f"sweep.prune={config.sweep.prune} is for a sweep: add -m")
    if config.sweep.trials is not None:
        raise UserError(f"sweep.trials={shown(config.sweep.trials)} is for a sweep: add -m")
    check_trainable(backend_of(config.generation), answers=config.evaluation.samples)
    warning = check_devices(config.trainer)
    if warning is not None and is_rank_zero():
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    return with_folder(args, cfg, "run.dir"), config


def folder_of_run(overrides: Sequence[str]) -> Path:
    """The folder of one run that is about to be started by somebody else, its settings checked.

    Args:
        overrides: The settings, and flags that say where config files are.

    Raises:
        UserError: If a setting is wrong, or they are those of a sweep.
    """
    with ready_hydra():
        args = parse_words(flag_parser(), list(overrides))
        hydra = make_hydra(args)
        fixed, swept = by_sweep(typed_overrides(args, hydra))
        cfg = compose(hydra, args, lines_of(fixed))
        raise_all(hydra_problems(cfg.hydra))
        if args.multirun or swept or cfg.hydra.mode == RunMode.MULTIRUN:
            raise UserError(
                f"{' '.join(lines_of(swept)) or '-m'}: these settings are a sweep's, and one run "
                f"is started; give one value, or start `{' '.join(typed())} -m`"
            )
        folder, config = _check_run(args, on_earlier(hydra, args, cfg, fixed))
        nothing_to_do(config, folder)
        return folder


def _run(hydra: ComposedOnce, args: argparse.Namespace, checked: _Checked) -> None:
    """Runs one job in its folder, with the settings that were composed when they were checked."""
    cfg = checked.cfg
    with read_write(cfg), open_dict(cfg):
        cfg.hydra.mode = RunMode.RUN
        # The run writes it itself, once it holds its folder.
        cfg.hydra.output_subdir = None
        for handler in (cfg.hydra.job_logging.get("handlers") or {}).values():
            if "filename" in handler:
                handler.delay = True
    hydra.composed = cfg
    with _hydra_errors("run.dir"):
        configure_log(cfg.hydra.hydra_logging, cfg.hydra.verbose)
        hydra.run(config_name=args.config_name, task_function=checked.job, overrides=args.overrides)


def _show(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Has Hydra print what its flags ask for."""
    GlobalHydra.instance().clear()
    with _hydra_errors("run.dir"):
        _run_hydra(
            args=args,
            args_parser=parser,
            task_function=_never,
            config_path=str(CONF),
            config_name="config",
        )


@contextlib.contextmanager
def _hydra_errors(folder_key: str) -> Iterator[None]:
    """Turns what Hydra raises for wrong settings into errors of the user."""
    try:
        yield
    except OSError as error:
        raise UserError(cannot_write(error, folder_key)) from error
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        # Not out of a job: that lets nothing but an exit and a keyboard interrupt through.
        raise UserError(hydra_error(error)) from error
    except (TypeError, AttributeError, LookupError, RuntimeError) as error:
        if _is_ours(error):
            raise
        # Of Hydra's own settings only some have types.
        raise UserError(f"hydra: {type(error).__name__}: {hydra_error(error)}") from error


def _is_ours(error: Exception) -> bool:
    """True if an error passed through this project's code before the command line's."""
    package, own = Path(__file__).parent, (__file__, composing.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    return any(
        package in Path(frame.filename).parents and frame.filename not in own for frame in frames
    )


def _run_one(cfg: DictConfig, subdir: str | None, *, is_trial: bool) -> int:
    """Run one experiment in the folder that Hydra made; returns its exit code, never raises."""
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    prefix = f"{' '.join(overrides)}: " if is_trial else ""
    try:
        # By now the folder has a fixed name, whoever gave it: resume=auto was judged before.
        config = validate(cfg, multirun=is_trial, explicit_run_dir=True)
        path = Path(hydra.runtime.output_dir)
        refuse_links(path)
        # Trials that share this process were not looked at one by one.
        if is_rank_zero() and nothing_to_do(config, path, is_trial=is_trial):
            return 0
        with hold_run(config, path, is_writer=is_rank_zero()) as folder, _waiting_logs(folder):
            if subdir is not None:
                for name, text in hydra_files(cfg, hydra, subdir).items():
                    folder.put(f"{subdir}/{name}", text.encode)
            return _start(config, folder=folder, overrides=overrides)
    except DpoLightningError as error:
        if OmegaConf.select(cfg, "debug.traceback"):
            show_traceback()
        return report(error, prefix)
    except OSError as error:
        fault = disk_fault(error)
        if fault is None:
            show_traceback()
            return 1
        return report(UserError(fault), prefix)
    except SystemExit as stop:
        return exit_code(stop)
    except Exception:
        show_traceback()
        return 1


@contextlib.contextmanager
def _waiting_logs(folder: RunFolder) -> Iterator[None]:
    """Log files whose lines wait until the run may write them."""
    logs = WaitingLogs()
    folder.when_begun(logs.write, each_rank=True)
    try:
        yield
    finally:
        logs.close()


def _start(config: Config, *, folder: RunFolder, overrides: list[str]) -> int:
    # Here, because it imports torch: by now every setting is checked.
    from dpo_lightning.run.supervise import run

    resolved = dataclasses.asdict(config)
    return run(config, folder=folder, resolved=resolved, overrides=overrides)
