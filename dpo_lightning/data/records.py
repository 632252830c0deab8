"""Preference rows of files and data sets, as groups; every bad row names its place and its fault.

Nothing here knows of tokens: :mod:`dpo_lightning.data.tokens` takes over from the text.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dpo_lightning.data.rows import (
    FIELDS,
    PreferenceGroup,
    RowReader,
    ShapeError,
    looks_like_sharegpt,
)
from dpo_lightning.data.sources import Record, open_source
from dpo_lightning.data.texts import Message, RowError, Text, describe, list_names, printable, show
from dpo_lightning.errors import UserError

__all__ = [
    "FORMATS",
    "BadRow",
    "Message",
    "PreferenceGroup",
    "Rows",
    "Text",
    "check_bad_rows",
    "read_rows",
    "write_quarantine",
]

FORMATS = ("auto", "rows", "sharegpt")

_INFERRED = {
    "dialogue": "no prompt column, so the prompt ends after the last 'Assistant:' in common",
    "string": "no prompt column, so the prompt is the beginning that the responses have in common",
    "messages": "no prompt column, so the prompt is the messages that the responses begin with",
    "repeated": "the responses repeat the messages of the prompt, which were taken off",
}


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


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a source, good and bad: ``total`` is ``len(groups) + len(bad)``.

    Attributes:
        groups: The good rows.
        bad: The others.
        total: Number of rows, blank lines not counted.
        notes: Lines to say once.
    """

    groups: list[PreferenceGroup]
    bad: list[BadRow]
    total: int
    notes: list[str]


def read_rows(
    source: str,
    *,
    format: str,
    columns: Mapping[str, str],
    split: str | None,
    subset: str | None,
    revision: str | None,
    key: str = "data.train",
) -> Rows:
    """Reads all preference rows of a local file or a data set of the hub.

    Places are counted from 1: lines of a jsonl, elements of a json, rows of a table.

    Args:
        source: A path to a jsonl, json or parquet file, or the id of a data set.
        format: ``auto`` and ``rows`` read rows of texts and messages, ``sharegpt`` reads
            ``conversations`` of ``{"from", "value"}``; ``auto`` names it when it is needed.
        columns: Field names to the names of the columns that hold them; an empty name hides a
            column that happens to have the name of a field.
        split: Split of the data set.
        subset: Configuration of the data set.
        revision: Commit, tag or branch of the data set.
        key: The configuration key that ``source`` is the value of, for errors.

    Raises:
        UserError: If the source as a whole cannot be used. A bad row raises nothing.
    """
    where = f"{key}={printable(source)}"
    _check_settings(format, columns)
    opened = open_source(source, split=split, subset=subset, revision=revision, key=key)
    table = opened.columns is not None
    reader = RowReader(sharegpt=format == "sharegpt", columns=columns, null_is_absent=table)
    groups: list[PreferenceGroup] = []
    bad: list[BadRow] = []
    shapes = _Shapes(columns, opened.columns)
    try:
        for record in opened.read(reader.wanted):
            place = f"{printable(opened.label)}:{record.number}"
            try:
                row = _mapping(record)
                shapes.add(row)
                if shapes.rows == 1 and format == "auto" and looks_like_sharegpt(row, columns):
                    raise UserError(
                        f"{where}: conversations of 'from' and 'value'; set data.format=sharegpt"
                    )
                groups.append(reader.read(row, place))
            except RowError as error:
                bad.append(BadRow(place, printable(error.field), error.problem, _raw(record)))
                if isinstance(error, ShapeError):
                    shapes.wrong[error.field, error.reason] += 1
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror or error}") from error
    if not groups and not bad:
        raise UserError(f"{where}: no rows, the file or the split is empty")
    shapes.check(where, sharegpt=format == "sharegpt")
    notes = [*opened.notes, *_notes(where, reader, len(groups))]
    return Rows(groups, bad, len(groups) + len(bad), notes)


def _mapping(record: Record) -> dict[str, Any]:
    """The fields of a row.

    Raises:
        RowError: If it has none.
    """
    if record.problem is not None:
        raise RowError("row", record.problem)
    if not isinstance(record.value, dict):
        raise RowError("row", f"{describe(record.value)}, expected an object")
    return record.value


def check_bad_rows(rows: Rows, *, on_bad_row: str, limit: int = 20) -> None:
    """Stops at bad rows, unless they are to be skipped.

    Args:
        rows: The rows that were read.
        on_bad_row: ``stop`` or ``skip``.
        limit: Number of bad rows that the message names.

    Raises:
        UserError: If there is a bad row and ``on_bad_row`` is ``stop``.
    """
    if on_bad_row != "stop" or not rows.bad:
        return
    lines = [f"{bad.source}: {bad.field}: {bad.problem}" for bad in rows.bad[:limit]]
    if len(rows.bad) > limit:
        lines.append(f"and {len(rows.bad) - limit} more")
    raise UserError(
        f"{'; '.join(lines)}; {_count(len(rows.bad), 'bad row')} of {rows.total}, "
        "data.on_bad_row=skip skips them (kept in quarantine.jsonl)"
    )


def write_quarantine(path: Path, bad: Iterable[BadRow]) -> None:
    """Writes bad rows as JSON, one object of ``source``, ``field``, ``problem``, ``row`` a line."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in bad)


class _Shapes:
    """Columns of all rows: a fault of every row is a fault of the settings.

    Attributes:
        rows: Number of rows that are objects.
        wrong: Number of rows by field and reason for which they have not the columns needed.
    """

    def __init__(self, columns: Mapping[str, str], found: Sequence[str] | None) -> None:
        self.rows = 0
        self.wrong: Counter[tuple[str, str]] = Counter()
        self._found = dict.fromkeys(found or ())
        # In a table only the columns that are looked at are read.
        self._collect = found is None
        self._columns = columns
        self._unseen = {column for column in columns.values() if column} - set(self._found)

    def add(self, row: Mapping[str, object]) -> None:
        """Takes note of the columns of a row."""
        self.rows += 1
        self._unseen.difference_update(row)
        if self._collect:
            self._found.update(dict.fromkeys(row))
            # For a message the first rows will do; keys need not be columns, there can be many.
            self._collect = self.rows < 100

    def check(self, where: str, *, sharegpt: bool) -> None:
        """Raises a UserError if no row can be right."""
        if not self.rows:
            return
        found = list_names(self._found)
        for field, column in self._columns.items():
            if column in self._unseen:
                near = get_close_matches(column, self._found, n=1)
                hint = f", did you mean {show(near[0])}?" if near else ""
                raise UserError(
                    f"data.columns={{{field}: {printable(column)}}}: no row of {where} has this "
                    f"column{hint}; found {found}"
                )
        if self.wrong.total() == self.rows:
            [((field, reason), _)] = self.wrong.most_common(1)
            expected = (
                "conversations, chosen, rejected; or read rows of another form with data.format="
                if sharegpt
                else "prompt, chosen, rejected; or prompt, responses (best first, or with ranks or "
                "scores)"
            )
            raise UserError(
                f"{where}: the columns of every row are wrong: {show(field)} is {reason}; "
                f"found {found}; expected {expected}; map other names, as in "
                "'data.columns={prompt: question, chosen: better, rejected: worse}'"
            )


def _check_settings(format: str, columns: Mapping[str, str]) -> None:
    if format not in FORMATS:
        raise UserError(f"data.format={format}: expected one of {', '.join(FORMATS)}")
    for field, column in columns.items():
        if field not in FIELDS:
            near = get_close_matches(str(field), FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(FIELDS)}"
            raise UserError(
                f"data.columns={{{printable(str(field))}: {printable(str(column))}}}: "
                f"{show(field)} is not a field of a row, {hint}"
            )
    other, remedy = "conversations", "set data.format=sharegpt"
    if format == "sharegpt":
        other, remedy = "prompt", "the prompt there is conversations"
    if columns.get(other):
        raise UserError(
            f"data.columns={{{other}: {printable(columns[other])}}}: no field of "
            f"data.format={format}; {remedy}"
        )
    taken = Counter(column for column in columns.values() if column)
    for column, times in taken.items():
        if times > 1:
            fields = [field for field in columns if columns[field] == column]
            raise UserError(
                f"data.columns: {' and '.join(fields)} are both {show(column)}; each field has a "
                "column of its own"
            )


def _notes(where: str, reader: RowReader, good: int) -> list[str]:
    notes = [
        f"{where}: {_INFERRED[kind]} ({_count(count, 'row')})"
        for kind, count in reader.inferred.items()
        if kind in _INFERRED
    ]
    if good and reader.inferred["begins_with_prompt"] == good:
        notes.append(
            f"{where}: every response begins with the text of its prompt, which was left there; if "
            "it is a repetition, hide the prompt with 'data.columns={prompt: \"\"}'"
        )
    return notes


def _raw(record: Record) -> str:
    """The record as it was read, or as JSON if it came without a line."""
    if record.raw is not None:
        return record.raw
    text = json.dumps(record.value, ensure_ascii=False, default=str)
    # One half of a surrogate pair has no UTF-8; its backslash form is JSON's own.
    return text.encode(errors="backslashreplace").decode()


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
