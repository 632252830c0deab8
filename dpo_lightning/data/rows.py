"""Conversion of a row of a preference file to a :class:`PreferenceGroup`, or a reason against it.

A row is an object with ``prompt``, ``chosen`` and ``rejected``; or with ``prompt`` and
``responses`` (best first), which ``ranks`` (1 is best), ``scores`` (higher is better) or ``better``
may order; ties are allowed. Or it has one ``response`` with a ``label``. A text is a string or a
list of messages. The prompt may be implicit where there are several responses: it is then what all
of them begin with, and no other column may be it. ``system`` and ``tools`` make the texts turns of
a conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from dpo_lightning.data import orders
from dpo_lightning.data.fields import FieldAccount, may_be_for_the_model
from dpo_lightning.data.groups import PreferenceGroup, prompt_of_key, turned
from dpo_lightning.data.labels import LabelReader
from dpo_lightning.data.messages import MessageReader
from dpo_lightning.data.prompts import PromptFinder, ShapeError
from dpo_lightning.data.texts import RowError, describe, show

__all__ = [
    "FIELDS",
    "PreferenceGroup",
    "RowReader",
    "ShapeError",
    "Unrated",
    "prompt_of_key",
    "turned",
]

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "responses",
    "ranks",
    "scores",
    "better",
    "response",
    "label",
    "weight",
    "target_margin",
    "system",
    "input",
    "tools",
    "chat_template_kwargs",
    "conversations",
)

SEVERAL = frozenset({"responses", "ranks", "scores"})
"""Fields that a list of columns may stand for."""

# Names that could mean anything: read where they are mapped.
_WHERE_MAPPED = frozenset({"better", "response", "label", "input", "conversations"})

_OPTIONAL = frozenset(
    {"label", "weight", "target_margin", "system", "input", "tools", "chat_template_kwargs"}
)

Columns = Mapping[str, str | Sequence[str]]


class Unrated(Exception):
    """A row whose answer nobody rated: it is neither bad nor undesirable, and is left out."""


class RowReader:
    """Turns rows into groups and accounts for their fields.

    Args:
        columns: Our field names to the names of the columns: one, or for responses, ranks and
            scores also several. An empty name hides a column.
        null_is_absent: A null stands for an absent column, as in a table, where a row cannot leave
            one out. A null prompt stays an error: it must not turn into an implicit one.
        account: Takes note of what was inferred, and of what was not read.
        reads: Further columns that the row's form has used already.
        labels: Reads the labels of single responses.
        any_form: Rows may have one response with a label, or several; else a mapping of
            ``response`` says that all have one.
    """

    def __init__(
        self,
        *,
        columns: Columns,
        null_is_absent: bool,
        account: FieldAccount,
        reads: Iterable[str] = (),
        labels: LabelReader | None = None,
        any_form: bool = False,
    ) -> None:
        names: dict[str, Any] = {
            field: columns.get(field, "" if field in _WHERE_MAPPED else field) for field in FIELDS
        }
        if columns.get("response"):
            names["label"] = columns.get("label", "label")
        # A form that is mapped by hand wins over another that merely happens to be there.
        pair = any(columns.get(field) for field in ("chosen", "rejected"))
        if columns.get("responses") and not pair:
            names["chosen"] = names["rejected"] = ""
        elif pair and not columns.get("responses"):
            names["responses"] = ""
        self._names = names
        self._several = {
            field: list(names[field]) for field in SEVERAL if not isinstance(names[field], str)
        }
        hidden = frozenset(f for f, column in columns.items() if not column)
        self._prompt: str = names["prompt"]
        self._required = [
            column
            for field, given in columns.items()
            if field not in _OPTIONAL
            for column in ([given] if isinstance(given, str) else given)
            if column
        ]
        if any_form and columns.get("response"):
            self._required.remove(str(columns["response"]))
        self._labels = labels or LabelReader(None)
        self._any_form = any_form
        self._orders = [str(columns[f]) for f in ("ranks", "scores", "better") if columns.get(f)]
        self._null_is_absent = null_is_absent
        self._missing = "missing or null" if null_is_absent else "missing"
        self._account = account
        self._reads = frozenset(reads) | hidden
        self._form = ""
        self._messages = MessageReader(account, null_is_absent=null_is_absent)
        self._prompts = PromptFinder(
            names,
            reads=self._reads,
            messages=self._messages,
            account=account,
            missing=self._missing,
        )

    @property
    def was_text(self) -> bool:
        """True if the last row's prompt and responses are strings, the prompt given."""
        return self._prompts.was_text

    def wanted(self, table: Mapping[str, bool]) -> list[str]:
        """The columns of a table to read.

        Args:
            table: Its columns, and whether each may hold texts.
        """
        own = {name for name in self._names.values() if isinstance(name, str)}
        own.update(*self._several.values())
        own |= self._reads
        # Where the prompt is implicit, any text beside it may have been meant.
        all_texts = self._prompt not in table
        return [
            name
            for name, has_text in table.items()
            if name in own
            or (
                name not in self._account.ignored
                and ((all_texts and has_text) or may_be_for_the_model(name))
            )
        ]

    def read(self, row: dict[str, Any], source: str) -> PreferenceGroup:
        """Reads one row.

        Args:
            row: The row by column name, values of any kind.
            source: ``file:line`` of the row.

        Raises:
            RowError: If the row is no preference group.
            Unrated: If it has one response, which has no label.
        """
        try:
            return self._read(row, source)
        except RecursionError:
            raise RowError("row", "nested too deeply") from None

    def _read(self, row: dict[str, Any], source: str) -> PreferenceGroup:
        whole = row
        # The empty name is the one of hidden columns, so no column may carry it.
        if self._null_is_absent or "" in row:
            keep_null = {self._prompt} if self._null_is_absent else row.keys()
            row = {k: v for k, v in row.items() if k and (v is not None or k in keep_null)}
        used = {self._prompt}
        label = self._label(row, used, source) if self._is_alone(row) else None
        if label is None:
            labels, values, keys = self._responses(row, used)
        else:
            labels, values, keys = self._alone(row, used)
        weight = self._optional(row, "weight", used, above_zero=True)
        target_margin = self._optional(row, "target_margin", used)
        texts = [
            self._messages.text(value, place) for value, place in zip(values, labels, strict=True)
        ]
        prompt, responses = self._prompts.join(row, texts, labels)
        prompt, responses, tools, kwargs = self._prompts.given(row, prompt, responses, used)

        order = sorted(range(len(keys)), key=keys.__getitem__)
        ranks = [1]
        for one, next_one in pairwise(order):
            ranks.append(ranks[-1] + (keys[one] != keys[next_one]))
        group = PreferenceGroup(
            prompt=prompt,
            responses=tuple([responses[index] for index in order]),
            ranks=tuple(ranks),
            weight=1.0 if weight is None else weight,
            target_margin=target_margin,
            source=source,
            tools=tools,
            template_kwargs=kwargs,
            form=self._form,
            moved=order != [*range(len(order))],
            label=label,
        )
        self._account.close(whole, used | self._reads)
        if group.weight != 1:
            self._account.said["weight"] += 1
        return group

    def _is_alone(self, row: Mapping[str, Any]) -> bool:
        """True if the row is to have one response with a label."""
        name = self._names["response"]
        if not self._any_form:
            return bool(name)
        return name in row and not {"chosen", "rejected", "responses"} & row.keys()

    def _label(self, row: Mapping[str, Any], used: set[str], source: str) -> bool:
        """The label of a row's only response.

        Raises:
            Unrated: If there is none.
        """
        response, name = self._names["response"], self._names["label"]
        self._check_columns(row)
        for field in ("chosen", "rejected", "responses"):
            other = self._names[field]
            if isinstance(other, str) and other in row:
                reason = f"found beside {show(response)}, and the rows of a file have one form"
                raise ShapeError(other, reason, row)
        label = self._labels.read(row.get(name), name, source)
        if label is None:
            raise Unrated
        used.update((response, name))
        return label

    def _alone(
        self, row: Mapping[str, Any], used: set[str]
    ) -> tuple[Sequence[str], Sequence[object], Sequence[float]]:
        """As :meth:`_responses`, of a row with one response."""
        margin = self._names["target_margin"]
        if margin in row:
            raise RowError(margin, "the lead of the better response, and the row has only one")
        self._form = "label"
        name = self._names["response"]
        return (name,), (row[name],), (1,)

    def _check_columns(self, row: Mapping[str, Any]) -> None:
        """Raises a ShapeError if a column is missing that has to be there."""
        for column in self._required:
            if column not in row:
                raise ShapeError(column, self._missing, row)

    def _responses(
        self, row: Mapping[str, Any], used: set[str]
    ) -> tuple[Sequence[str], Sequence[object], Sequence[float]]:
        """Labels, raw values and sort keys (lowest is best) of the responses of a row."""
        names, missing = self._names, self._missing
        chosen, rejected, many = names["chosen"], names["rejected"], names["responses"]
        self._check_columns(row)
        if "responses" in self._several:
            labels = self._several["responses"]
            used.update(labels)
            values = [row[label] for label in labels]
            return labels, values, self._order(row, labels, used)
        if many not in row:
            if chosen in row and rejected in row:
                for column in self._orders:
                    reason = f"an order, and {show(chosen)} and {show(rejected)} have one"
                    raise ShapeError(column, reason, row, "map the responses too")
                used.update((chosen, rejected))
                self._form = "pair"
                return (chosen, rejected), (row[chosen], row[rejected]), (1, 2)
            if many and chosen not in row and rejected not in row:
                raise ShapeError(chosen or many, f"{missing}, and no {show(many)}", row)
            absent = rejected if chosen in row else chosen
            raise ShapeError(absent or many or "responses", missing, row)

        for other in (chosen, rejected):
            if other in row:
                reason = (
                    f"found beside {show(other)}, and a row has one form (an empty name in "
                    "data.columns hides a column)"
                )
                raise ShapeError(many, reason, row)
        values = row[many]
        if not isinstance(values, list):
            raise RowError(many, f"{describe(values)}, expected a list of responses")
        if len(values) < 2:
            raise RowError(many, f"{describe(values)}, expected at least 2 responses")
        used.add(many)
        labels = [f"{many}[{index}]" for index in range(len(values))]
        return labels, values, self._order(row, labels, used)

    def _order(
        self, row: Mapping[str, Any], labels: Sequence[str], used: set[str]
    ) -> Sequence[float]:
        """Sort keys of the responses, lowest is best."""
        found = [
            field
            for field in ("ranks", "scores", "better")
            if field in self._several or self._names[field] in row
        ]
        if len(found) > 1:
            one, other = (self._names[field] for field in found[:2])
            reason = f"found beside {show(other)}, and only one can give the order"
            raise ShapeError(str(one), reason, row)
        if not found:
            if "responses" in self._several:
                reason = (
                    "nothing says which response is better; name it with "
                    "'data.columns={better: <column>}', or give ranks or scores"
                )
                raise ShapeError(labels[0], reason, row, "the columns' order is none")
            self._form = "responses"
            return range(len(labels))
        (field,) = found
        self._form = field
        name = self._names[field]
        if field == "better":
            used.add(name)
            return orders.better(row[name], name, labels)
        if field in self._several:
            columns = self._several[field]
            if len(columns) != len(labels):
                raise RowError(columns[0], f"{len(columns)} columns for {len(labels)} responses")
            used.update(columns)
            values, places = [row.get(column) for column in columns], columns
        else:
            used.add(name)
            values = orders.list_of(row[name], name, len(labels))
            places = [f"{name}[{index}]" for index in range(len(labels))]
        return orders.ranks(values, places) if field == "ranks" else orders.scores(values, places)

    def _optional(
        self, row: Mapping[str, object], field: str, used: set[str], *, above_zero: bool = False
    ) -> float | None:
        column = self._names[field]
        if column not in row:
            return None
        used.add(column)
        number = orders.number(row[column], column)
        if above_zero and number <= 0:
            raise RowError(column, f"{describe(row[column])}, expected a number > 0")
        return number
