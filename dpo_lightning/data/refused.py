"""Rows that a chat template does not take whole: a stop that names them, or rows set aside."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpo_lightning.data.bad_rows import MOST_OF_ONE_CAUSE, BadRow, check_bad_rows
from dpo_lightning.data.conversations import Fault
from dpo_lightning.data.records import Rows
from dpo_lightning.data.rows import PreferenceGroup
from dpo_lightning.data.texts import Text
from dpo_lightning.errors import UserError

_NAMED = 3

Refuse = Callable[[UserError], None]
"""Takes a reason to stop: it raises, or keeps the reason and lets the rest be looked at."""


def stop(error: UserError) -> None:
    """Raises the reason to stop, as a run does."""
    raise error


def refused_rows(
    groups: Sequence[PreferenceGroup],
    faults: Mapping[int, Fault],
    *,
    total: int,
    on_bad_row: str,
    key: str,
) -> list[BadRow]:
    """The rows with a fault, to be set aside.

    Args:
        groups: The rows that were read.
        faults: Faults by the number of the row.
        total: Number of rows of the source.
        on_bad_row: ``stop`` or ``skip``.
        key: The setting that names the source.

    Raises:
        UserError: If there is one and they are not to be skipped, or one cause has too many.
    """
    if not faults:
        return []
    causes = Counter(fault.cause for fault in faults.values())
    cause, count = causes.most_common(1)[0]
    of_cause = {n: fault for n, fault in faults.items() if fault.cause == cause}
    first = next(iter(of_cause.values()))
    if count / total > MOST_OF_ONE_CAUSE:
        places = ", ".join(f"{groups[n].source} {of_cause[n].field}" for n in [*of_cause][:_NAMED])
        more = " and more" if count > _NAMED else ""
        raise UserError(
            f"{key}: {cause} in {count} of {total} rows ({places}{more}); {first.remedy}"
        )
    bad = [
        BadRow(groups[n].source, fault.field, fault.problem, _as_row(groups[n]))
        for n, fault in faults.items()
    ]
    check_bad_rows(Rows([], bad, total, []), on_bad_row=on_bad_row, remedy=first.remedy)
    return bad


def _as_row(group: PreferenceGroup) -> str:
    """A group as a row of JSON."""
    responses = [_plain(response) for response in group.responses]
    row: dict[str, Any] = {"prompt": _plain(group.prompt)}
    if group.label is None:
        row |= {"responses": responses, "ranks": list(group.ranks)}
    else:
        row |= {"response": responses[0], "label": group.label}
    if group.tools:
        row["tools"] = json.loads(group.tools)
    if group.template_kwargs:
        row["chat_template_kwargs"] = json.loads(group.template_kwargs)
    return json.dumps(row, ensure_ascii=False)


def _plain(text: Text) -> Any:
    return text if isinstance(text, str) else [message.for_template() for message in text]
