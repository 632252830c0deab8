"""Grids in blocks, ``sweep.trials``: a list of blocks, each the product of its own values.

Hydra only crosses what is typed, and each objective has a scale of beta of its own::

    - {loss: sigmoid, beta: [0.01, 0.1]}
    - {loss: simpo, beta: [2, 2.5, 10], loss.gamma: [0.5, 1]}

A value is what would be typed behind its key; a list gives several.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import UserError
from dpo_lightning.settings.credentials import is_secret, refusal, typed_secrets
from dpo_lightning.settings.messages import config_error, shown
from dpo_lightning.settings.overrides import (
    override_problems,
    parse_overrides,
    raise_all,
    with_own_names,
)

KEY = "sweep.trials"

_EXAMPLE = "- {loss: sigmoid, beta: [0.01, 0.1]}"
# Of the sweep as a whole, or of one run alone.
_NOT_IN_A_BLOCK = ("hydra", "sweep", "resume", "plugins")


@dataclass(frozen=True, slots=True)
class GridKey:
    """A key of a block with its values.

    Attributes:
        key: As it would be typed.
        place: ``file:line``, or its place in the list of an experiment's file.
        lines: The settings that it gives, ``key=value``, one for each value.
    """

    key: str
    place: str
    lines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GridBlock:
    """A part of a grid, whose values are crossed with each other alone.

    Attributes:
        place: Place of its beginning.
        entries: Its keys, in their order.
    """

    place: str
    entries: tuple[GridKey, ...]

    def cells(self) -> list[list[str]]:
        """The settings of each of its trials."""
        return [list(cell) for cell in itertools.product(*(e.lines for e in self.entries))]

    def place_of(self, message: str) -> str:
        """Place of the entry that a message about a trial begins with, or of the block."""
        for entry in sorted(self.entries, key=lambda e: -len(e.key)):
            if message.startswith((f"{entry.key}=", f"{entry.key}:", f"{entry.key}.")):
                return entry.place
        return self.place


def blocks_of(cfg: DictConfig) -> list[GridBlock]:
    """The blocks that ``sweep.trials`` names or holds; none where it is null.

    Args:
        cfg: The composed settings.

    Raises:
        UserError: If they cannot be read; all that is wrong, each with its place.
    """
    try:
        section = OmegaConf.to_container(cfg.sweep, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(config_error(error)) from error
    source = section.get("trials") if isinstance(section, dict) else None
    if source is None:
        return []
    if isinstance(source, str):
        return _read_file(source)
    if not isinstance(source, list) or not source:
        raise UserError(f"{KEY}={shown(source)}: must be a file of blocks such as `{_EXAMPLE}`")
    return _read_list(source)


def _read_file(name: str) -> list[GridBlock]:
    path = Path(name).expanduser()
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        return _blocks_of_node(root, path)
    except OSError as error:
        raise UserError(
            f"{KEY}={name}: {error.strerror}, seen from {Path.cwd()}; name a YAML file of blocks"
        ) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: {error.problem}; write blocks as `{_EXAMPLE}`") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML; write blocks as `{_EXAMPLE}`") from error


def _blocks_of_node(root: yaml.Node | None, path: Path) -> list[GridBlock]:
    if not isinstance(root, yaml.SequenceNode) or not root.value:
        raise UserError(f"{_place(path, root)}: must be a list of blocks, such as `{_EXAMPLE}`")
    blocks, problems = [], []
    for item in root.value:
        if not isinstance(item, yaml.MappingNode) or not item.value:
            problems.append(
                f"{_place(path, item)}: must be a block of keys and values: `{_EXAMPLE}`"
            )
            continue
        entries: dict[str, GridKey] = {}
        for key_node, value in item.value:
            key, place = str(getattr(key_node, "value", "")), _place(path, key_node)
            values = value.value if isinstance(value, yaml.SequenceNode) else [value]
            if not isinstance(key_node, yaml.ScalarNode):
                problems.append(f"{place}: a key must be one setting, such as beta")
            elif key in entries:
                problems.append(f"{place}: {key} stands in this block twice; leave one out")
            elif not values:
                problems.append(f"{place}: {key} has no value; give it one, or leave it out")
            else:
                lines = with_own_names(f"{key}={_node_text(item)}" for item in values)
                entries[key] = GridKey(key, place, tuple(lines))
        blocks.append(GridBlock(_place(path, item), tuple(entries.values())))
    raise_all(problems)
    return blocks


def _place(path: Path, node: yaml.Node | None) -> str:
    return f"{path}:{1 if node is None else node.start_mark.line + 1}"


def _node_text(node: yaml.Node) -> str:
    """A value in Hydra's grammar, as it stands in the file: 5e-7 stays 5e-7."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag.endswith(":null"):
            return "null"
        return quoted(node.value) if node.style else _typed(node.value)
    if isinstance(node, yaml.SequenceNode):
        return f"[{','.join(map(_node_text, node.value))}]"
    pairs = [f"{_node_text(key)}:{_node_text(value)}" for key, value in node.value]
    return f"{{{','.join(pairs)}}}"


def _read_list(source: Sequence[Any]) -> list[GridBlock]:
    blocks, problems = [], []
    for number, item in enumerate(source):
        place = f"{KEY}[{number}]"
        if not isinstance(item, dict) or not item:
            problems.append(f"{place}={shown(item)}: must be a block such as `{_EXAMPLE}`")
            continue
        entries = []
        for key, value in item.items():
            values = value if isinstance(value, list) else [value]
            if not values:
                problems.append(f"{place}.{key} has no value; give it one, or leave it out")
            lines = with_own_names(f"{key}={_value_text(item)}" for item in values)
            entries.append(GridKey(str(key), f"{place}.{key}", tuple(lines)))
        blocks.append(GridBlock(place, tuple(entries)))
    raise_all(problems)
    return blocks


def _value_text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(_value_text, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{_value_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return _typed(str(value))


def _typed(text: str) -> str:
    """A text as one value of Hydra's grammar, in quotes where it would not be that without."""
    try:
        override = OverridesParser.create().parse_overrides([f"key={text}"])[0]
    except (HydraException, ValueError, RecursionError):
        return quoted(text)
    return quoted(text) if override.is_sweep_override() or not text else text


def quoted(text: str) -> str:
    """A text in quotes, as one value of Hydra's grammar."""
    return QuotedString(text, Quote.single).with_quotes()


def check_blocks(
    blocks: Iterable[GridBlock], typed: Sequence[Any], options_of: Callable[[str], list[str]]
) -> None:
    """Checks the keys and the choices of blocks; values are judged when they are composed.

    Args:
        blocks: The blocks.
        typed: Overrides that every trial gets.
        options_of: The choices of a config group, empty for what is none.

    Raises:
        UserError: All that is wrong, each with its place.
    """
    taken = {override.key_or_group: str(override.input_line) for override in typed}
    raise_all(
        f"{entry.place}: {problem}"
        for block in blocks
        for entry in block.entries
        for problem in _entry_problems(entry, taken, options_of)
    )


def _entry_problems(
    entry: GridKey, taken: dict[str, str], options_of: Callable[[str], list[str]]
) -> Iterator[str]:
    if secrets := [refusal(key) for key in typed_secrets(list(entry.lines))]:
        yield from secrets
        return
    if is_secret(entry.key):
        yield refusal(entry.key)
        return
    if entry.key.lstrip("+~").replace("/", ".").partition(".")[0] in _NOT_IN_A_BLOCK:
        yield f"{entry.key} is no setting of a trial; give it on the command line"
        return
    if entry.key in taken:
        yield (
            f"{entry.key} has values here, and {taken[entry.key]} gives it one for all blocks; "
            "leave out one of the two"
        )
        return
    for line in entry.lines:
        try:
            overrides = parse_overrides([line])
        except UserError as error:
            yield str(error)
        else:
            yield from override_problems(overrides, options_of)
