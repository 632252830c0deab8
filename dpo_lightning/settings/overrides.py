"""Checks of the command line before anything is composed, and Hydra's own errors.

Everything here turns a mistake into one line that names the argument and what would do. Values of
keys that look like credentials are never repeated.
"""

import argparse
import logging
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import UserError
from dpo_lightning.objectives.objective import known_losses
from dpo_lightning.settings.credentials import is_secret
from dpo_lightning.settings.foreign_keys import KEYS
from dpo_lightning.settings.foreign_values import renamed_loss
from dpo_lightning.settings.keys import is_import_name, is_known, settings
from dpo_lightning.settings.messages import config_error, shown, unknown_key, unknown_option
from dpo_lightning.settings.program import typed
from dpo_lightning.settings.renamed import RENAMED_KEYS, RENAMED_METRICS, say_renamed

log = logging.getLogger(__name__)

# What is longer is not repeated whole.
_LONGEST_LINE = 500


def raise_all(problems: Iterable[str]) -> None:
    """Raise the distinct problems as one error; do nothing where there are none.

    Raises:
        UserError: The problems in one line.
    """
    if found := list(dict.fromkeys(problems)):
        raise UserError("; ".join(found))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Raise in one line what argparse would print as several."""
        unknown = re.match(r"unrecognized arguments: --?([^\s=]+)(=?)(\S*)", message)
        if unknown is None:
            raise UserError(f"{message}; `{' '.join(typed())} --help` says more")
        key, equals, value = unknown.groups()
        key = key.replace("-", "_")
        if is_secret(key):
            raise UserError(f"--{unknown_key(key)}")
        if is_known(key) and equals:
            raise UserError(f"--{key}: settings have no dashes; write {key}={value}")
        if equals:
            found = override_problems(parse_overrides([f"{key}={value}"]), lambda _: [])
            problem = next(found, f"write {key}={value}")
            raise UserError(f"--{key}: settings have no dashes; {problem}")
        if is_known(key) or key in KEYS:
            meant = f"write {key}=<value>" if is_known(key) else unknown_key(key)
            raise UserError(f"--{key}: settings have no dashes; {meant}")
        raise UserError(f"--{key}: no such flag; settings are written key=value, without dashes")


def flag_parser() -> argparse.ArgumentParser:
    """Parser of Hydra's flags, with errors of one line."""
    parser = _Parser(parents=[get_args_parser()], add_help=False)
    parser.add_argument("--config", help="Repeat a run: its folder, or the config.yaml in it")
    parser.add_argument("--help-all", action="store_true", help="List all settings")
    return parser


def parse_overrides(
    lines: Iterable[str], config_loader: ConfigLoader | None = None
) -> list[Override]:
    """Parses the arguments by Hydra's grammar.

    Args:
        lines: As they were typed.
        config_loader: Knows the choices of a group, among which ``model=glob(l*)`` chooses.

    Raises:
        UserError: Those that are not ``key=value``, all of them.
    """
    parser = OverridesParser.create(config_loader=config_loader)
    parsed, problems = [], []
    for line in lines:
        try:
            override = _parse(parser, line)
            if not override.key_or_group:
                raise HydraException("no key")
            parsed.append(override)
        except HydraException:
            problems.append(_unreadable(line, parser))
    raise_all(problems)
    return parsed


def _parse(parser: OverridesParser, line: str) -> Override:
    try:
        return parser.parse_overrides([line])[0]
    except (ValueError, RecursionError) as error:  # a number or a nesting without end
        raise HydraException(str(error)) from error


def _unreadable(line: str, parser: OverridesParser) -> str:
    key, equals, value = line.partition("=")
    if not equals or not key:
        return f"{line}: settings are written key=value"
    if is_secret(key):
        return unknown_key(key)
    quoted = '{}="{}"'.format(key, value.replace("\\", "\\\\").replace('"', '\\"'))
    try:
        _parse(parser, quoted)
    except HydraException:
        return f"{shown(line)}: cannot be read; settings are written key=value"
    if len(line) > _LONGEST_LINE:
        return f"{shown(line)}: cannot be read; the value needs quotes, or is too long"
    return f"{line}: the value has characters that need quotes; write {shlex.quote(quoted)}"


def with_own_names(lines: Iterable[str]) -> list[str]:
    """The settings by their names here: ``loss=dpo`` is ``loss=sigmoid``, and each is said."""
    found = []
    for line in lines:
        key, equals, value = line.partition("=")
        plain = key.lstrip("+")
        if equals and plain in RENAMED_KEYS:
            say_renamed(plain, RENAMED_KEYS[plain])
            line = f"{key[: len(key) - len(plain)]}{RENAMED_KEYS[plain]}={value}"
        elif plain in ("sweep.metric", "sweep.prune_metric") and value in RENAMED_METRICS:
            say_renamed(value, RENAMED_METRICS[value])
            line = f"{key}={RENAMED_METRICS[value]}"
        names = value.split(",") if equals and key == "loss" else []
        own = [renamed_loss(name.strip(), known_losses()) or name for name in names]
        if own != names:
            line = f"{key}={','.join(own)}"
            log.warning("loss=%s is loss=%s here: using that", value, ",".join(own))
        found.append(line)
    return found


def typed_text(lines: Iterable[str], key: str) -> str | None:
    """The text that a setting was given last, ahead of any composition; None if it was not.

    Args:
        lines: The settings as typed.
        key: The setting.
    """
    parser, found = OverridesParser.create(), None
    for line in lines:
        if line.lstrip("+").startswith(f"{key}="):
            try:
                value = _parse(parser, line).value()
            except HydraException:
                continue
            found = None if value is None else str(value)
    return found


def named_plugins(lines: Iterable[str], folders: Iterable[Path]) -> list[str]:
    """The plugins that the command line names, or a file that it chooses; all others wait.

    Args:
        lines: The settings as typed; what cannot be read is left to those who judge it.
        folders: Folders of config files.

    Returns:
        Import names, each once.
    """
    parser = OverridesParser.create()
    found: list[object] = []
    for line in lines:
        try:
            override = _parse(parser, line)
        except HydraException:
            continue
        key, value = override.key_or_group, override.value()
        if key == "plugins" and isinstance(value, list):
            found += [shown(name) for name in value]
        elif isinstance(value, str) and re.fullmatch(r"[\w./-]+", f"{key}/{value}"):
            for folder in folders:
                found += _plugins_of(folder / key / f"{value}.yaml")
    names = [name for name in found if isinstance(name, str) and is_import_name(name)]
    return list(dict.fromkeys(names))


def _plugins_of(path: Path) -> list[object]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return []
    plugins = content.get("plugins") if isinstance(content, dict) else None
    return plugins if isinstance(plugins, list) else []


def override_problems(
    overrides: Iterable[Override], options_of: Callable[[str], list[str]]
) -> Iterator[str]:
    """Yields the faults of the keys and of the choices of groups.

    Args:
        overrides: The parsed arguments.
        options_of: The choices of a config group, empty for what is none.

    Yields:
        One clause per problem; values of plain settings are judged when they are composed.
    """
    for override in overrides:
        key = override.key_or_group
        options = [] if "." in key else options_of(key)
        if options:
            yield from _group_problems(override, options)
        elif override.package is not None or override.is_hydra_override():
            continue  # Hydra's to judge
        elif not is_known(key) or is_secret(key):
            if override.is_delete() or override.is_sweep_override():
                yield unknown_key(key)
            else:
                yield unknown_key(key, override.value())
        elif override.is_delete() and key in settings():
            yield f"~{key}: a setting cannot be taken away; give it a value, {key}=<value>"


def _group_problems(override: Override, options: list[str]) -> Iterator[str]:
    group, line = override.key_or_group, str(override.input_line)
    value = None if override.is_delete() else override.value()
    if isinstance(value, dict):
        return  # merged into the section like any other values
    if value is None and group == "experiment":
        return
    if value is None or value == []:
        without = f"; {group}=none is without one" if "none" in options else ""
        yield f"{line}: must be one of {', '.join(options)}{without}"
    elif override.is_add() or override.is_force_add():
        yield f"{line}: {group} has a choice already; leave out the +"
    else:
        if override.is_sweep_override():
            chosen = [str(option) for option in override.sweep_string_iterator()]
        else:
            chosen = [shown(option) for option in (value if isinstance(value, list) else [value])]
        yield from (unknown_option(group, name, options) for name in chosen if name not in options)


def needs_multirun(override: Override) -> str:
    """The answer to several values where there is one run."""
    line = str(override.input_line)
    key, _, values = line.partition("=")
    setting = settings().get(override.key_or_group)
    if key in ("logger", "logger.name"):  # whose files are what a list is made of
        return f"{line} gives several values: several loggers at once are logger=[{values}]"
    hint = f"; a list is {key}=[{values}]" if setting and setting.kind in (list, object) else ""
    if (
        setting
        and setting.kind in (str, object)
        and "," in values
        and not re.search("[\"'(\\\\]", values)
    ):
        quoted = shlex.quote(f'{key}="{values}"')
        if Path(values).expanduser().exists():
            return f"{line}: the comma of this path separates values; write {quoted}"
        hint += f"; one text that has commas is {quoted}"
    return f"{line} gives several values: add -m to run one after the other{hint}"


def hydra_error(error: Exception) -> str:
    """Puts an error of Hydra into one line, without its advice to add a key by a ``+``."""
    message = str(error)
    where = re.match(r"In '([^']+)': ", message)
    cause = error.__cause__ or error.__context__
    if isinstance(error, OmegaConfBaseException):
        return config_error(error)
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        if where and _is_out_of_place(where.group(1), str(cause.full_key or "")):
            return _not_global(where.group(1))
        return (f"{where.group(1)}.yaml: " if where else "") + config_error(cause)
    if (fault := _fault_of_defaults(message)) is not None:
        return fault
    taken = re.match(r"Could not append to config\. An item is already at '([^']+)'", message)
    if taken:
        return f"+{taken.group(1)}: the key is there already; leave out the +"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    for advice in ("Config search path:", "Search path:", "To append to your", "See https:"):
        message = message.partition(advice)[0]
    message = " ".join(message.split())
    placed = re.fullmatch(r"(.*?) full_key: (\S+)( object_type=\S+)?", message)
    if placed:
        message = f"{placed.group(2)}: {placed.group(1)}"
    return message or type(error).__name__


def _is_out_of_place(file: str, key: str) -> bool:
    """True if a file's key was read below the name of its group, which is no section."""
    group = file.partition("/")[0]
    return group not in settings() and (key == group or key.startswith(f"{group}."))


def _not_global(file: str) -> str:
    group = file.partition("/")[0]
    return (
        f"{file}.yaml: its keys were read as keys of {group}; make `# @package _global_` its "
        "first line"
    )


def _fault_of_defaults(message: str) -> str | None:
    """The answer to a fault in a file's list of defaults; None for any other error."""
    place = r"(?:In '(?P<file>[^']+)': )?"
    found = re.match(rf"{place}Could not override '(?P<name>[^'@]+)(?:@[^']*)?'", message)
    if found is None:
        found = re.match(
            rf"{place}Could not find '(?P<name>[^']+)/[^'/]+'(?!\s*Available)", message
        )
    if found is not None and found["file"] and "/" in found["file"]:
        group = found["name"].removeprefix(f"{found['file'].rpartition('/')[0]}/")
        return (
            f"{found['file']}.yaml: `{group}` in its defaults is looked for in the file's own "
            f"folder; write `override /{group}: <choice>`, with the slash"
        )
    found = re.match(r"Multiple values for ([\w/]+)\. .* use 'override ([\w/]+): (.*)'", message)
    if found is not None:
        return (
            f"{found[1]}: the defaults of a file choose it a second time; write "
            f"`override /{found[2]}: {found[3]}` there"
        )
    found = re.match(rf"{place}Could not find '([\w/]+)/([^'/]+)'\s+Available options in", message)
    if found is not None:
        options = re.search(
            r"Available options in '[^']*':\s*(.*?)\s*(?:Config search|$)", message, re.S
        )
        said = unknown_option(found[2], found[3], options[1].split() if options else [])
        return f"a file chooses {found[2]}/{found[3]}; {said}"
    return None
