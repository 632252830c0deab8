"""Rows of ``metrics.jsonl`` as plain values. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_lightning.files import METRICS_FILE, json_object

Row = Mapping[str, Any]
"""A row: ``step``, ``epoch``, ``time`` and metrics; None is not finite."""

Known = Mapping[tuple[int, str], float | None]
"""Values by step and name of the metric."""

FACTS = ("step", "epoch", "time")
"""Entries of a row that are no metrics."""


def row_of(line: bytes) -> dict[str, Any] | None:
    """A row of metrics; None for a line that is none.

    Args:
        line: The line.
    """
    row = json_object(line)
    return row if row is not None and type(row.get("step")) is int else None


def rows_of_file(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl`` in the folder of a run; none where it cannot be read.

    Args:
        folder: The run's.
    """
    try:
        lines = (folder / METRICS_FILE).read_bytes().split(b"\n")
    except OSError:
        return []
    return [row for row in map(row_of, lines) if row is not None]


def metrics_of(row: Row) -> dict[str, float]:
    """The metrics of a row, with its epoch where it has one; NaN stands for what is not finite.

    Args:
        row: The row.
    """
    named = {name: value for name, value in row.items() if name not in FACTS}
    if row.get("epoch") is not None:
        named["epoch"] = row["epoch"]
    return {name: float("nan") if value is None else value for name, value in named.items()}


def known_values(rows: Iterable[Row]) -> Known:
    """The values of rows, by step and name.

    Args:
        rows: Rows of ``metrics.jsonl``.
    """
    return {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name not in FACTS
    }
