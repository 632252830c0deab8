"""Columns of rows that training does not read, by the places of the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_lightning.data.source_names import entries, source_label
from dpo_lightning.data.sources import open_sources
from dpo_lightning.data.texts import printable
from dpo_lightning.errors import UserError

_MOST_NAMED = 12


def column_values(
    source: object,
    column: str,
    *,
    key: str,
    split: str | None,
    subset: str | None,
    revision: str | None,
) -> dict[str, Any]:
    """The value of a column in each row that has it.

    Args:
        source: Value of the setting that names the rows.
        column: Its name; ``a.b`` is also ``b`` of the object ``a``.
        key: The setting, for errors.
        split: Split of a data set.
        subset: Configuration of a data set.
        revision: Commit, tag or branch of a data set.

    Returns:
        Values by the place of their row, ``file:line``, as groups have it.

    Raises:
        UserError: If no row has the column.
    """
    found: dict[str, Any] = {}
    names: dict[str, None] = {}
    first = column.partition(".")[0]
    options = {"split": split, "subset": subset, "revision": revision, "key": key}
    for entry in entries(source):
        opened, _ = open_sources(entry.path, **options)  # type: ignore[arg-type]
        for part in opened:
            wanted = [name for name in (column, first) if name in (part.columns or ())][:1]
            names |= dict.fromkeys(part.columns or ())
            if part.columns is not None and not wanted:
                continue
            for record in part.read(wanted):
                if isinstance(record.value, dict):
                    names |= dict.fromkeys(record.value)
                    value = _inside(record.value, column)
                    if value is not _NOTHING:
                        found[f"{printable(part.label)}:{record.number}"] = value
    if not found:
        shown = ", ".join(printable(name) for name in [*names][:_MOST_NAMED])
        raise UserError(
            f"--slice {column}: no row of {key}={printable(source_label(source))} has that column; "
            f"there are {shown or 'none'}{', …' if len(names) > _MOST_NAMED else ''}"
        )
    return found


_NOTHING = object()


def _inside(row: Mapping[str, Any], column: str) -> Any:
    """A value of a row, or of an object in it."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            return _NOTHING
        value = value[part]
    return value
