"""Records of files of text: JSON, a line or a file at a time, and tables of cells."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from dpo_lightning.data.source_names import row_suffix
from dpo_lightning.data.texts import describe, show
from dpo_lightning.errors import UserError

LONGEST_LINE = 64 << 20
"""Bytes of a line; a longer one is no row that a model could be given."""

_MOST_WHOLE = 256 << 20
_MOST_GROWTH = 200
_FREE_GROWTH = 256 << 20
_BOM = codecs.BOM_UTF8
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_POINTER = b"version https://git-lfs"


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


class _Twice(ValueError):
    """An object has a key two times, so that one of the values would be lost."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _Twice(f"the key {show(twice)} is there twice in one object")
    return found


class _Grown(OSError):
    """A compressed file holds more than a file of rows can."""


class _Bounded(io.RawIOBase):
    """Bytes of a compressed file, up to a limit."""

    def __init__(self, inner: Any, limit: int) -> None:
        self._inner = inner
        self._left = limit

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._inner.read(len(buffer))
        self._left -= len(data)
        if self._left < 0:
            raise _Grown
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._inner.close()
        super().close()


def _open(path: Path) -> BinaryIO:
    """A file for reading, unpacked on the way."""
    packed = row_suffix(path.name)[1]
    if not packed:
        return path.open("rb")
    inner: Any
    if packed == ".zst":
        import pyarrow

        inner = pyarrow.input_stream(str(path), compression="zstd")
    else:
        modules: dict[str, Any] = {".gz": gzip, ".bz2": bz2, ".xz": lzma}
        inner = modules[packed].open(path, "rb")
    limit = _FREE_GROWTH + _MOST_GROWTH * path.stat().st_size
    return cast(BinaryIO, io.BufferedReader(_Bounded(inner, limit), 1 << 20))


def check_start(path: Path, where: str) -> None:
    """Looks at the first bytes of a file of text.

    Raises:
        UserError: If it is in another encoding, or stands for a file that is not here.
    """
    with failures(path, where), _open(path) as file:
        start = file.read(64)
    if start.startswith(_POINTER):
        raise UserError(
            f"{where}: the file is a pointer of Git LFS and not the rows; fetch them with "
            "'git lfs pull' in its clone"
        )
    encoding = next((name for mark, name in _MARKS if start.startswith(mark)), "")
    if not encoding and len(start) > 3 and start.count(0) >= len(start) // 3:
        encoding = "UTF-16LE" if start[1:2] == b"\0" else "UTF-16BE"
    if encoding:
        name = show(path.name)[1:-1]
        raise UserError(
            f"{where}: the file is {encoding}, expected UTF-8; rewrite it with "
            f"'iconv -f {encoding} -t UTF-8 {name} > utf8-{name}'"
        )


class failures:
    """Context that puts what a file's reading raises into one line."""

    def __init__(self, path: Path, where: str) -> None:
        self._path = path
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        packed = row_suffix(self._path.name)[1]
        if isinstance(error, _Grown):
            raise UserError(
                f"{self._where}: its content is more than {_MOST_GROWTH} times its size, which "
                "no file of rows is; unpack it and look at it"
            ) from error
        if packed and isinstance(error, OSError | EOFError | zlib.error | lzma.LZMAError):
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{self._where}: not readable as {packed}: {reason}; the file is damaged or cut off"
            ) from error


def read_jsonl(path: Path, where: str) -> Iterator[Record]:
    """The rows of a file of JSON lines; one list, or objects over many lines, are read too."""
    check_start(path, where)
    whole = _whole_content(path, where)
    if whole is not None:
        yield from whole
        return
    with failures(path, where), _open(path) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            line = line.removeprefix(_BOM) if number == 1 else line
            if len(line) > LONGEST_LINE:
                while line and not line.endswith(b"\n"):
                    line = file.readline(1 << 20)
                yield Record(number, None, "", f"a line of more than {LONGEST_LINE >> 20} MiB")
            elif line.strip():
                yield _json_line(number, line.rstrip(b"\r\n"))


def _whole_content(path: Path, where: str) -> Iterator[Record] | None:
    """The rows of a file that is JSON, but not a line at a time; None if it is lines."""
    with failures(path, where), _open(path) as file:
        first = b""
        while not first.strip():
            first = file.readline(LONGEST_LINE)
            first = first.removeprefix(_BOM)
            if not first:
                return None
        try:
            value = json.loads(first)
            is_lines = not isinstance(value, list) or not value or not isinstance(value[0], dict)
        except (ValueError, RecursionError):
            # A row over several lines opens on one of them, or a list does.
            is_lines = first.strip()[:1] not in (b"{", b"[")
        if is_lines or path.stat().st_size > _MOST_WHOLE:
            return None
        content = first + file.read(_MOST_WHOLE)
    try:
        rows = list(_values(content.decode()))
    except (ValueError, RecursionError):
        return None
    if len(rows) == 1 and isinstance(rows[0], list):
        rows = rows[0]
    return (Record(number, row) for number, row in enumerate(rows, 1))


def _values(text: str) -> Iterator[Any]:
    """The JSON values that stand one behind the other in a text."""
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    at = 0
    while True:
        while at < len(text) and text[at] in " \t\r\n":
            at += 1
        if at == len(text):
            return
        value, at = decoder.raw_decode(text, at)
        yield value


def _json_line(number: int, line: bytes) -> Record:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        return Record(number, None, line.decode(errors="backslashreplace"), _not_utf8(error, line))
    try:
        return Record(number, json.loads(text, object_pairs_hook=_object), text)
    except _Twice as error:
        problem = str(error)
    except json.JSONDecodeError as error:
        problem = f"invalid JSON at column {error.colno}: {error.msg}"
    except RecursionError:
        problem = "invalid JSON: nested too deeply"
    except ValueError:
        # Python refuses to read integers of thousands of digits.
        problem = "invalid JSON: a number of too many digits"
    return Record(number, None, text, problem)


def _not_utf8(error: UnicodeDecodeError, content: bytes) -> str:
    """The fault of bytes that are no UTF-8, and the encoding that would read them."""
    byte = content[error.start]
    read = bytes([byte]).decode("cp1252", errors="replace")
    as_other = f" (in Windows-1252 it is {read!r}: save the file as UTF-8)" if byte > 0x9F else ""
    return f"not UTF-8: byte 0x{byte:02x} at byte {error.start + 1}{as_other}"


def read_json(path: Path, where: str) -> Iterator[Record]:
    """The rows of a file that is one JSON list; JSON lines under that name are read too."""
    check_start(path, where)
    with failures(path, where), _open(path) as file:
        content = file.read().removeprefix(_BOM)
    try:
        text = content.decode()
        rows = json.loads(text, object_pairs_hook=_object) if text.strip() else []
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        start = content.rfind(b"\n", 0, error.start) + 1
        moved = UnicodeDecodeError("utf-8", b"", error.start - start, error.end, error.reason)
        raise UserError(f"{where}: line {line}: {_not_utf8(moved, content[start:])}") from error
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and content.lstrip()[:1] == b"{":
            yield from read_jsonl(path, where)
            return
        place = f"line {error.lineno} column {error.colno}"
        raise UserError(f"{where}: invalid JSON at {place}: {error.msg}") from error
    except _Twice as error:
        raise UserError(f"{where}: {error}; leave one out") from error
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number too long"
        raise UserError(f"{where}: invalid JSON: {reason}") from error
    if not isinstance(rows, list):
        raise UserError(f"{where}: the top level is {describe(rows)}, expected a list of rows")
    for number, row in enumerate(rows, 1):
        yield Record(number, row)


def csv_columns(path: Path, where: str) -> tuple[list[str], str]:
    """The names in the first line of a table of cells, and what separates them.

    Raises:
        UserError: If there are none, or a name stands there twice.
    """
    check_start(path, where)
    separator = "\t" if row_suffix(path.name)[0] == ".tsv" else ","
    for choice in (separator, ";", "\t"):
        names = next(_cells(path, where, choice), (0, []))[1]
        if len(names) > 1:
            break
    else:
        choice, names = separator, next(_cells(path, where, separator), (0, []))[1]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{where}: the column {show(twice[0])} is there twice; rename one")
    return names, choice


def _cells(path: Path, where: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The rows of cells, each with the line that it begins in."""
    with failures(path, where), _open(path) as file:
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        csv.field_size_limit(LONGEST_LINE)
        reader = csv.reader(lines, delimiter=separator, strict=True)
        line = 1
        try:
            for cells in reader:
                if cells:
                    yield line, cells
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{where}: line {line}: not readable as CSV: {error}") from error
        except UnicodeDecodeError as error:
            fault = _not_utf8(error, error.object)
            fault = fault.replace(f" at byte {error.start + 1}", "")
            raise UserError(f"{where}: after line {line}: {fault}") from error


def read_csv(path: Path, where: str, names: list[str], separator: str) -> Iterator[Record]:
    """The rows of a table of cells; numbers and lists are read out of their texts."""
    rows = _cells(path, where, separator)
    next(rows, None)
    for line, cells in rows:
        if len(cells) != len(names):
            problem = f"{len(cells)} cells, expected {len(names)}, one for each column"
            yield Record(line, None, separator.join(cells), problem)
        else:
            yield Record(line, dict(zip(names, cells, strict=True)))


def cell_value(cell: str) -> object:
    """The number, the list or the object that a cell spells; any other text as it is."""
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell
    return value if isinstance(value, int | float | list | dict) else cell
