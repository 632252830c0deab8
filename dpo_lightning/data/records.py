"""Preference rows of files and data sets, as groups; every bad row names its place and its fault.

Nothing here knows of tokens: :mod:`dpo_lightning.data.tokens` takes over from the text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

from dpo_lightning.data.bad_rows import BadRow, check_bad_rows, count_of, write_quarantine
from dpo_lightning.data.fields import FieldAccount, UnusedField
from dpo_lightning.data.forms import FORM, NAMES, Form, form_of, may_lack_label
from dpo_lightning.data.labels import LabelReader
from dpo_lightning.data.record_files import Record, cell_value
from dpo_lightning.data.rows import PreferenceGroup, RowReader, ShapeError, Unrated, turned
from dpo_lightning.data.shapes import Shapes, check_settings
from dpo_lightning.data.source_names import Entry, entries, source_label
from dpo_lightning.data.sources import Source, open_sources
from dpo_lightning.data.texts import Message, RowError, Text, describe, printable, show
from dpo_lightning.data.thumbs import ROW_LABELS, rated_answers
from dpo_lightning.errors import UserError
from dpo_lightning.plugins import READERS

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

FORMATS = NAMES
"""Values of ``data.format`` that are there without a plugin."""

_SAID = {
    "dialogue": "no prompt column, so the prompt ends after the last 'Assistant:' in common",
    "string": "no prompt column, so the prompt is the beginning that the responses have in common",
    "messages": "no prompt column, so the prompt is the messages that the responses begin with",
    "repeated": "the responses repeat the messages of the prompt, which were taken off",
    "json": "messages were written as text, and were read out of it",
    "parts": "contents were lists of text parts, which were joined",
    "function_call": "function calls were written as tool calls",
    "turns": "beside a system message or tools, prompt and responses were read as turns of user "
    "and assistant",
    "weight": "the column 'weight' weighs rows in the loss; 'data.columns={weight: \"\"}' leaves "
    "it out",
}


_LOOKED_AT = 100
"""Rows of a file in which a column is looked for that the first row lacks."""

_NOUNS = {"json": "text", "parts": "message", "function_call": "message"}


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a source, good and bad: ``total`` is ``len(groups) + len(bad)``.

    Attributes:
        groups: The good rows.
        bad: The others.
        total: Number of rows, blank lines not counted.
        notes: Lines to say once.
        ignored: Names of ``data.ignore_fields`` that a row had.
        fields: Names that could be there.
        unread: Names of fields that were not read, and are named in the notes.
        unrated: Answers without a label beside those with one; no rows of ``total``.
        by_threshold: Labels that were compared with ``data.threshold``.
    """

    groups: list[PreferenceGroup]
    bad: list[BadRow]
    total: int
    notes: list[str]
    ignored: frozenset[str] = frozenset()
    fields: frozenset[str] = field(default=frozenset(), repr=False)
    unread: frozenset[str] = frozenset()
    unrated: int = 0
    by_threshold: int = 0


def read_rows(
    source: object,
    *,
    format: str,
    columns: Mapping[str, Any],
    split: str | None,
    subset: str | None,
    revision: str | None,
    key: str = "data.train",
    ignore: Collection[str] = (),
    threshold: float | None = None,
) -> Rows:
    """Reads all preference rows of local files or data sets of the hub.

    Places are counted from 1: lines of a jsonl, elements of a json, rows of a table.

    Args:
        source: A path to a file or a folder, a pattern, or the id of a data set; or a list of
            these, each by itself or as ``{path, weight}``.
        format: ``auto`` recognises the form of the rows, every other name is a form's: ``rows``
            is the project's own, the others are public ones or a plugin's.
        columns: Field names to the names of the columns that hold them; an empty name hides a
            column that happens to have the name of a field.
        split: Split of the data set.
        subset: Configuration of the data set.
        revision: Commit, tag or branch of the data set.
        key: The configuration key that ``source`` is the value of, for errors.
        ignore: Columns, and keys of messages as ``messages.<key>``, that nobody wants.
        threshold: Least number of a label that is desirable; None where labels say it themselves.

    Raises:
        UserError: If the source as a whole cannot be used. A bad row raises nothing.
    """
    check_settings(format, columns)
    account = FieldAccount(ignore)
    where = f"{key}={printable(source_label(source))}"
    try:
        listed = entries(source)
    except ValueError as error:
        raise UserError(f"{where}: {error}, expected a name, or a list of names") from error
    reading = _Reading(format, columns, account, threshold)
    options = {"split": split, "subset": subset, "revision": revision, "key": key}
    for entry in listed:
        reading.read_entry(entry, options)
    groups, bad = reading.groups, reading.bad
    if reading.unrated:
        are = "is" if reading.unrated == 1 else "are"
        count = count_of(reading.unrated, "answer")
        reading.notes.append(f"{where}: {count} without a rating {are} left out")
    return Rows(
        groups,
        bad,
        len(groups) + len(bad),
        [*reading.notes, *_notes(where, account, len(groups))],
        ignored=frozenset(account.met),
        fields=frozenset(reading.fields | set(account.unread)),
        unread=frozenset({*account.unread, *account.told}),
        unrated=reading.unrated,
        by_threshold=reading.by_threshold,
    )


_Derive = Callable[[dict[str, Any]], list[tuple[str, dict[str, Any]]]]


def _whole(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The row itself, whose place is that of its record."""
    return [("", row)]


class _Reading:
    """Rows that were read so far, out of one source after the other."""

    def __init__(
        self,
        format: str,
        columns: Mapping[str, Any],
        account: FieldAccount,
        threshold: float | None,
    ) -> None:
        self.groups: list[PreferenceGroup] = []
        self.bad: list[BadRow] = []
        self.notes: list[str] = []
        self.fields: set[str] = set()
        self.unrated = 0
        self.by_threshold = 0
        self._format = format
        self._columns = columns
        self._account = account
        self._threshold = threshold

    def read_entry(self, entry: Entry, options: Mapping[str, Any]) -> None:
        """Reads what one name stands for; the options are those of :func:`open_sources`."""
        where = f"{options['key']}={printable(entry.path)}"
        opened, notes = open_sources(entry.path, **options)
        self.notes += notes
        before, unrated = (len(self.groups), len(self.bad)), self.unrated
        for source in opened:
            self.read(source)
        if (len(self.groups), len(self.bad)) == before:
            if self.unrated == unrated:
                raise UserError(f"{where}: no rows, the file or the split is empty")
            raise UserError(
                f"{where}: none of {count_of(self.unrated - unrated, 'answer')} is rated; a rating "
                "is a column 'label', or 'label', 'rating' or 'feedback' in a turn of the "
                "assistant; 'data.columns={label: <column>}' maps another column"
            )
        if entry.weight < 1:
            self._take_share(entry, before[0], where)

    def read(self, source: Source) -> None:
        """Reads one file, or one data set."""
        shapes = Shapes(self._columns, source.columns)
        texts: list[int] = []
        turns = self._account.said["turns"]
        labels = LabelReader(self._threshold)
        try:
            records, reader, form, derive = self._prepared(source, labels)
            shapes.form = form
            for record in records:
                place = f"{printable(source.label)}:{record.number}"
                try:
                    row = _mapping(record)
                    shapes.add(row)
                    made = derive(row)
                except RowError as error:
                    self._set_aside(record, place, error, shapes)
                    continue
                for behind, one in made:
                    try:
                        self.groups.append(reader.read(one, place + behind))
                    except Unrated:
                        self.unrated += 1
                    except RowError as error:
                        self._set_aside(record, place + behind, error, shapes)
                    else:
                        if reader.was_text:
                            texts.append(len(self.groups) - 1)
        except OSError as error:
            raise UserError(f"{source.where}: cannot be read: {error.strerror or error}") from error
        shapes.check(source.where)
        labels.check()
        self.by_threshold += labels.by_threshold
        self.fields |= set(shapes.found)
        if self._account.said["turns"] > turns:
            # Of one file all rows have one form, those without a system message too.
            for index in texts:
                self.groups[index] = turned(self.groups[index])
        self._count_unread(source, reader)

    def _set_aside(self, record: Record, place: str, error: RowError, shapes: Shapes) -> None:
        self.bad.append(BadRow(place, printable(error.field), error.problem, _raw(record)))
        if isinstance(error, ShapeError):
            shapes.wrong[error.field, error.reason, error.remedy] += 1
        if isinstance(error, UnusedField):
            shapes.unused.setdefault((error.name, error.remedy), []).append(place)

    def _prepared(
        self, source: Source, labels: LabelReader
    ) -> tuple[Iterator[Record], RowReader, Form | None, _Derive]:
        """The records of a source, with what reads them."""
        first: list[Record] = []
        records: Iterator[Record] | None = None
        names: Collection[str] = source.columns or ()
        if source.columns is None:
            records = source.read(())
            names = self._first_names(records, first)
        form = self._form(source, names, first)
        columns = {**(form.columns if form else {}), **self._columns}
        columns = {k: v for k, v in columns.items() if k != "conversations"}
        if form is not None and form.conversation:
            # The user's name is that of a column of the row, out of which the label is taken.
            columns["label"] = form.columns["label"]
        plugin = self._format in READERS
        reader = RowReader(
            columns={"response": "response", **columns} if plugin else columns,
            null_is_absent=source.columns is not None,
            account=self._account,
            reads=self._reads(form),
            labels=labels,
            any_form=plugin,
        )
        if form is not None and form.about and self._format == "auto":
            self.notes.append(f"{source.where}: read as data.format={form.name}: {form.about}")
        derive = self._derive(form, source, columns)
        if records is None:
            assert source.columns is not None
            wanted = reader.wanted(source.columns)
            records = source.read(list(source.columns) if plugin else wanted)
        return chain(first, records), reader, form, derive

    def _first_names(self, records: Iterator[Record], first: list[Record]) -> Collection[str]:
        """The columns of the first row; ``first`` takes the records that were read for it."""
        names: Collection[str] = ()
        for record in records:
            first.append(record)
            if isinstance(record.value, dict):
                names = record.value
                break
        if may_lack_label(names):
            # An answer that nobody rated may have no label at all.
            for record in islice(records, _LOOKED_AT):
                first.append(record)
                if isinstance(record.value, dict) and "label" in record.value:
                    return {**record.value, **dict.fromkeys(names)}
        return names

    def _form(self, source: Source, names: Collection[str], first: Sequence[Record]) -> Form | None:
        """The form of a source's rows; None for the project's own."""
        form = FORM.get(self._format)
        if self._format in ("auto", "rows"):
            values = [record.value for record in first if isinstance(record.value, dict)]
            form = form_of(names, self._columns, values[0] if values else None)
            if self._format == "rows" and form is not FORM["unpaired"]:
                form = None
        if form is not None and form.refusal:
            raise UserError(f"{source.where}: {form.refusal}")
        return form

    def _reads(self, form: Form | None) -> Sequence[str]:
        """Columns that the form uses beside those that it maps."""
        if form is None:
            return ()
        return (*form.reads, *self._row_labels()) if form.conversation else tuple(form.reads)

    def _row_labels(self) -> tuple[str, ...]:
        """Columns that may rate the last answer of a conversation."""
        mapped = self._columns.get("label")
        if mapped is None:
            return ROW_LABELS
        return (mapped,) if mapped else ()

    def _derive(self, form: Form | None, source: Source, columns: Mapping[str, Any]) -> _Derive:
        """The change of a record's row into those that are read, each with its place in it."""
        steps: list[Any] = []
        if source.cells:
            numbers = _number_columns(columns) | set(self._reads(form))
            steps.append(lambda row: _with_values(row, numbers))
        if form is not None and form.derive is not None:
            change = form.derive
            steps.append(lambda row: change(row, self._account))
        if self._format in READERS:
            steps.append(lambda row: _by_plugin(self._format, row, self._account))
        parts: _Derive = _whole
        if form is not None and form.conversation:
            parts = partial(
                rated_answers,
                account=self._account,
                conversation=form.conversation,
                labels=self._row_labels(),
            )

        def derive(row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
            try:
                for step in steps:
                    row = step(row)
                return parts(row)
            except RecursionError:
                raise RowError("row", "nested too deeply") from None

        return derive

    def _count_unread(self, source: Source, reader: RowReader) -> None:
        """The columns of a table that were not read at all."""
        if source.columns is None or self._format in READERS:
            return
        read = set(reader.wanted(source.columns))
        for name in source.columns:
            if name not in read and not self._account.ignores(name):
                self._account.unread[name] += 1

    def _take_share(self, entry: Entry, start: int, where: str) -> None:
        """Leaves a share of the last rows, chosen by their places alone."""
        rows = self.groups[start:]
        count = max(1, round(entry.weight * len(rows)))
        order = sorted(range(len(rows)), key=lambda at: hashlib.blake2b(b"%d" % at).digest())
        kept = sorted(order[:count])
        self.groups[start:] = [rows[at] for at in kept]
        self.notes.append(
            f"{where}: {count} of {len(rows)} rows are taken (weight {entry.weight:g})"
        )


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


def _number_columns(columns: Mapping[str, Any]) -> set[str]:
    found: set[str] = set()
    for name in ("ranks", "scores", "responses", "weight", "target_margin", "better", "label"):
        column = columns.get(name, name)
        if isinstance(column, str):
            found.add(column)
        elif name != "responses":
            found.update(column)
    return found


def _with_values(row: dict[str, Any], numbers: Collection[str]) -> dict[str, Any]:
    """A row of cells with its numbers and lists; an empty cell is none."""
    return {
        name: None if cell == "" else cell_value(cell) if name in numbers else cell
        for name, cell in row.items()
    }


class _Watched(dict[str, Any]):
    """A row that knows which of its columns were looked at."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        super().__init__(row)
        self.seen: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a column."""
        self.seen.add(key)
        return super().get(key, default)

    def pop(self, key: str, *default: Any) -> Any:
        """The value of a column, which goes."""
        self.seen.add(key)
        return super().pop(key, *default)


def _by_plugin(name: str, row: dict[str, Any], account: FieldAccount) -> dict[str, Any]:
    """A row as a plugin's reader makes it; what the reader does not look at is accounted for."""
    watched = _Watched(row)
    try:
        made = READERS[name](watched)
    except RowError:
        raise
    except Exception as error:
        raise RowError("row", f"data.format={name}: {type(error).__name__}: {error}") from None
    if not isinstance(made, dict) or isinstance(made, _Watched):
        raise RowError("row", f"data.format={name}: returned {describe(made)}, expected a new dict")
    account.close(row, watched.seen)
    return made


def _notes(where: str, account: FieldAccount, good: int) -> list[str]:
    notes = []
    for kind, count in account.said.items():
        if kind in _SAID:
            notes.append(f"{where}: {_SAID[kind]} ({count_of(count, _NOUNS.get(kind, 'row'))})")
    for (role, known), count in account.roles.items():
        times = count_of(count, "message")
        notes.append(f"{where}: the role {show(role)} is read as {show(known)} ({times})")
    if good and account.said["begins_with_prompt"] == good:
        notes.append(
            f"{where}: every response begins with the text of its prompt, which was left there; if "
            "it is a repetition, hide the prompt with 'data.columns={prompt: \"\"}'"
        )
    return [*notes, *account.notes(where)]


def _raw(record: Record) -> str:
    """The record as it was read, or as JSON if it came without a line."""
    if record.raw is not None:
        return record.raw
    text = json.dumps(record.value, ensure_ascii=False, default=str)
    # One half of a surrogate pair has no UTF-8; its backslash form is JSON's own.
    return text.encode(errors="backslashreplace").decode()
