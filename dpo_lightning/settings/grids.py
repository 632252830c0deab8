"""The grid of a sweep: its trials, of what is typed and of blocks, each composed and checked."""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import UserError
from dpo_lightning.settings.blocks import KEY, GridBlock, blocks_of, check_blocks
from dpo_lightning.settings.compose import (
    by_sweep,
    compose,
    is_called,
    lines_of,
    options_by_group,
)
from dpo_lightning.settings.hydra_node import hydra_problems
from dpo_lightning.settings.overrides import hydra_error, parse_overrides, raise_all
from dpo_lightning.settings.schema import Config
from dpo_lightning.settings.validation import validate


@dataclass(frozen=True, slots=True)
class SweepGrid:
    """The trials of a sweep; empty where its sweeper chooses them by itself.

    Attributes:
        trials: The settings of each.
        configs: The same, composed and checked.
    """

    trials: tuple[list[str], ...] = ()
    configs: tuple[Config, ...] = ()


@dataclass(frozen=True, slots=True)
class _Trial:
    """Settings of a trial, and the block that it is of, if it is of one."""

    lines: list[str]
    block: GridBlock | None = None


def check_grid(
    hydra: Hydra,
    args: argparse.Namespace,
    cfg: DictConfig,
    overrides: list[Override],
    *,
    in_process: bool,
    explicit_run_dir: bool,
) -> SweepGrid:
    """Composes and checks every trial of a sweep, before anything is made.

    Args:
        hydra: With the search path of the command line.
        args: What was typed; it gets what names the trials' folders, and the sweeper of blocks.
        cfg: The config without what is swept.
        overrides: What was typed.
        in_process: True if the trials share this process.
        explicit_run_dir: True if the sweep's folder was named.

    Raises:
        UserError: All that is wrong with any of the trials.
    """
    is_grid = is_called(cfg.hydra.sweeper, "BasicSweeper")
    if is_grid:
        # The grid may also stand in a file, as hydra.sweeper.params.
        params = (cfg.hydra.sweeper.params or {}).items()
        lines = [f"{key}={value}" for key, value in params]
        overrides = [*parse_overrides(lines, hydra.config_loader), *overrides]
    fixed, swept = by_sweep(overrides)
    raise_all(
        f"{line} gives several values, and a sweep has one"
        for line in lines_of(swept)
        if line.startswith("sweep.")
    )
    blocks = _blocks(hydra, args, cfg, overrides, is_grid=is_grid)
    if swept or blocks:
        # A trial's folder is named by what differs between the trials.
        by_key = {line.key_or_group for line in swept}
        keys = ",".join(f"'{key}'" for key in sorted({o.key_or_group for o in fixed} - by_key))
        args.overrides.append(f"hydra.job.config.override_dirname.exclude_keys=[{keys}]")
    if not is_grid:
        return SweepGrid()  # the trials of other sweepers are not known yet
    of_hydra = lines_of([override for override in overrides if override.is_hydra_override()])
    trials = _grid_trials([o for o in overrides if not o.is_hydra_override()], blocks)
    composer = _GridComposer(hydra, args)
    configs, problems = [], []
    for trial in trials:
        try:
            composed = composer([*of_hydra, *trial.lines])
            configs.append(_validated(composed, trial, in_process, explicit_run_dir))
        except UserError as error:
            place = "" if trial.block is None else f"{trial.block.place_of(str(error))}: "
            problems.append(f"{place}{error}")
    raise_all(problems)
    return SweepGrid(tuple(trial.lines for trial in trials), tuple(configs))


def _validated(cfg: DictConfig, trial: _Trial, in_process: bool, explicit: bool) -> Config:
    raise_all(hydra_problems(cfg.hydra))
    config = validate(cfg, multirun=in_process, explicit_run_dir=explicit)
    if trial.block is None and config.sweep.trials is not None:
        raise UserError(f"{KEY}: that of an experiment which is swept is not read; choose one")
    return config


def _blocks(
    hydra: Hydra,
    args: argparse.Namespace,
    cfg: DictConfig,
    overrides: list[Override],
    *,
    is_grid: bool,
) -> list[GridBlock]:
    """The blocks of ``sweep.trials``, their keys checked; none where it is null."""
    blocks = blocks_of(cfg)
    if not blocks:
        return []
    if not is_grid:
        name = cfg.hydra.runtime.choices.get("hydra/sweeper")
        raise UserError(
            f"{KEY}: hydra/sweeper={name} chooses trials by itself; leave one of the two out"
        )
    check_blocks(blocks, overrides, options_by_group(hydra, args))
    args.overrides.append("hydra/sweeper=blocks")
    return blocks


def _grid_trials(grid: list[Override], blocks: Sequence[GridBlock]) -> list[_Trial]:
    """The trials: what was typed, crossed, and that with each cell of each block.

    Raises:
        UserError: If the sweeper knows no such grid, or it is empty.
    """
    try:
        batches = BasicSweeper.split_arguments(grid, max_batch_size=None)
    except HydraException as error:
        raise UserError(f"{hydra_error(error)}; hydra/sweeper= names another sweeper") from error
    if not batches or not batches[0]:
        raise UserError(f"{' '.join(lines_of(grid))}: nothing is left to run")
    typed = [list(trial) for trial in batches[0]]
    if not blocks:
        return [_Trial(lines) for lines in typed]
    return [
        _Trial([*lines, *cell], block)
        for block in blocks
        for cell in block.cells()
        for lines in typed
    ]


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
