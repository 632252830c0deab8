"""Conversion of a row of a preference file to a :class:`PreferenceGroup`, or a reason against it.

A row is an object with ``prompt``, ``chosen`` and ``rejected``; or with ``prompt`` and
``responses`` (best first), which ``ranks`` (1 is best) or ``scores`` (higher is better) may order;
ties are allowed. A text is a string or a list of messages. The prompt may be implicit: it is then
what all responses begin with. Anything else in the row is ignored.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from dpo_lightning.data.texts import (
    GIVEN_ROLES,
    Message,
    RowError,
    Text,
    describe,
    list_names,
    read_prompt,
    read_text,
    show,
    split_messages,
    split_strings,
)

FIELDS = (
    "prompt",
    "chosen",
    "rejected",
    "responses",
    "ranks",
    "scores",
    "weight",
    "target_margin",
    "conversations",
)

_OPTIONAL = frozenset({"weight", "target_margin"})


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """A prompt and its K >= 2 responses as text, best first.

    Attributes:
        prompt: A string, or the messages that every response follows.
        responses: The K responses, best first; tied ones in the order of the row.
        ranks: Dense ranks of the responses, never decreasing; 1 is best, ties share a rank.
        weight: Weight of the group in the loss, finite and above 0.
        target_margin: The margin that the row asks for, or None.
        source: Origin of the row, ``file:line``.
        tools: Tools that the chat template is given, as a JSON list; empty where there are none.
        template_kwargs: The row's own variables of the chat template, as a JSON object with sorted
            keys; empty where there are none.
    """

    prompt: Text
    responses: tuple[Text, ...]
    ranks: tuple[int, ...]
    weight: float
    target_margin: float | None
    source: str
    tools: str = ""
    template_kwargs: str = ""

    @property
    def prompt_key(self) -> str:
        """The prompt as one string; groups that share it belong on one side of a split."""
        if isinstance(self.prompt, str):
            return f"s:{self.prompt}"
        return json.dumps([(m.role, m.content) for m in self.prompt], ensure_ascii=False)


def prompt_of_key(key: str) -> str | list[dict[str, str]]:
    """The prompt that a ``prompt_key`` was made of, in the form that rows have.

    Example:
        >>> prompt_of_key("s:Hello"), prompt_of_key('[["user", "Hello"]]')
        ('Hello', [{'role': 'user', 'content': 'Hello'}])
    """
    if key.startswith("["):
        return [{"role": role, "content": content} for role, content in json.loads(key)]
    return key.removeprefix("s:")


class ShapeError(RowError):
    """A row's columns are not those of a preference row.

    Attributes:
        reason: The problem without the columns of this one row.
    """

    def __init__(self, field: str, reason: str, row: Iterable[str]) -> None:
        super().__init__(
            field, f"{reason}; the row has {list_names(row)}; data.columns maps other names"
        )
        self.reason = reason


class RowReader:
    """Turns rows into groups and counts what had to be inferred.

    Args:
        sharegpt: Texts are turns of ``{"from", "value"}``; the prompt is ``conversations``.
        columns: Our field names to the names of the columns. An empty name hides a column.
        null_is_absent: A null stands for an absent column, as in a table, where a row cannot leave
            one out. A null prompt stays an error: it must not turn into an implicit one.
    """

    def __init__(self, *, sharegpt: bool, columns: Mapping[str, str], null_is_absent: bool) -> None:
        names = {field: columns.get(field, field) for field in FIELDS}
        # A form that is mapped by hand wins over another that merely happens to be there.
        pair = any(columns.get(field) for field in ("chosen", "rejected"))
        if columns.get("responses") and not pair:
            names["chosen"] = names["rejected"] = ""
        elif pair and not columns.get("responses"):
            names["responses"] = ""
        self.inferred: Counter[str] = Counter()
        self.wanted = [name for name in names.values() if name]
        self._names = names
        self._prompt = names["conversations" if sharegpt else "prompt"]
        self._required = [
            column for field, column in columns.items() if column and field not in _OPTIONAL
        ]
        self._sharegpt = sharegpt
        self._null_is_absent = null_is_absent
        self._missing = "missing or null" if null_is_absent else "missing"

    def read(self, row: Mapping[str, object], source: str) -> PreferenceGroup:
        """Reads one row.

        Args:
            row: The row by column name, values of any kind.
            source: ``file:line`` of the row.

        Raises:
            RowError: If the row is no preference group.
        """
        # The empty name is the one of hidden columns, so no column may carry it.
        if self._null_is_absent or "" in row:
            keep_null = {self._prompt} if self._null_is_absent else row.keys()
            row = {k: v for k, v in row.items() if k and (v is not None or k in keep_null)}
        labels, values, keys = self._responses(row)
        weight = self._optional(row, "weight", above_zero=True)
        target_margin = self._optional(row, "target_margin")
        texts = [
            read_text(value, label, sharegpt=self._sharegpt)
            for value, label in zip(values, labels, strict=True)
        ]
        prompt, responses = self._join(row, texts, labels)

        order = sorted(range(len(keys)), key=keys.__getitem__)
        ranks = [1]
        for better, worse in pairwise(order):
            ranks.append(ranks[-1] + (keys[better] != keys[worse]))
        return PreferenceGroup(
            prompt=prompt,
            responses=tuple([responses[index] for index in order]),
            ranks=tuple(ranks),
            weight=1.0 if weight is None else weight,
            target_margin=target_margin,
            source=source,
        )

    def _responses(
        self, row: Mapping[str, object]
    ) -> tuple[Sequence[str], Sequence[object], Sequence[float]]:
        """Labels, raw values and sort keys (lowest is best) of the responses of a row."""
        names, missing = self._names, self._missing
        chosen, rejected, many = names["chosen"], names["rejected"], names["responses"]
        for column in self._required:
            if column not in row:
                raise ShapeError(column, missing, row)
        if self._sharegpt and self._prompt not in row:
            raise ShapeError(self._prompt or "conversations", missing, row)
        if many not in row:
            if chosen in row and rejected in row:
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
        labels = [f"{many}[{index}]" for index in range(len(values))]
        ranks, scores = names["ranks"], names["scores"]
        if ranks in row and scores in row:
            reason = f"found beside {show(scores)}, and only one can give the order"
            raise ShapeError(ranks, reason, row)
        if ranks in row:
            return labels, values, _ranks(row[ranks], ranks, len(values))
        if scores in row:
            found = _list_of(row[scores], scores, len(values))
            return labels, values, [-_number(s, f"{scores}[{i}]") for i, s in enumerate(found)]
        return labels, values, range(len(values))

    def _optional(
        self, row: Mapping[str, object], field: str, *, above_zero: bool = False
    ) -> float | None:
        column = self._names[field]
        if column not in row:
            return None
        number = _number(row[column], column)
        if above_zero and number <= 0:
            raise RowError(column, f"{describe(row[column])}, expected one above 0")
        return number

    def _join(
        self, row: Mapping[str, object], texts: Sequence[Text], labels: Sequence[str]
    ) -> tuple[Text, Sequence[Text]]:
        """Finds the prompt, and brings it and the responses to one form."""
        implicit = self._prompt not in row
        prompt: Text = ""
        if not implicit:
            prompt = read_prompt(row[self._prompt], self._prompt, sharegpt=self._sharegpt)
        strings = [text for text in texts if isinstance(text, str)]
        lists = [text for text in texts if not isinstance(text, str)]
        if strings and lists:
            kind = type(texts[0])
            odd = next(i for i, text in enumerate(texts) if not isinstance(text, kind))
            forms = ("a string", "messages") if kind is str else ("messages", "a string")
            raise RowError(labels[odd], f"{forms[1]}, but {labels[0]} is {forms[0]}")
        if lists:
            if not implicit:
                return self._follow(prompt, lists, labels)
            self.inferred["messages"] += 1
            return split_messages(lists, labels)
        if not isinstance(prompt, str):
            return prompt, [(Message("assistant", text),) for text in strings]
        if not implicit:
            if prompt and all(text.startswith(prompt) for text in strings):
                self.inferred["begins_with_prompt"] += 1
            return prompt, strings
        prompt, rests, dialogue = split_strings(strings)
        if not prompt:
            reason = f"{self._missing}, and the responses have no common beginning for a prompt"
            raise ShapeError(self._prompt or "prompt", reason, row)
        self.inferred["dialogue" if dialogue else "string"] += 1
        return prompt, rests

    def _follow(
        self, prompt: Text, lists: Sequence[tuple[Message, ...]], labels: Sequence[str]
    ) -> tuple[tuple[Message, ...], Sequence[tuple[Message, ...]]]:
        """Takes an explicit prompt out of responses that may or may not repeat it."""
        answers = not any(messages[0].role in GIVEN_ROLES for messages in lists)
        if isinstance(prompt, str):
            if answers:
                return (Message("user", prompt),), lists
            lead, rests = split_messages(lists, labels)
            if not any(m.role == "user" and m.content.strip() == prompt.strip() for m in lead):
                raise RowError(
                    self._prompt,
                    f"{show(prompt)}, which is not among the messages that the responses begin "
                    "with (an empty name in data.columns hides a column)",
                )
            self.inferred["repeated"] += 1
            return lead, rests
        size = len(prompt)
        if all(messages[:size] == prompt for messages in lists):
            rests = [messages[size:] for messages in lists]
            if not all(rests):
                raise RowError(labels[rests.index(())], "nothing after the prompt's messages")
            self.inferred["repeated"] += 1
            if any(rest[0].role in GIVEN_ROLES for rest in rests):
                lead, rests = split_messages(rests, labels)
                prompt += lead
            return prompt, rests
        if answers:
            return prompt, lists
        odd = next(i for i, messages in enumerate(lists) if messages[0].role in GIVEN_ROLES)
        raise RowError(
            labels[odd],
            f"begins with a message of {show(lists[odd][0].role)}, expected the assistant's or, in "
            "every response, all messages of the prompt first",
        )


def looks_like_sharegpt(row: Mapping[str, object], columns: Mapping[str, str]) -> bool:
    """True if the row consists of ``{"from", "value"}`` turns, which are no messages."""
    if "prompt" in row or columns.get("prompt") or "conversations" not in row:
        return False
    chosen = row.get(columns.get("chosen", "chosen"))
    turn = chosen[0] if isinstance(chosen, list) and chosen else chosen
    return isinstance(turn, dict) and "from" in turn


def _list_of(value: object, label: str, size: int) -> list[object]:
    if not isinstance(value, list):
        raise RowError(label, f"{describe(value)}, expected a list of {size} numbers")
    if len(value) != size:
        raise RowError(label, f"{describe(value)}, expected {size}, one for each response")
    return value


def _ranks(value: object, label: str, size: int) -> list[int]:
    ranks = []
    for index, rank in enumerate(_list_of(value, label, size)):
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise RowError(
                f"{label}[{index}]", f"{describe(rank)}, expected a whole number, 1 or more"
            )
        ranks.append(rank)
    return ranks


def _number(value: object, label: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if math.isfinite(number):
            return number
    raise RowError(label, f"{describe(value)}, expected a finite number")
