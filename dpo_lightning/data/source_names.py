"""Names of sources: a file of this machine, an id of the hub, or an address.

Names are only looked at, but for whether there is such a file. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROW_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv", ".arrow")
"""Endings of the files that rows are read from."""

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
"""Endings behind those, of files of text that were made smaller."""

FILE_SUFFIXES = (
    frozenset(ROW_SUFFIXES)
    | frozenset(COMPRESSIONS)
    | frozenset({".feather", ".pkl", ".pt", ".tar", ".txt", ".xlsx", ".yaml", ".yml", ".zip"})
)
"""Those, and endings of files that people have rows in and that are not read: no data set's."""

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_GLOB = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Entry:
    """One source of ``data.train`` or ``data.eval``.

    Attributes:
        path: A file, a folder, a pattern of files, or an id of the hub.
        weight: Share of its rows that is taken, above 0 and at most 1.
    """

    path: str
    weight: float = 1.0


def entries(value: object) -> list[Entry]:
    """The sources that a value of ``data.train`` or ``data.eval`` names.

    Args:
        value: A name, a list of names and of ``{path, weight}``, or None.

    Raises:
        ValueError: If it is anything else; with the part at fault.

    Example:
        >>> entries("a.jsonl"), entries([{"path": "b.jsonl", "weight": 0.5}])
        ([Entry(path='a.jsonl', weight=1.0)], [Entry(path='b.jsonl', weight=0.5)])
    """
    if value is None:
        return []
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError("an empty list")
        return [_entry(item) for item in value]
    return [_entry(value)]


def eval_sets(value: object) -> dict[str | None, object]:
    """The sources of a value of ``data.eval`` by the name of their set; None where it has no name.

    Args:
        value: A source as in :func:`entries`, a mapping of names to such sources, or None.

    Example:
        >>> eval_sets("a.jsonl"), eval_sets({"a": "a.jsonl", "b": ["b.jsonl"]})
        ({None: 'a.jsonl'}, {'a': 'a.jsonl', 'b': ['b.jsonl']})
    """
    if value is None:
        return {}
    if isinstance(value, dict) and "path" not in value:
        return dict(value)
    return {None: value}


def eval_key(name: str | None) -> str:
    """The key of a held-out set, as errors name it."""
    return "data.eval" if name is None else f"data.eval.{name}"


def eval_entries(value: object) -> list[Entry]:
    """All sources that a value of ``data.eval`` names, set after set.

    Raises:
        ValueError: As :func:`entries`.
    """
    return [entry for source in eval_sets(value).values() for entry in entries(source)]


def _entry(item: object) -> Entry:
    if isinstance(item, str):
        if not item:
            raise ValueError("an empty name")
        return Entry(item)
    if not isinstance(item, dict) or not isinstance(item.get("path"), str) or not item["path"]:
        raise ValueError(f"{item}")
    weight = item.get("weight", 1.0)
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if set(item) - {"path", "weight"} or not number or not 0 < weight <= 1:
        raise ValueError(f"{item}")
    return Entry(item["path"], float(weight))


def source_label(value: object) -> str:
    """The sources of a value as it is typed, on one line.

    Example:
        >>> source_label(["a.jsonl", {"path": "b.jsonl", "weight": 0.5}])
        '[a.jsonl,{path: b.jsonl, weight: 0.5}]'
    """
    if isinstance(value, dict) and "path" not in value:
        parts = ", ".join(f"{name}: {source_label(own)}" for name, own in value.items())
        return f"{{{parts}}}"
    try:
        listed = entries(value) if isinstance(value, list | tuple) else None
    except ValueError:
        listed = None
    if listed is None:
        return str(value)
    shown = [
        f"{{path: {e.path}, weight: {e.weight:g}}}" if e.weight != 1 else e.path for e in listed
    ]
    return f"[{','.join(shown)}]"


def row_suffix(name: str) -> tuple[str, str]:
    """The ending of a file of rows and that of its compression, each empty where there is none.

    Example:
        >>> row_suffix("a.JSONL.gz"), row_suffix("a.csv"), row_suffix("a.txt")
        (('.jsonl', '.gz'), ('.csv', ''), ('', ''))
    """
    path = Path(name.lower())
    packed = path.suffix if path.suffix in COMPRESSIONS else ""
    suffix = Path(path.stem).suffix if packed else path.suffix
    if suffix not in ROW_SUFFIXES or (packed and suffix in (".parquet", ".arrow")):
        return "", ""
    return suffix, packed


def is_pattern(source: str) -> bool:
    """True if a name is a pattern of file names, and no file has it."""
    return _GLOB.search(source) is not None and not _exists(source)


def is_hub_id(source: str) -> bool:
    """True if a name has the form of a model's or a data set's on the hub.

    Example:
        >>> is_hub_id("owner/name"), is_hub_id("gpt2"), is_hub_id("a/b/c"), is_hub_id("-x")
        (True, True, False, False)
    """
    return _HUB_ID.fullmatch(source) is not None


def is_local_data(source: str) -> bool:
    """True if a data source names files of this machine, and not a hub data set."""
    return (
        source.startswith((".", "/", "~"))
        or Path(source).suffix.lower() in FILE_SUFFIXES
        or _GLOB.search(source) is not None
        or _exists(source)
    )


def is_address(source: str) -> bool:
    """True if the name is an address in a network."""
    return "://" in source


def hub_ids(value: object) -> list[str]:
    """The names in a value of ``data.train`` or ``data.eval`` that are no files of this machine."""
    return [entry.path for entry in eval_entries(value) if not is_local_data(entry.path)]


def data_files(folder: Path) -> Iterator[Path]:
    """The files of rows in a folder and below it, in the order of their names; no hidden ones."""
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "_")) for part in inside)
        if row_suffix(path.name)[0] and not hidden and path.is_file():
            yield path


def _exists(source: str) -> bool:
    try:
        return Path(source).exists()
    except (OSError, ValueError):
        return False
