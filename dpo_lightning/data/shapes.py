"""Columns of all rows of a source: a fault of every row is a fault of the settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from dpo_lightning.data.bad_rows import MOST_OF_ONE_CAUSE
from dpo_lightning.data.forms import NAMES, Form, mapping_hint
from dpo_lightning.data.rows import FIELDS, SEVERAL
from dpo_lightning.data.texts import list_names, printable, show
from dpo_lightning.errors import UserError
from dpo_lightning.plugins import READERS

_ROWS_LOOKED_AT = 100


class Shapes:
    """Columns that the rows of a source have.

    Attributes:
        rows: Number of rows that are objects.
        found: Names of columns.
        form: The form that the rows are read as; None for the project's own.
        wrong: Number of rows by field, reason and remedy for which they have not the columns
            needed.
        unused: Places of the rows that have a field that is for the model and not used.
    """

    def __init__(self, columns: Mapping[str, Any], found: Iterable[str] | None) -> None:
        self.rows = 0
        self.form: Form | None = None
        self.found = dict.fromkeys(found or ())
        self.wrong: Counter[tuple[str, str, str]] = Counter()
        self.unused: dict[tuple[str, str], list[str]] = {}
        # In a table only the columns that are looked at are read.
        self._collect = found is None
        self._columns = columns
        self._unseen = {column for _, column in _pairs(columns)} - set(self.found)

    def add(self, row: Mapping[str, object]) -> None:
        """Takes note of the columns of a row."""
        self.rows += 1
        self._unseen.difference_update(row)
        if self._collect:
            self.found.update(dict.fromkeys(row))
            # For a message the first rows will do; keys need not be columns, there can be many.
            self._collect = self.rows < _ROWS_LOOKED_AT

    def check(self, where: str) -> None:
        """Raises a UserError if no row can be right, or one cause makes many bad."""
        if not self.rows:
            return
        found = list_names(self.found)
        for field, column in _pairs(self._columns):
            if column in self._unseen:
                near = get_close_matches(column, self.found, n=1)
                hint = f", did you mean {show(near[0])}?" if near else ""
                raise UserError(
                    f"data.columns={{{field}: {printable(column)}}}: no row of {where} has this "
                    f"column{hint}; found {found}"
                )
        for (name, remedy), places in self.unused.items():
            if len(places) > MOST_OF_ONE_CAUSE * self.rows:
                raise UserError(
                    f"{where}: {show(name)} may be for the model and is not used "
                    f"({len(places)} of {self.rows} rows, first {places[0]}); {remedy}"
                )
        if self.wrong.total() == self.rows:
            [((field, reason, remedy), _)] = self.wrong.most_common(1)
            shown = f"{where}: the columns of every row are wrong: {show(field)} is {reason}"
            raise UserError(f"{shown}; {remedy or self._expected(found)}")

    def _expected(self, found: str) -> str:
        if self.form is not None:
            needs = ", ".join(self.form.needs)
            return (
                f"found {found}; data.format={self.form.name} needs {needs}; or read rows of "
                "another form with data.format="
            )
        mapping = mapping_hint(self.found)
        return (
            f"found {found}; expected prompt, chosen, rejected; or prompt, responses (best first, "
            "or with ranks or scores); or prompt, response, label; map other names, as in "
            f"{mapping}"
        )


def check_settings(format: str, columns: Mapping[str, Any]) -> None:
    """Checks ``data.format`` and ``data.columns``.

    Raises:
        UserError: If there is no such form or field, or two fields have one column.
    """
    if format not in NAMES and format not in READERS:
        raise UserError(f"data.format={format}: expected one of {', '.join([*NAMES, *READERS])}")
    for field, column in columns.items():
        shown = f"data.columns={{{printable(str(field))}: {printable(str(column))}}}"
        if field not in FIELDS:
            near = get_close_matches(str(field), FIELDS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(FIELDS)}"
            raise UserError(f"{shown}: {show(field)} is not a field of a row, {hint}")
        if not _is_name(column, several=field in SEVERAL):
            expected = "the name of a column" + (", or a list of names" if field in SEVERAL else "")
            raise UserError(f"{shown}: needs {expected}")
    other, remedy = "conversations", "set data.format=sharegpt"
    if format == "sharegpt":
        other, remedy = "prompt", "the prompt there is conversations"
    if columns.get(other):
        raise UserError(
            f"data.columns={{{other}: {printable(columns[other])}}}: no field of "
            f"data.format={format}; {remedy}"
        )
    compared = [field for field in ("chosen", "rejected", "responses") if columns.get(field)]
    if columns.get("response") and compared:
        raise UserError(
            f"data.columns: {compared[0]} and response are both mapped; rows compare responses, or "
            "have one response with a label"
        )
    taken: dict[str, list[str]] = {}
    for field, column in _pairs(columns):
        taken.setdefault(column, []).append(field)
    for column, fields in taken.items():
        if len(fields) > 1:
            raise UserError(
                f"data.columns: {' and '.join(fields)} are both {show(column)}; each field has a "
                "column of its own"
            )


def _is_name(column: object, *, several: bool) -> bool:
    if isinstance(column, str):
        return True
    if not several or not isinstance(column, Sequence) or len(column) < 2:
        return False
    return all(isinstance(name, str) and name for name in column)


def _pairs(columns: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Fields with their columns, each by itself; hidden ones apart."""
    return [
        (field, column)
        for field, given in columns.items()
        for column in ([given] if isinstance(given, str) else given)
        if column
    ]
