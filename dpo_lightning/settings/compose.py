"""Composition of the command line by Hydra, and its check, before Hydra makes anything.

Hydra has no public way to parse its flags and compose with all of them; the few internals used here
are those that ``hydra.main`` itself calls, and the version of Hydra is pinned to its minor release.
"""

import argparse
import contextlib
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import UserError
from dpo_lightning.plugins import load_plugins
from dpo_lightning.settings.credentials import refusal, typed_secrets
from dpo_lightning.settings.folders import (
    hydra_override,
    is_fixed,
    prepare_folder,
    resumed_sweep,
)
from dpo_lightning.settings.hydra_node import hydra_problems
from dpo_lightning.settings.overrides import (
    flag_parser,
    hydra_error,
    named_plugins,
    override_problems,
    parse_overrides,
    raise_all,
)
from dpo_lightning.settings.schema import CONF, IN_CLONE, Config
from dpo_lightning.settings.store import register
from dpo_lightning.settings.validation import validate


class ComposedOnce(Hydra):
    """Hydra that runs a config which was composed, and checked, before.

    Composing takes longer than all else that happens ahead of a job.
    """

    composed: DictConfig | None = None

    def compose_config(self, *args: Any, **kwargs: Any) -> DictConfig:
        """The config that is to be run; any other one is composed."""
        return super().compose_config(*args, **kwargs) if self.composed is None else self.composed


@contextlib.contextmanager
def ready_hydra() -> Iterator[None]:
    """Hydra as a command needs it, with the schema and the resolvers; nothing of it is left."""
    version.setbase("1.3")
    register()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()


def compose_one(argv: list[str]) -> Config:
    """The checked settings of one run, which is not started.

    Args:
        argv: Arguments as for a run.

    Raises:
        UserError: If they are wrong, or those of a sweep.
    """
    args = parse_words(flag_parser(), argv)
    hydra = make_hydra(args)
    fixed, swept = by_sweep(typed_overrides(args, hydra))
    raise_all(f"{line} gives several values, but this looks at one run" for line in lines_of(swept))
    cfg = compose(hydra, args, lines_of(fixed))
    return validate(cfg, explicit_run_dir=is_fixed(cfg, "run.dir"))


def parse_words(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """The words of a command line, flags and settings; the plugins among them are loaded.

    Raises:
        UserError: If they hold a credential, or ask for what is not done.
    """
    # Ahead of all that may repeat what was typed.
    raise_all(map(refusal, typed_secrets(argv)))
    # Not parse_args: that refuses `beta=0.1 -m seed=1,2`, a flag among the settings.
    args = parser.parse_intermixed_args(argv)
    if args.experimental_rerun is not None:
        raise UserError("--experimental-rerun would execute a pickle; give the settings again")
    if args.config_path is not None:
        # As Hydra has it, seen from the program; the installed one stands where the user does.
        seen_from = CONF.parent if IN_CLONE else Path.cwd()
        args.config_path = str((seen_from / args.config_path).absolute())
    args.config_name = args.config_name or "config"
    _load_named_plugins(args)
    return args


def _load_named_plugins(args: argparse.Namespace) -> None:
    """Loads the plugins that are named, whose names may be choices or options in the config."""
    folders = [CONF if args.config_path is None else Path(args.config_path)]
    folders += [] if args.config_dir is None else [Path(args.config_dir)]
    names = named_plugins(args.overrides, folders)
    if names:
        load_plugins(names)
        register()


def make_hydra(args: argparse.Namespace) -> ComposedOnce:
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
    hydra = ComposedOnce.create_main_hydra2(task_name="train", config_search_path=search_path)
    assert isinstance(hydra, ComposedOnce)
    return hydra


def typed_overrides(args: argparse.Namespace, hydra: Hydra) -> list[Override]:
    """The settings that were typed, their keys and choices known."""
    overrides = parse_overrides(args.overrides, hydra.config_loader)

    def options_of(group: str) -> list[str]:
        return sorted(hydra.config_loader.get_group_options(group, config_name=args.config_name))

    raise_all(override_problems(overrides, options_of))
    return overrides


def by_sweep(overrides: list[Override]) -> tuple[list[Override], list[Override]]:
    """Those with one value and those with several."""
    swept = [override for override in overrides if override.is_sweep_override()]
    return [override for override in overrides if not override.is_sweep_override()], swept


def lines_of(overrides: list[Override]) -> list[str]:
    """The settings as they were typed."""
    return [str(override.input_line) for override in overrides]


def compose(hydra: Hydra, args: argparse.Namespace, lines: list[str]) -> DictConfig:
    """The config with these settings.

    Raises:
        UserError: If there is none.
    """
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
        files = tuple(itertools.compress(lines_of(overrides), chooses))
        if files not in self._merged:
            self._merged[files] = compose(self._hydra, self._args, [*files])
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


def check_shown(args: argparse.Namespace) -> None:
    """Check that what Hydra is asked to show can be composed; values are not judged."""
    hydra = make_hydra(args)
    fixed, swept = by_sweep(typed_overrides(args, hydra))
    raise_all(f"{line} gives several values, but --cfg shows one run" for line in lines_of(swept))
    raise_all(hydra_problems(compose(hydra, args, lines_of(fixed)).hydra))


def with_resumed_folder(
    hydra: Hydra, args: argparse.Namespace, cfg: DictConfig, lines: list[str]
) -> DictConfig:
    """The config with the folder that ``sweep.resume`` names as its ``hydra.sweep.dir``."""
    wanted = OmegaConf.select(cfg, "sweep.resume")
    if wanted is None:
        return cfg
    args.overrides.append(hydra_override("sweep.dir", resumed_sweep(wanted, cfg)))
    return compose(hydra, args, [*lines, args.overrides[-1]])


def with_folder(args: argparse.Namespace, cfg: DictConfig, key: str) -> Path:
    """Prepares the folder ``hydra.<key>``, and lets the config name it."""
    folder, overrides = prepare_folder(cfg, key)
    if overrides:
        args.overrides += overrides
        with read_write(cfg.hydra):
            OmegaConf.update(cfg.hydra, key, str(folder))
            cfg.hydra.overrides.hydra += overrides
    return folder


def is_called(node: DictConfig, name: str) -> bool:
    """True if the node is of the class of that name."""
    return str(node.get("_target_", "")).endswith(f".{name}")


def check_trials(
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
            cfg = compose([*lines_of(of_hydra), *trial])
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
        raise UserError(f"{' '.join(lines_of(grid))}: nothing is left to run")
    return [list(trial) for trial in batches[0]]
