"""Every key of the schema, with the type and the rule of its value."""

import dataclasses
import functools
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from dpo_lightning.settings.schema import (
    Config,
    LossConfig,
    OptimizerConfig,
    known_names,
    loss_schema,
    optimizer_schema,
)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of the schema.

    Attributes:
        kind: The type of a value: ``int``, ``float``, ``bool``, ``str``, ``list``, ``dict``,
            ``object`` for any, or the dataclass of a section.
        optional: True if null is a value.
        default: The value when nothing is set; None for a section.
        rule: Help, unit, and the bounds or choices that the schema gives.
    """

    kind: type
    optional: bool
    default: Any
    rule: Mapping[str, Any]

    @property
    def help(self) -> str:
        """One plain sentence about the key; empty for a section."""
        return str(self.rule.get("help", ""))

    @property
    def unit(self) -> str | None:
        """Unit of its number, if it is one."""
        return self.rule.get("unit")

    @property
    def is_section(self) -> bool:
        """True if other keys stand below this one."""
        return dataclasses.is_dataclass(self.kind)


def _settings(section: type, prefix: str) -> Iterator[tuple[str, Setting]]:
    hints = get_type_hints(section)
    for item in dataclasses.fields(section):
        annotation, optional = hints[item.name], False
        if annotation is LossConfig:
            annotation = loss_schema()
        elif annotation is OptimizerConfig:
            annotation = optimizer_schema()
        if get_origin(annotation) in (Union, types.UnionType):
            annotation = next(kind for kind in get_args(annotation) if kind is not type(None))
            optional = True
        kind = object if annotation is Any else get_origin(annotation) or annotation
        factory = item.default_factory
        default = item.default if factory is dataclasses.MISSING else factory()
        section_default = None if dataclasses.is_dataclass(kind) else default
        yield f"{prefix}{item.name}", Setting(kind, optional, section_default, item.metadata)
        if dataclasses.is_dataclass(kind):
            yield from _settings(kind, f"{prefix}{item.name}.")


def settings() -> dict[str, Setting]:
    """Every key of the schema, sections included, in the order of the schema."""
    return _all_settings(known_names())


@functools.cache
def _all_settings(_: tuple[str, ...]) -> dict[str, Setting]:
    return dict(_settings(Config, ""))


def is_known(key: str) -> bool:
    """True if the schema has the key, or one above it whose keys or items are the user's."""
    known = settings()
    parts = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    for end in range(1, len(parts) + 1):
        setting = known.get(".".join(parts[:end]))
        if setting is None:
            return False
        if not setting.is_section:
            rest = parts[end:]
            return setting.kind is dict or all(part.isdigit() for part in rest)
    return True


def is_import_name(name: str) -> bool:
    """True if the name has the form of a module's."""
    return re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", name) is not None
