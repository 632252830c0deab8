"""Values out of JSON files that anything may have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# No run measures as much, and squares and sums of what is smaller stay finite.
_LARGEST = 1e100


def as_mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_rows(value: Any) -> list[Mapping[str, Any]]:
    """The JSON objects of a list."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def number(value: Any) -> float | None:
    """The value if it is a finite number of a usable size."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    return value if abs(value) <= _LARGEST else None
