"""Sources of rows: local files of any kind that rows are kept in, and data sets of the hub.

A source yields raw records, good and bad, with their place. A file as a whole that cannot be read
is a :class:`UserError`; what is inside a single line is not.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_lightning.data.record_files import (
    Record,
    csv_columns,
    read_csv,
    read_json,
    read_jsonl,
)
from dpo_lightning.data.record_tables import (
    Table,
    arrow_table,
    hub_table,
    parquet_table,
    saved_table,
)
from dpo_lightning.data.source_files import find_source
from dpo_lightning.data.source_names import row_suffix
from dpo_lightning.data.texts import printable

__all__ = ["Record", "Source", "open_sources"]


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source: one file, or one data set.

    Attributes:
        label: Text before the number of a record: ``path`` or ``id[split]``.
        where: The key and the source, for errors.
        columns: The columns of a table, and whether each may hold texts; None when every record
            names its own.
        read: Yields the records. It is given the columns to look at: a table may have others,
            images say, that are expensive to read.
        cells: True if every value is a text, whatever it stands for.
    """

    label: str
    where: str
    columns: Mapping[str, bool] | None
    read: Callable[[Collection[str]], Iterator[Record]]
    cells: bool = False


def open_sources(
    source: str, *, split: str | None, subset: str | None, revision: str | None, key: str
) -> tuple[list[Source], list[str]]:
    """Opens the files of a source, or a data set.

    Args:
        source: A path, a pattern of paths, or an id of the hub.
        split: Split of the data set; may be None when it has only one.
        subset: Configuration of the data set.
        revision: Commit, tag or branch of the data set.
        key: The configuration key that ``source`` is a value of, for errors.

    Returns:
        The opened sources in their order, and lines to say once.

    Raises:
        UserError: If there is no such source or it cannot be read.
    """
    where = f"{key}={printable(source)}"
    found = find_source(source, split=split, subset=subset, key=key)
    if found.on_hub:
        table, name = hub_table(source, split=split, subset=subset, revision=revision, key=key)
        return [Source(f"{source}[{name}]", where, table.columns, table.read)], []
    if found.saved is not None:
        table, name = saved_table(found.saved, where, split=split, key=key)
        label = f"{source}[{name}]" if name else source
        return [Source(label, where, table.columns, table.read)], []
    single = len(found.files) == 1 and not found.note
    sources = []
    for path in found.files:
        label = source if single else str(path)
        sources.append(_open_file(path, label, f"{key}={printable(label)}"))
    is_folder = Path(source).expanduser().is_dir()
    unused = (("subset", None if is_folder else subset), ("revision", revision))
    notes = [
        f"data.{name}={value} is for data sets of the hub; {where} is of this machine and does not "
        "use it"
        for name, value in unused
        if value is not None
    ]
    return sources, [*notes, *([found.note] if found.note else [])]


def _open_file(path: Path, label: str, where: str) -> Source:
    suffix, _ = row_suffix(path.name)
    if suffix in (".jsonl", ".ndjson"):
        return Source(label, where, None, lambda _: read_jsonl(path, where))
    if suffix == ".json":
        return Source(label, where, None, lambda _: read_json(path, where))
    if suffix in (".csv", ".tsv"):
        names, separator = csv_columns(path, where)
        columns = dict.fromkeys(names, True)
        return Source(
            label, where, columns, lambda _: read_csv(path, where, names, separator), cells=True
        )
    table = parquet_table(path, where) if suffix == ".parquet" else arrow_table(path, where)
    return _of_table(label, where, table)


def _of_table(label: str, where: str, table: Table | None) -> Source:
    if table is None:
        return Source(label, where, {}, lambda _: iter(()))
    return Source(label, where, table.columns, table.read)
