"""The command line: Hydra composes, every setting is checked, and only then something starts.

Hydra makes a run's folder before it calls anything of ours, and reports its own errors as several
lines with exit code 1. So the settings are composed and checked before Hydra makes anything, and
Hydra runs what was composed: a wrong setting is one line, exit code 2, and leaves no folder. Of a
sweep in this process every trial is checked before the first one starts.

Hydra has no public way to parse its flags and compose with all of them; the few internals used here
are those that ``hydra.main`` itself calls, and the version of Hydra is pinned to its minor release.
"""

import argparse
import contextlib
import copy
import dataclasses
import itertools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.core.utils import configure_log
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import DpoLightningError, UserError
from dpo_lightning.plugins import load_plugins
from dpo_lightning.processes.lifeline import watch_lifeline
from dpo_lightning.settings.credentials import redact, refusal, typed_secrets
from dpo_lightning.settings.folders import (
    cannot_write,
    hydra_override,
    is_fixed,
    prepare_folder,
    refuse_links,
    resumed_sweep,
)
from dpo_lightning.settings.hydra_node import hydra_problems
from dpo_lightning.settings.overrides import (
    flag_parser,
    hydra_error,
    named_plugins,
    needs_multirun,
    override_problems,
    parse_overrides,
    raise_all,
)
from dpo_lightning.settings.schema import CONF, Config, LoggerConfig, register
from dpo_lightning.settings.validation import validate
from dpo_lightning.sweeps.trials import SweepFacts, Trial
from dpo_lightning.tracking.terminal import outlive_terminal

# Exit codes of a run that a signal ended.
_STOPPED = (130, 143)
# PEFT imports these where they are installed; they tell of kernels that nobody asked for.
_TALKATIVE = ("torchao", "bitsandbytes", "torch.utils._pytree")


class _ComposedOnce(Hydra):
    """Hydra that runs a config which was composed, and checked, before.

    Composing takes longer than all else that happens ahead of a job.
    """

    composed: DictConfig | None = None

    def compose_config(self, *args: Any, **kwargs: Any) -> DictConfig:
        """The config that is to be run; any other one is composed."""
        return super().compose_config(*args, **kwargs) if self.composed is None else self.composed


class _Job:
    """What Hydra runs: a run, or each trial of a sweep in this process.

    Args:
        sweep: What is known of the sweep; None for one run.
        in_process: Whether the trials of a sweep share this process.

    Attributes:
        codes: Exit codes of what ran in this process.
        trials: The trials that the launcher ran elsewhere; it adds them.
    """

    def __init__(self, sweep: SweepFacts | None, *, in_process: bool = True) -> None:
        self.sweep = sweep
        self.in_process = in_process
        self.codes: list[int] = []
        self.trials: list[Trial] = []

    def __call__(self, cfg: DictConfig) -> int:
        """Run one experiment in this process."""
        self.codes.append(_run_one(cfg, is_trial=self.sweep is not None))
        if self.sweep is not None and self.codes[-1] in _STOPPED:
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


def guarded(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Runs a command that composes settings; what goes wrong becomes a line and an exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    watch_lifeline()
    outlive_terminal()
    version.setbase("1.3")
    register()
    try:
        return command(argv)
    except DpoLightningError as error:
        return _report(error)
    except KeyboardInterrupt:
        return _STOPPED[0]
    except SystemExit as stop:
        return _exit_code(stop)
    except Exception:
        _show_traceback()
        return 1
    finally:
        GlobalHydra.instance().clear()


def compose_one(argv: list[str]) -> Config:
    """The checked settings of one run, which is not started.

    Args:
        argv: Arguments as for a run.

    Raises:
        UserError: If they are wrong, or those of a sweep.
    """
    args = _parsed(flag_parser(), argv)
    hydra = _hydra(args)
    fixed, swept = _by_sweep(_overrides(args, hydra))
    raise_all(f"{line} gives several values, and one run is looked at" for line in _lines(swept))
    cfg = _compose(hydra, args, _lines(fixed))
    return validate(cfg, explicit_run_dir=is_fixed(cfg, "run.dir"))


def _parsed(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    # Ahead of all that may repeat what was typed.
    raise_all(map(refusal, typed_secrets(argv)))
    # Not parse_args: that refuses `beta=0.1 -m seed=1,2`, a flag among the settings.
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun would execute a pickle; give the settings again")
    if args.config_path is not None:
        args.config_path = str((CONF.parent / args.config_path).absolute())
    args.config_name = args.config_name or "config"
    _load_named_plugins(args)
    return args


def _main(argv: list[str]) -> int:
    parser = flag_parser()
    args = _parsed(parser, argv)
    if args.shell_completion:
        _show(args, parser)
        return 0
    if args.help or args.hydra_help or args.cfg is not None or args.info is not None:
        _check_shown(args)
        _show(args, parser)
        return 0
    raise_all(_flag_problems(args))
    hydra = _hydra(args)
    checked = _check(args, hydra)
    job = checked.job
    if job.sweep is None:
        _run(hydra, args, checked)
        return job.codes[0]
    from dpo_lightning.sweeps.finish import finish_sweep, show_stopped

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


def _load_named_plugins(args: argparse.Namespace) -> None:
    """What plugins register may be a choice, or an option, of what is then composed."""
    folders = [CONF if args.config_path is None else Path(args.config_path)]
    folders += [] if args.config_dir is None else [Path(args.config_dir)]
    names = named_plugins(args.overrides, folders)
    if names:
        load_plugins(names)
        register()


def _never(cfg: DictConfig) -> NoReturn:
    raise AssertionError("Hydra ran a job where only its own output was asked for")


def _report(error: DpoLightningError, prefix: str = "") -> int:
    print(redact(f"error: {prefix}{' '.join(str(error).split())}"), file=sys.stderr, flush=True)
    return error.exit_code


def _show_traceback() -> None:
    print(redact(traceback.format_exc()), end="", file=sys.stderr, flush=True)


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    return stop.code if isinstance(stop.code, int) else 1


def _hydra(args: argparse.Namespace) -> _ComposedOnce:
    """Hydra with the search path of the command line."""
    search_path = create_config_search_path(args.config_path or str(CONF))
    if args.config_dir is not None:
        folder = Path(args.config_dir).absolute()
        if not folder.is_dir():
            raise UserError(
                f"--config-dir {args.config_dir}: no such folder, seen from {Path.cwd()}"
            )
        search_path.prepend(
            provider="command-line", path=f"file://{folder}", anchor=SearchPathQuery("schema", None)
        )
    GlobalHydra.instance().clear()
    hydra = _ComposedOnce.create_main_hydra2(task_name="train", config_search_path=search_path)
    assert isinstance(hydra, _ComposedOnce)
    return hydra


def _overrides(args: argparse.Namespace, hydra: Hydra) -> list[Override]:
    """The settings that were typed, their keys and choices known."""
    overrides = parse_overrides(args.overrides, hydra.config_loader)

    def options_of(group: str) -> list[str]:
        return sorted(hydra.config_loader.get_group_options(group, config_name=args.config_name))

    raise_all(override_problems(overrides, options_of))
    return overrides


def _by_sweep(overrides: list[Override]) -> tuple[list[Override], list[Override]]:
    """Those with one value and those with several."""
    swept = [override for override in overrides if override.is_sweep_override()]
    return [override for override in overrides if not override.is_sweep_override()], swept


def _lines(overrides: list[Override]) -> list[str]:
    return [str(override.input_line) for override in overrides]


def _compose(hydra: Hydra, args: argparse.Namespace, lines: list[str]) -> DictConfig:
    try:
        return hydra.compose_config(
            config_name=args.config_name,
            overrides=lines,
            run_mode=RunMode.RUN,
            with_log_configuration=False,
        )
    except Exception as error:  # of many kinds, a YAML parser's among them; all are the config's
        raise UserError(hydra_error(error)) from error


class _GridComposer:
    """Composes the trials of a grid; files are merged once for every choice of files.

    Merging them is nearly all of the work, and most trials differ in values alone, which Hydra too
    sets in what was merged.

    Args:
        hydra: With the search path of the command line.
        args: What was typed.
    """

    def __init__(self, hydra: Hydra, args: argparse.Namespace) -> None:
        self._hydra = hydra
        self._args = args
        self._merged: dict[tuple[str, ...], DictConfig] = {}

    def __call__(self, lines: list[str]) -> DictConfig:
        """The config of the trial with these overrides; Hydra's node is that of its files.

        Raises:
            UserError: If they are wrong.
        """
        overrides = parse_overrides(lines, self._hydra.config_loader)
        chooses = [self._chooses_files(override) for override in overrides]
        files = tuple(itertools.compress(_lines(overrides), chooses))
        if files not in self._merged:
            self._merged[files] = _compose(self._hydra, self._args, [*files])
        cfg = copy.deepcopy(self._merged[files])
        try:
            ConfigLoaderImpl._apply_overrides_to_config(
                [o for o, is_choice in zip(overrides, chooses, strict=True) if not is_choice], cfg
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(hydra_error(error)) from error
        return cfg

    def _chooses_files(self, override: Override) -> bool:
        loader = self._hydra.config_loader
        assert isinstance(loader, ConfigLoaderImpl)
        is_group = loader.repository.group_exists(override.key_or_group)
        is_choice = is_group and not isinstance(override.value(), dict)
        return is_choice or override.is_hydra_override()


def _check_shown(args: argparse.Namespace) -> None:
    """Check that what Hydra is asked to show can be composed; values are not judged."""
    hydra = _hydra(args)
    fixed, swept = _by_sweep(_overrides(args, hydra))
    raise_all(f"{line} gives several values, and one config is shown" for line in _lines(swept))
    raise_all(hydra_problems(_compose(hydra, args, _lines(fixed)).hydra))


@dataclasses.dataclass(frozen=True, slots=True)
class _Checked:
    """A command whose settings are right, and whose folder is there.

    Attributes:
        job: The task that Hydra runs.
        cfg: The composed settings of a run; those of a sweep are composed again for its trials.
    """

    job: _Job
    cfg: DictConfig


def _check(args: argparse.Namespace, hydra: Hydra) -> _Checked:
    """Check all that will run, and give it a folder of its own."""
    overrides = _overrides(args, hydra)
    fixed, swept = _by_sweep(overrides)
    cfg = _compose(hydra, args, _lines(fixed))
    raise_all(hydra_problems(cfg.hydra))
    if not args.multirun and cfg.hydra.mode != RunMode.MULTIRUN:
        raise_all(needs_multirun(override) for override in swept)
        config = validate(cfg, explicit_run_dir=is_fixed(cfg, "run.dir"))
        if config.sweep.resume is not None:
            raise UserError(f"sweep.resume={config.sweep.resume} is for a sweep: add -m")
        _with_folder(args, cfg, "run.dir")
        return _Checked(_Job(None), cfg)
    args.multirun = True  # also where hydra.mode says it
    in_process = _is(cfg.hydra.launcher, "BasicLauncher")
    cfg = _with_resumed_folder(hydra, args, cfg, _lines(fixed))
    explicit = is_fixed(cfg, "sweep.dir")
    if OmegaConf.select(cfg, "resume") is not None and not in_process:
        raise UserError(
            f"resume={cfg.resume} continues one run; a sweep goes on with sweep.resume=last or "
            "hydra.sweep.dir=<its folder>"
        )
    configs: list[Config] = []  # those of other sweepers are not known yet
    if _is(cfg.hydra.sweeper, "BasicSweeper"):
        # The grid may also stand in a file, as hydra.sweeper.params.
        params = (cfg.hydra.sweeper.params or {}).items()
        lines = [f"{key}={value}" for key, value in params]
        overrides = [*parse_overrides(lines, hydra.config_loader), *overrides]
        fixed, swept = _by_sweep(overrides)
        configs = _check_trials(
            hydra, args, overrides, in_process=in_process, explicit_run_dir=explicit
        )
    from dpo_lightning.sweeps.launch import check_launcher

    check_launcher(cfg.hydra.launcher, configs)
    if swept:
        # A trial's folder is named by what differs between the trials.
        by_key = {line.key_or_group for line in swept}
        keys = ",".join(f"'{key}'" for key in sorted({o.key_or_group for o in fixed} - by_key))
        args.overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{keys}]")
    folder = _with_folder(args, cfg, "sweep.dir")
    logger = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LoggerConfig), cfg.logger))
    assert isinstance(logger, LoggerConfig)
    facts = SweepFacts(folder, named=explicit, metric=cfg.sweep.metric, logger=logger)
    return _Checked(_Job(facts, in_process=in_process), cfg)


def _with_resumed_folder(
    hydra: Hydra, args: argparse.Namespace, cfg: DictConfig, lines: list[str]
) -> DictConfig:
    """The config with the folder that ``sweep.resume`` names as its ``hydra.sweep.dir``."""
    wanted = OmegaConf.select(cfg, "sweep.resume")
    if wanted is None:
        return cfg
    args.overrides.append(hydra_override("sweep.dir", resumed_sweep(wanted, cfg)))
    return _compose(hydra, args, [*lines, args.overrides[-1]])


def _with_folder(args: argparse.Namespace, cfg: DictConfig, key: str) -> Path:
    folder, overrides = prepare_folder(cfg, key)
    if overrides:
        args.overrides += overrides
        with read_write(cfg.hydra):
            OmegaConf.update(cfg.hydra, key, str(folder))
            cfg.hydra.overrides.hydra += overrides
    return folder


def _is(node: DictConfig, name: str) -> bool:
    return str(node.get("_target_", "")).endswith(f".{name}")


def _check_trials(
    hydra: Hydra,
    args: argparse.Namespace,
    grid: list[Override],
    *,
    in_process: bool,
    explicit_run_dir: bool,
) -> list[Config]:
    """The settings of every trial of a grid; what is wrong with any of them is raised at once."""
    of_hydra = [override for override in grid if override.is_hydra_override()]
    of_task = [override for override in grid if not override.is_hydra_override()]
    compose = _GridComposer(hydra, args)
    configs, problems = [], []
    for trial in _trials(of_task):
        try:
            cfg = compose([*_lines(of_hydra), *trial])
            raise_all(hydra_problems(cfg.hydra))
            configs.append(validate(cfg, multirun=in_process, explicit_run_dir=explicit_run_dir))
        except UserError as error:
            problems.append(str(error))
    raise_all(problems)
    return configs


def _trials(grid: list[Override]) -> list[list[str]]:
    """The settings of each trial of a grid.

    Raises:
        UserError: If the sweeper knows no such grid, or it is empty.
    """
    try:
        batches = BasicSweeper.split_arguments(grid, max_batch_size=None)
    except HydraException as error:
        raise UserError(f"{hydra_error(error)}; hydra/sweeper= names another sweeper") from error
    if not batches or not batches[0]:
        raise UserError(f"{' '.join(_lines(grid))}: no choice is left to run")
    return [list(trial) for trial in batches[0]]


def _run(hydra: _ComposedOnce, args: argparse.Namespace, checked: _Checked) -> None:
    """Runs one job in its folder, with the settings that were composed when they were checked."""
    cfg = checked.cfg
    with read_write(cfg), open_dict(cfg):
        cfg.hydra.mode = RunMode.RUN
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
    """Whether an error passed through this project's code on its way to this file."""
    package = Path(__file__).parent
    frames = traceback.extract_tb(error.__traceback__)
    return any(
        package in Path(frame.filename).parents and frame.filename != __file__ for frame in frames
    )


def _run_one(cfg: DictConfig, *, is_trial: bool) -> int:
    """Run one experiment in the folder that Hydra made; returns its exit code, never raises."""
    hydra = HydraConfig.get()
    overrides = list(hydra.overrides.task)
    prefix = f"{' '.join(overrides)}: " if is_trial else ""
    try:
        # By now the folder has a fixed name, whoever gave it: resume=auto was judged before.
        config = validate(cfg, multirun=is_trial, explicit_run_dir=True)
        folder = Path(hydra.runtime.output_dir)
        refuse_links(folder)
        return _start(config, run_dir=folder, overrides=overrides)
    except DpoLightningError as error:
        if OmegaConf.select(cfg, "debug.traceback"):
            _show_traceback()
        return _report(error, prefix)
    except SystemExit as stop:
        return _exit_code(stop)
    except Exception:
        _show_traceback()
        return 1


def _start(config: Config, *, run_dir: Path, overrides: list[str]) -> int:
    # Here, because it imports torch: by now every setting is checked.
    from dpo_lightning.run.supervise import run

    resolved = dataclasses.asdict(config)
    return run(config, run_dir=run_dir, resolved=resolved, overrides=overrides)
