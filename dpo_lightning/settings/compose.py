"""Composition of the command line by Hydra, and its check, before Hydra makes anything.

Hydra has no public way to parse its flags and compose with all of them; the few internals used here
are those that ``hydra.main`` itself calls, and the version of Hydra is pinned to its minor release.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
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
from dpo_lightning.settings.keys import is_import_name
from dpo_lightning.settings.overrides import (
    flag_parser,
    hydra_error,
    named_plugins,
    override_problems,
    parse_overrides,
    raise_all,
    typed_text,
    with_own_names,
)
from dpo_lightning.settings.page import first_help
from dpo_lightning.settings.recorded import (
    SETTINGS_FILE,
    is_alone,
    on_recorded,
    read_recorded,
    settings_file,
)
from dpo_lightning.settings.schema import CONF, IN_CLONE, Config
from dpo_lightning.settings.store import register, schema
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
    cfg = on_earlier(hydra, args, compose(hydra, args, lines_of(fixed)), fixed)
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
    args.overrides = with_own_names(args.overrides)
    return args


def _load_named_plugins(args: argparse.Namespace) -> None:
    """Loads the plugins that are named, whose names may be choices or options in the config."""
    folders = [CONF if args.config_path is None else Path(args.config_path)]
    folders += [] if args.config_dir is None else [Path(args.config_dir)]
    names = named_plugins(args.overrides, folders)
    path = _recorded_file(
        args, typed_text(args.overrides, "resume"), typed_text(args.overrides, "hydra.run.dir")
    )
    if path is not None and not typed_text(args.overrides, "plugins"):
        names += [name for name in read_recorded(path).plugins if is_import_name(name)]
    if names:
        load_plugins(names)
        register()


def _recorded_file(
    args: argparse.Namespace, resume: str | None, run_dir: str | None
) -> Path | None:
    """The settings that a run is based on; None if there are none but what is typed."""
    if args.config is not None:
        if resume is not None:
            raise UserError(
                f"--config {args.config} and resume={resume} both bring settings: give one of them"
            )
        path = Path(args.config).expanduser()
        if path.is_dir():
            path /= SETTINGS_FILE
        if not path.is_file():
            raise UserError(f"--config {args.config}: no such file, seen from {Path.cwd()}")
        return path
    if resume is None or is_alone():
        return None
    return settings_file(resume, run_dir)


def on_earlier(
    hydra: Hydra, args: argparse.Namespace, cfg: DictConfig, overrides: list[Override]
) -> DictConfig:
    """The config of one run, on the settings of the run that it goes on from or repeats.

    Args:
        hydra: With the search path of the command line.
        args: What was typed.
        cfg: The config as it was composed.
        overrides: The settings among what was typed.

    Raises:
        UserError: If there are no such settings.
    """
    try:
        resume = OmegaConf.select(cfg, "resume")
        run_dir = str(OmegaConf.select(cfg, "hydra.run.dir")) if resume == "auto" else None
    except OmegaConfBaseException as error:
        raise UserError(hydra_error(error)) from error
    path = _recorded_file(args, None if resume is None else str(resume), run_dir)
    if path is None:
        return cfg
    is_ours = args.config_path is None and args.config_name == "config"
    default = compose(hydra, args, []) if is_ours else schema()
    on_recorded(cfg, read_recorded(path), overrides, default)
    print(f"settings from {path} and from the command line", flush=True)
    return cfg


def unused_choices(hydra: Hydra, cfg: DictConfig, overrides: list[Override]) -> Iterator[str]:
    """Yields the choices of Hydra's own groups in an experiment's file, where the root's stand.

    Args:
        hydra: With the search path of the command line.
        cfg: The composed config.
        overrides: What was typed, which may choose otherwise.
    """
    choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
    assert isinstance(choices, dict)
    name = choices.get("experiment")
    loader = hydra.config_loader
    assert isinstance(loader, ConfigLoaderImpl)
    file = None if name is None else loader.repository.load_config(f"experiment/{name}")
    typed = {override.key_or_group for override in overrides}
    for item in [] if file is None else file.defaults_list or []:
        if not (isinstance(item, GroupDefault) and item.override):
            continue
        group = str(item.group).lstrip("/")
        if group.startswith("hydra/") and group not in typed and item.value != choices.get(group):
            options = loader.get_group_options(group)
            if item.value in options:
                remedy = f"is not used in a file; type {group}={item.value}"
            else:
                remedy = f"is no choice, there are {', '.join(options)}"
            yield f"experiment={name}: its `override /{group}: {item.value}` {remedy}"


def make_hydra(args: argparse.Namespace) -> ComposedOnce:
    """Hydra with the search path of the command line."""
    search_path = create_config_search_path(args.config_path or str(CONF))
    if args.config_dir is not None:
        folder = Path(args.config_dir).absolute()
        if not folder.is_dir():
            raise UserError(
                f"--config-dir {args.config_dir}: no such folder, seen from {Path.cwd()}"
            )
        name = f"{args.config_name}.yaml"
        if (folder / name).is_file() and (Path(args.config_path or CONF) / name).is_file():
            raise UserError(
                f"--config-dir {args.config_dir}: its {name} would not be read, as the root of the "
                f"settings has that name; --config {args.config_dir}/{name} does again what a run "
                "recorded, and a root of your own needs another name (--config-name)"
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
    raise_all(override_problems(overrides, options_by_group(hydra, args)))
    return overrides


def options_by_group(hydra: Hydra, args: argparse.Namespace) -> Callable[[str], list[str]]:
    """A function that lists the choices of a config group, those in folders below it too.

    Args:
        hydra: With the search path of the command line.
        args: What was typed.
    """
    loader = hydra.config_loader

    def options_of(group: str) -> list[str]:
        own = loader.get_group_options(group, config_name=args.config_name)
        if group != "hydra":  # whose folders are groups themselves
            for folder in loader.get_group_options(group, ObjectType.GROUP):
                below = loader.get_group_options(f"{group}/{folder}")
                own = [*own, *(f"{folder}/{name}" for name in below)]
        return sorted(own)

    return options_of


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


def check_shown(args: argparse.Namespace) -> tuple[Hydra, DictConfig]:
    """Check that what Hydra is asked to show can be composed; values are not judged.

    Returns:
        Hydra with the search path of the command line, and the config.
    """
    if args.config is not None:
        raise UserError(f"--config {args.config} is for a run; to see its settings, read the file")
    hydra = make_hydra(args)
    fixed, swept = by_sweep(typed_overrides(args, hydra))
    raise_all(f"{line} gives several values, but --cfg shows one run" for line in lines_of(swept))
    cfg = compose(hydra, args, lines_of(fixed))
    raise_all(hydra_problems(cfg.hydra))
    return hydra, cfg


def help_of(args: argparse.Namespace) -> str:
    """Text of ``--help`` for a command line."""
    hydra, cfg = check_shown(args)
    choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
    assert isinstance(choices, dict)
    groups = sorted(str(group) for group in choices if not str(group).startswith("hydra/"))
    return first_help(cfg.hydra.help.header, groups, options_by_group(hydra, args))


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
