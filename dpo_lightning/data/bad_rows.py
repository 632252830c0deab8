"""Rows that are no preference groups: how they are said, and where they are kept."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from dpo_lightning.errors import UserError

MOST_OF_ONE_CAUSE = 0.2
"""Share of the rows that one cause may spoil before it is no fault of the rows."""

_PLACES = 3
_VALUES = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|-?\d[\d.]*""")


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no preference group.

    Attributes:
        source: Its place, ``file:line``.
        field: The column at fault, ``row`` for the whole.
        problem: The fault that was found there, on one line.
        row: The row as read.
    """

    source: str
    field: str
    problem: str
    row: str


class ReadRows(Protocol):
    """Rows that were read, good and bad."""

    @property
    def bad(self) -> Sequence[BadRow]:
        """The bad rows."""

    @property
    def total(self) -> int:
        """Number of all rows."""


def check_bad_rows(rows: ReadRows, *, on_bad_row: str, limit: int = 20, remedy: str = "") -> None:
    """Stops at bad rows, unless they are to be skipped.

    Rows with one fault are one clause, with their number and the first places.

    Args:
        rows: The rows that were read.
        on_bad_row: ``stop`` or ``skip``.
        limit: Number of faults that the message names.
        remedy: Another way out than to skip them; empty where there is none.

    Raises:
        UserError: If there is a bad row and ``on_bad_row`` is ``stop``, or no row is good.
    """
    if not rows.bad or (on_bad_row != "stop" and len(rows.bad) < rows.total):
        return
    faults: dict[tuple[str, str], list[BadRow]] = {}
    for bad in rows.bad:
        faults.setdefault((_VALUES.sub("#", bad.field), _VALUES.sub("#", bad.problem)), []).append(
            bad
        )
    lines = [_fault(found) for found in list(faults.values())[:limit]]
    if len(faults) > limit:
        lines.append(f"and {count_of(len(faults) - limit, 'other fault')}")
    if len(rows.bad) == rows.total:
        end = "no row can be read" if rows.total > 1 else "it is the only row"
    else:
        count = count_of(len(rows.bad), "bad row")
        end = f"{count} of {rows.total}, data.on_bad_row=skip skips them (kept in quarantine.jsonl)"
    raise UserError("; ".join([*lines, end, *([f"or {remedy}"] if remedy else [])]))


def _fault(found: Sequence[BadRow]) -> str:
    first = found[0]
    line = f"{first.source}: {first.field}: {first.problem}"
    if len(found) == 1:
        return line
    places = ", ".join(bad.source for bad in found[1:_PLACES])
    more = f" and {len(found) - _PLACES} more" if len(found) > _PLACES else ""
    return f"{line} (the same in {count_of(len(found) - 1, 'other row')}: {places}{more})"


def write_quarantine(path: Path, bad: Iterable[BadRow]) -> None:
    """Writes bad rows as JSON, one object of ``source``, ``field``, ``problem``, ``row`` a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad)


def count_of(number: int, noun: str) -> str:
    """A number with its noun, in the plural where it needs one."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
