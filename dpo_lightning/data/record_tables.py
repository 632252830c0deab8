"""Records of tables: parquet and Arrow files, saved data sets, and those of the hub."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.data.fields import NOT_READ, is_heavy
from dpo_lightning.data.record_files import Record
from dpo_lightning.data.texts import list_names, printable, show
from dpo_lightning.errors import UserError

_BATCH_ROWS = 1024
_POINTER = b"version https://git-lfs"


class Table:
    """A table whose rows can be read a few columns at a time.

    Attributes:
        columns: Its columns, and whether each may hold texts.
    """

    def __init__(self, schema: Any, batches: Any, where: str, kind: str) -> None:
        names = list(schema.names)
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise UserError(f"{where}: the column {show(twice[0])} is there twice; rename one")
        self.columns = {name: _may_hold_text(schema.field(name).type) for name in names}
        self._batches = batches
        self._where = where
        self._kind = kind

    def read(self, wanted: Collection[str]) -> Iterator[Record]:
        """The rows, of the wanted columns alone."""
        import pyarrow

        names = [name for name in self.columns if name in wanted]
        number = 1
        try:
            for batch in self._batches(names):
                yield from _table_rows(batch, number)
                number += batch.num_rows
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise _failed(self._where, self._kind, error) from error


def _failed(where: str, kind: str, error: BaseException) -> UserError:
    return UserError(f"{where}: not readable as {kind}: {first_line(error)}")


def _may_hold_text(kind: Any) -> bool:
    import pyarrow.types as types

    if types.is_nested(kind):
        return any(_may_hold_text(kind.field(i).type) for i in range(kind.num_fields))
    return bool(
        types.is_string(kind)
        or types.is_large_string(kind)
        or types.is_string_view(kind)
        or types.is_dictionary(kind)
    )


def parquet_table(path: Path, where: str) -> Table | None:
    """A parquet file as a table; None if it is empty.

    Raises:
        UserError: If it is none.
    """
    import pyarrow.parquet

    if _is_empty(path, where):
        return None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        schema = file.schema_arrow
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _failed(where, "parquet", error) from error
    return Table(
        schema,
        lambda names: file.iter_batches(batch_size=_BATCH_ROWS, columns=names),
        where,
        "parquet",
    )


def arrow_table(path: Path, where: str) -> Table | None:
    """An Arrow file, of a stream or of random access, as a table; None if it is empty.

    Raises:
        UserError: If it is none.
    """
    import pyarrow

    if _is_empty(path, where):
        return None
    try:
        source = pyarrow.memory_map(str(path))
        try:
            table = pyarrow.ipc.open_stream(source).read_all()
        except pyarrow.ArrowInvalid:
            table = pyarrow.ipc.open_file(pyarrow.memory_map(str(path))).read_all()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _failed(where, "arrow", error) from error
    return _in_memory(table, where, "arrow")


def _in_memory(table: Any, where: str, kind: str) -> Table:
    return Table(
        table.schema,
        lambda names: table.select(names).to_batches(max_chunksize=_BATCH_ROWS),
        where,
        kind,
    )


def _is_empty(path: Path, where: str) -> bool:
    """True if a file has nothing in it; a pointer in the place of the rows is refused."""
    with path.open("rb") as file:
        beginning = file.read(len(_POINTER))
    if beginning == _POINTER:
        raise UserError(
            f"{where}: the file is a pointer of Git LFS and not the rows; fetch them with "
            "'git lfs pull' in its clone"
        )
    return not beginning


def saved_table(folder: Path, where: str, *, split: str | None, key: str) -> tuple[Table, str]:
    """A folder that ``datasets`` saved as a table, and the name of its split.

    Raises:
        UserError: If it cannot be read, or has no such split.
    """
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    # The library raises what its files raise; none of it is our own.
    except Exception as error:
        raise _failed(where, "a saved data set", error) from error
    if isinstance(found, dict):
        if split is None and len(found) == 1:
            split = next(iter(found))
        if split is None or split not in found:
            shown = "null" if split is None else printable(split)
            raise UserError(
                f"{key}_split={shown}: {where} has {list_names(found)}; name one of them"
            )
        return dataset_table(found[split], where), split
    if split not in (None, "train"):
        raise UserError(
            f"{key}_split={printable(str(split))}: {where} is one saved data set, without splits; "
            "name the folder of the rows"
        )
    return dataset_table(found, where), ""


def hub_table(
    name: str, *, split: str | None, subset: str | None, revision: str | None, key: str
) -> tuple[Table, str]:
    """A data set of the hub as a table, and the name of its split.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    import datasets

    where = f"{key}={name}"
    if not sys.stderr.isatty():
        # Its bars, which it draws in files too.
        datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(name, name=subset, split=split, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{where}: no such file, and the hub has no data set of that name or does not show it "
            f"without a login: {first_line(error)}; name a local file in {key}="
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"{where}: no such file, and as a data set of the hub it is not in the local cache and "
            f"there is no network; name a local file in {key}="
        ) from error
    # The library raises what its scripts, files and network raise; none of it is our own.
    except Exception as error:
        raise UserError(
            f"{where}: the data set cannot be loaded: {first_line(error)}; look at {key}_split="
            f"{_or_null(split)}, data.subset={_or_null(subset)} and "
            f"data.revision={_or_null(revision)}, or name a local file in {key}="
        ) from error
    if isinstance(found, dict):
        if len(found) != 1:
            raise UserError(f"{key}_split=null: {name} has {list_names(found)}; name one of them")
        [(split, found)] = found.items()
    return dataset_table(found, where), str(split)


def dataset_table(dataset: Any, where: str) -> Table:
    """A data set of the library ``datasets`` as a table."""

    def batches(names: Sequence[str]) -> Iterator[Any]:
        some = list(names) or dataset.column_names[:1]
        table = dataset.select_columns(some).with_format("arrow")
        for part in table.iter(batch_size=_BATCH_ROWS):
            yield from part.to_batches()

    return Table(dataset.features.arrow_schema, batches, where, "a table")


def _table_rows(batch: Any, first: int) -> Iterator[Record]:
    """The rows of an Arrow record batch, numbered from ``first``."""
    marks = _marks(batch)
    light = batch.select([n for n in batch.schema.names if n not in marks]) if marks else batch

    def rows(part: Any, start: int) -> Iterator[Record]:
        for offset, row in enumerate(part.to_pylist(), start):
            for name, there in marks.items():
                row[name] = NOT_READ if there[offset] else None
            yield Record(first + offset, row)

    try:
        if light.num_columns:
            yield from list(rows(light, 0))
        else:
            for offset in range(batch.num_rows):
                shown = {name: NOT_READ if m[offset] else None for name, m in marks.items()}
                yield Record(first + offset, shown)
    except (UnicodeDecodeError, OverflowError, ValueError):
        # One value cannot be turned into Python's; find out whose, and keep the other rows.
        for offset in range(batch.num_rows):
            number = first + offset
            try:
                yield from list(rows(light.slice(offset, 1), offset))
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                yield Record(number, None, None, f"not UTF-8: byte 0x{byte:02x} in a text")
            except (OverflowError, ValueError) as error:
                yield Record(number, None, None, f"a value out of range: {first_line(error)}")


def _marks(batch: Any) -> dict[str, list[bool]]:
    """For columns that are dear to read: which rows have something there."""
    import pyarrow.compute as pc
    import pyarrow.types as types

    marks = {}
    for name in batch.schema.names:
        kind = batch.schema.field(name).type
        if not is_heavy(name) or not (types.is_nested(kind) or types.is_binary(kind)):
            continue
        column = batch.column(name)
        there = column.is_valid().to_pylist()
        if types.is_list(kind) or types.is_large_list(kind):
            lengths = pc.list_value_length(column).to_pylist()
            there = [bool(length) for length in lengths]
        marks[name] = there
    return marks


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__


def _or_null(value: str | None) -> str:
    return "null" if value is None else value
