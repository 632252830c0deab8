"""Logs of conversations in which people rated answers: each rated answer becomes a row.

A rating is a key of an assistant's turn, or a column of the row, which is of the last answer. The
turns before an answer are its prompt; those behind it play no part. Answers without a rating are
rows without a label, which the reader of rows counts and leaves out.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dpo_lightning.data.fields import FieldAccount, is_empty
from dpo_lightning.data.messages import ROLES
from dpo_lightning.data.texts import RowError, describe, show

RATINGS = ("label", "rating", "feedback")
"""Keys of an assistant's turn that may rate it."""

ROW_LABELS = ("label", "kto_tag")
"""Columns that may rate the last answer of a row."""

Row = dict[str, Any]

_TURN = re.compile(r"\[\d+\]$")


def answer_column(conversation: str) -> str:
    """The name under which a row has its answer."""
    return f"{conversation}[answer]"


def label_column(conversation: str) -> str:
    """The name under which a row has its label."""
    return f"{conversation}[rating]"


def row_of(source: str) -> str:
    """The row that an answer is of, ``file:line``, out of the place of the answer.

    Example:
        >>> row_of("log.jsonl:12[3]"), row_of("log.jsonl:12")
        ('log.jsonl:12', 'log.jsonl:12')
    """
    return _TURN.sub("", source)


def rated_answers(
    row: Row, account: FieldAccount, *, conversation: str, labels: Sequence[str]
) -> list[tuple[str, Row]]:
    """The answers of a conversation, each as a row with its history as the prompt.

    Args:
        row: The row of the file.
        account: Takes note of the keys that the user leaves out.
        conversation: The column of the turns.
        labels: Columns that may rate the last answer.

    Returns:
        Rows, each with what is to be put behind its place: ``[3]`` for the turn of that number,
        nothing where the row itself is rated. The label of an answer that nobody rated is None.

    Raises:
        RowError: If it is no conversation, or one answer has two ratings.
    """
    turns = _turns(row, conversation)
    roles = [_role(turn) for turn in turns]
    ratings = [
        _rating(turn, role, f"{conversation}[{place}]", account)
        for place, (turn, role) in enumerate(zip(turns, roles, strict=True))
    ]
    bare = [{key: item for key, item in turn.items() if key not in RATINGS} for turn in turns]
    whole = _of_row(row, labels)
    rated = [place for place, (key, _) in enumerate(ratings) if key]
    rest = {key: item for key, item in row.items() if key not in (conversation, *labels)}

    def answer(start: int, end: int, label: object) -> Row:
        return {
            **rest,
            conversation: bare[:start],
            answer_column(conversation): bare[start:end],
            label_column(conversation): label,
        }

    if whole is not None and not is_empty(row[whole]) and rated:
        key, _ = ratings[rated[0]]
        raise RowError(
            whole,
            f"found beside {conversation}[{rated[0]}].{key}, and either the row or its turns have "
            "ratings; leave the row's out with 'data.columns={label: \"\"}', or the turns' with "
            f"'data.ignore_fields=[messages.{key}]'",
        )
    if whole is not None and not rated:
        start = _last_answer(roles)
        if start == len(turns):
            raise RowError(conversation, f"ends with no answer, which {show(whole)} would rate")
        return [("", answer(start, len(turns), row[whole]))]
    return [
        (f"[{place}]", answer(place, place + 1, ratings[place][1]))
        for place, role in enumerate(roles)
        if role == "assistant"
    ]


def _turns(row: Row, conversation: str) -> list[Row]:
    value = row.get(conversation)
    if not isinstance(value, list):
        raise RowError(conversation, f"{describe(value)}, expected a list of messages")
    for place, turn in enumerate(value):
        if not isinstance(turn, dict):
            problem = f"{describe(turn)}, expected an object of 'role', 'content'"
            raise RowError(f"{conversation}[{place}]", problem)
    return value


def _role(turn: Row) -> str:
    role = turn.get("role")
    role = turn.get("from") if role is None else role
    # What is no role is said where the message is read.
    return ROLES.get(role.strip().lower(), role) if isinstance(role, str) else ""


def _rating(turn: Row, role: str, place: str, account: FieldAccount) -> tuple[str, object]:
    """The key that rates a turn, and its value; an empty key where there is none."""
    found = [
        key
        for key in RATINGS
        if not is_empty(turn.get(key)) and not account.ignores(f"messages.{key}")
    ]
    for key in found:
        remedy = f"leave it out with 'data.ignore_fields=[messages.{key}]'"
        if role != "assistant":
            raise RowError(
                f"{place}.{key}",
                f"rates a turn of {show(role)}, and only the assistant's are rated; {remedy}",
            )
        if key != found[0]:
            problem = f"found beside {show(found[0])}, and only one can be the rating; {remedy}"
            raise RowError(f"{place}.{key}", problem)
    if found and place.endswith("[0]"):
        raise RowError(f"{place}.{found[0]}", "rates an answer that has no question before it")
    return (found[0], turn[found[0]]) if found else ("", None)


def _of_row(row: Row, labels: Sequence[str]) -> str | None:
    """The column that rates the last answer, filled if one is; None where there is none."""
    there = [name for name in labels if name in row]
    filled = [name for name in there if not is_empty(row[name])]
    if len(filled) > 1:
        problem = f"found beside {show(filled[0])}, and only one can be the rating"
        raise RowError(filled[1], f"{problem}; name it with 'data.columns={{label: {filled[0]}}}'")
    return next(iter(filled or there), None)


def _last_answer(roles: Sequence[str]) -> int:
    """The place where the turns of the assistant at the end begin."""
    start = len(roles)
    while start and roles[start - 1] == "assistant":
        start -= 1
    return start
