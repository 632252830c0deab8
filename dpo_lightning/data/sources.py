"""Sources of rows: local jsonl, json and parquet files, and data sets of the hub.

A source yields raw records, good and bad, with their place. A file as a whole that cannot be read
is a :class:`UserError`; what is inside a single line is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from dpo_lightning.data.source_names import FILE_SUFFIXES, ROW_SUFFIXES, is_hub_id
from dpo_lightning.data.texts import describe, list_names, printable
from dpo_lightning.errors import UserError

_BOM = b"\xef\xbb\xbf"
_BATCH_ROWS = 1024


class Record(NamedTuple):
    """One record of a source.

    Attributes:
        number: Its line; where there are no lines, its place, from 1.
        value: Its content; None when it could not be read.
        raw: The line as read; None when the source has no lines.
        problem: Reason why it could not be read, or None.
    """

    number: int
    value: object
    raw: str | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """An opened source.

    Attributes:
        label: Text before the number of a record: ``path`` or ``id[split]``.
        columns: The columns of a table; None when every record names its own.
        read: Yields the records. It is given the columns to look at: a table may have others,
            images say, that are expensive to read.
        notes: Lines to say once.
    """

    label: str
    columns: Sequence[str] | None
    read: Callable[[Collection[str]], Iterator[Record]]
    notes: Sequence[str] = ()


def open_source(
    source: str, *, split: str | None, subset: str | None, revision: str | None, key: str
) -> Source:
    """Opens a local file or a data set of the hub.

    A string names a data set when there is no such path, it looks like an id, and it has no suffix
    of a data file.

    Args:
        source: A path or an id.
        split: Split of the data set; may be None when it has only one.
        subset: Configuration of the data set.
        revision: Commit, tag or branch of the data set.
        key: The configuration key that ``source`` is the value of, for errors.

    Raises:
        UserError: If there is no such source or it cannot be read.
    """
    where = f"{key}={printable(source)}"
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        # Among others: no permission, no such user's home, a name that no file can have.
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{where}: no such file ({reason})") from error
    suffix = path.suffix.lower()
    if not source.strip():
        raise UserError(f"{where}: empty; name a file ({_any_of(ROW_SUFFIXES)}) or a data set")
    if not exists:
        if is_hub_id(source) and suffix not in FILE_SUFFIXES:
            return _hub(source, split=split, subset=subset, revision=revision, key=key)
        raise UserError(f"{where}: no such file{_hint(path, key)}")
    if path.is_dir():
        inside = _data_files(path)
        hint = f"name a file in it: {list_names(inside)}" if inside else "name a file"
        raise UserError(f"{where}: is a directory; {hint}")
    if suffix not in ROW_SUFFIXES:
        found = f"suffix {suffix}" if suffix else "a name without a suffix"
        raise UserError(f"{where}: {found}, expected {_any_of(ROW_SUFFIXES)}")
    notes = [
        f"data.{name}={value} is for data sets of the hub; {where} is a file and does not use it"
        for name, value in (("subset", subset), ("revision", revision))
        if value is not None
    ]
    if suffix == ".jsonl":
        return Source(source, None, lambda _: _read_jsonl(path), notes)
    if suffix == ".json":
        return Source(source, None, lambda _: _read_json(path, where), notes)
    return _parquet(source, path, where, notes)


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield _json_line(number, line.rstrip(b"\r\n"))


def _json_line(number: int, line: bytes) -> Record:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{line[error.start]:02x} at byte {error.start + 1}"
        return Record(number, None, line.decode(errors="backslashreplace"), problem)
    try:
        return Record(number, json.loads(text), text)
    except json.JSONDecodeError as error:
        problem = f"invalid JSON at column {error.colno}: {error.msg}"
    except RecursionError:
        problem = "invalid JSON: nested too deeply"
    except ValueError:
        # Python refuses to read integers of thousands of digits.
        problem = "invalid JSON: a number of too many digits"
    return Record(number, None, text, problem)


def _read_json(path: Path, where: str) -> Iterator[Record]:
    content = path.read_bytes().removeprefix(_BOM)
    try:
        rows = json.loads(content.decode()) if content.strip() else []
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{content[error.start]:02x} in line {line}"
        raise UserError(f"{where}: not UTF-8: {found}; save it as UTF-8") from error
    except json.JSONDecodeError as error:
        hint = "; a file of one object a line is a .jsonl" if error.msg == "Extra data" else ""
        place = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{where}: invalid JSON at {place}: {error.msg}{hint}") from error
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number too long"
        raise UserError(f"{where}: invalid JSON: {reason}") from error
    if not isinstance(rows, list):
        raise UserError(f"{where}: the top level is {describe(rows)}, expected a list of rows")
    for number, row in enumerate(rows, 1):
        yield Record(number, row)


def _parquet(source: str, path: Path, where: str, notes: Sequence[str]) -> Source:
    import pyarrow.parquet

    def failed(error: Exception) -> UserError:
        return UserError(f"{where}: not readable as parquet: {_first_line(error)}")

    def read(wanted: Collection[str]) -> Iterator[Record]:
        number = 1
        try:
            columns = [name for name in names if name in wanted]
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=columns):
                yield from _table_rows(batch, number)
                number += batch.num_rows
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise failed(error) from error

    if not path.stat().st_size:
        return Source(source, (), lambda _: iter(()), notes)
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names: list[str] = list(file.schema_arrow.names)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise failed(error) from error
    return Source(source, names, read, notes)


def _hub(
    name: str, *, split: str | None, subset: str | None, revision: str | None, key: str
) -> Source:
    import datasets
    import pyarrow

    where = f"{key}={name}"
    try:
        found = datasets.load_dataset(name, name=subset, split=split, revision=revision)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"{where}: no such file, and the hub has no data set of that name or does not show it "
            f"without a login: {_first_line(error)}; name a local file in {key}="
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"{where}: no such file, and as a data set of the hub it is not in the local cache and "
            f"there is no network; name a local file in {key}="
        ) from error
    # The library raises what its scripts, files and network raise; none of it is our own.
    except Exception as error:
        raise UserError(
            f"{where}: the data set cannot be loaded: {_first_line(error)}; look at {key}_split="
            f"{_or_null(split)}, data.subset={_or_null(subset)} and "
            f"data.revision={_or_null(revision)}, or name a local file in {key}="
        ) from error
    if isinstance(found, dict):
        if len(found) != 1:
            raise UserError(f"{key}_split=null: {name} has {list_names(found)}; name one of them")
        [(split, found)] = found.items()
    dataset: Any = found

    def read(wanted: Collection[str]) -> Iterator[Record]:
        columns = [column for column in dataset.column_names if column in wanted]
        table = dataset.select_columns(columns or dataset.column_names[:1]).with_format("arrow")
        number = 1
        try:
            for part in table.iter(batch_size=_BATCH_ROWS):
                for batch in part.to_batches():
                    yield from _table_rows(batch, number)
                    number += batch.num_rows
        except (pyarrow.ArrowException, ValueError) as error:
            raise UserError(f"{where}: not readable as a table: {_first_line(error)}") from error

    return Source(f"{name}[{split}]", list(dataset.column_names), read)


def _table_rows(batch: Any, first: int) -> Iterator[Record]:
    """The rows of an Arrow record batch, numbered from ``first``."""
    try:
        for number, row in enumerate(batch.to_pylist(), first):
            yield Record(number, row)
    except (UnicodeDecodeError, OverflowError, ValueError):
        # One value cannot be turned into Python's; find out whose, and keep the other rows.
        for offset in range(batch.num_rows):
            number = first + offset
            try:
                yield Record(number, batch.slice(offset, 1).to_pylist()[0])
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                yield Record(number, None, None, f"not UTF-8: byte 0x{byte:02x} in a text")
            except (OverflowError, ValueError) as error:
                yield Record(number, None, None, f"a value out of range: {_first_line(error)}")


def _hint(path: Path, key: str) -> str:
    """Returns a hint at the path that was meant, for one that does not exist."""
    here = "" if path.is_absolute() else f" (here is {Path.cwd()})"
    if not path.parent.is_dir():
        return f"; there is no directory {printable(str(path.parent))} either{here}"
    near = get_close_matches(path.name, _data_files(path.parent), n=1, cutoff=0.8)
    if near:
        return f"; did you mean {printable(str(path.with_name(near[0])))}?"
    return f"{here}; name a file ({_any_of(ROW_SUFFIXES)}) in {key}="


def _data_files(folder: Path) -> list[str]:
    try:
        return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in ROW_SUFFIXES)
    except OSError:
        return []


def _any_of(choices: Sequence[str]) -> str:
    return f"{', '.join(choices[:-1])} or {choices[-1]}"


def _or_null(value: str | None) -> str:
    return "null" if value is None else value


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return printable(lines[0]) if lines else type(error).__name__
