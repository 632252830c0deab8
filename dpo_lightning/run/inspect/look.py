"""Everything that ``inspect`` tells of a run, as one object; nothing is started or written."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpo_lightning.data.bad_rows import BadRow
from dpo_lightning.data.groups import PreferenceGroup
from dpo_lightning.data.labels import LabelCounts
from dpo_lightning.data.records import Rows
from dpo_lightning.data.source_names import eval_key, source_label
from dpo_lightning.data.splits import PreparedData
from dpo_lightning.errors import UserError
from dpo_lightning.run.inputs import SourceRows, check_labels, check_named, read_named
from dpo_lightning.run.inspect.oddities import (
    Told,
    count_oddities,
    leaks,
    told_rows,
    told_tokens,
)
from dpo_lightning.settings.schema import Config

_BAD_SHOWN = 5


def look(config: Config, *, outputs: Path, number: int | None = None) -> dict[str, Any]:
    """Reads, tokenizes and plans, as the run would.

    Reasons for which the run would stop are kept beside what is found; only what leaves nothing to
    look at is raised.

    Args:
        config: The validated settings.
        outputs: Parent of the folders of runs and sweeps, which is read alone.
        number: Training group to show, from 1; None takes the first of the first step.

    Returns:
        The JSON object of the command.

    Raises:
        UserError: If a source, a model or a template cannot be used, or there is no such group.
    """
    refused: list[str] = []

    def refuse(error: UserError) -> None:
        refused.append(str(error))

    rows = read_named(config)
    if rows is not None:
        with _kept(refused):
            check_named(rows, config)
        with _kept(refused):
            check_labels(rows, config.loss)
        if not rows.train.groups:
            raise UserError(refused[0])
    # Here, because the tokenizer's library imports torch: by now all rows are read.
    from dpo_lightning.run.inspect.tokenized import tokenized

    made = tokenized(config, rows, refuse, number=number, outputs=outputs)
    data: PreparedData = made.pop("data")
    told = _told(rows, data, made.pop("eos"))
    return {
        "rows": _rows(config, rows, data),
        "groups": _groups(config, data),
        "dropped": {reason: count for reason, count in data.dropped.items() if count},
        "oddities": {
            key: {name: found.as_dict() for name, found in count_oddities(part).items()}
            for key, part in told.items()
        }
        | {"leaked": leaks(data.train, data.eval).as_dict()},
        **made,
        "notes": [*dict.fromkeys(_notes(rows, data))],
        "refused": refused,
    }


@contextlib.contextmanager
def _kept(refused: list[str]) -> Any:
    """Keeps an error of the user's instead of letting it out."""
    try:
        yield
    except UserError as error:
        refused.append(str(error))


def _told(rows: SourceRows | None, data: PreparedData, eos: int) -> dict[str, list[Told]]:
    """The rows to be compared, by the side that they are on."""
    if rows is None:
        parts = {"train": data.train, "eval": data.eval}
        return {key: list(told_tokens(part, eos)) for key, part in parts.items() if part}
    found = {"train": list(told_rows(rows.train.groups))}
    if rows.held_out:
        found["eval"] = [told for part in rows.held_out.values() for told in told_rows(part.groups)]
    return found


def _rows(config: Config, rows: SourceRows | None, data: PreparedData) -> dict[str, Any]:
    if rows is None:
        return {
            "train": _drawn("controlled task", len(data.train)),
            "eval": _drawn("controlled task", len(data.eval)),
        }
    train = source_label(config.data.train)
    found = {"train": _source(train, rows.train, *data.sources["data.train"]), "eval": None}
    if rows.held_out:
        label = source_label(config.data.eval or config.data.train)
        found["eval"] = _source(label, _together([*rows.held_out.values()]), *_lost(rows, data))
    return found


def _together(parts: Sequence[Rows]) -> Rows:
    """The rows of several held-out sets as of one source."""
    if len(parts) == 1:
        return parts[0]
    return replace(
        parts[0],
        groups=[group for part in parts for group in part.groups],
        bad=[row for part in parts for row in part.bad],
        total=sum(part.total for part in parts),
        unread=frozenset(name for part in parts for name in part.unread),
        unrated=sum(part.unrated for part in parts),
    )


def _lost(rows: SourceRows, data: PreparedData) -> tuple[Counter[str], Counter[str]]:
    """Rows of all held-out sets that were dropped, and those that were changed, by reason."""
    dropped, changed = Counter[str](), Counter[str]()
    for name in rows.held_out:
        own = data.sources[eval_key(name)]
        dropped.update(own[0])
        changed.update(own[1])
    return dropped, changed


def _drawn(label: str, count: int) -> dict[str, Any]:
    """The entry of a source that is drawn, of which nothing is lost."""
    none: Rows = Rows([], [], count, [])
    return _source(label, none, Counter(), Counter(), drawn=count)


def _source(
    label: str, rows: Rows, dropped: Counter[str], changed: Counter[str], *, drawn: int = 0
) -> dict[str, Any]:
    groups = rows.groups
    gone = {reason: count for reason, count in dropped.items() if count}
    return {
        "source": label,
        "read": rows.total,
        "used": drawn or rows.total - sum(gone.values()),
        "dropped": gone,
        "changed": {name: count for name, count in changed.items() if count},
        "forms": {"pair": drawn} if drawn else dict(Counter(group.form for group in groups)),
        "texts": {"tokens": drawn} if drawn else _texts(groups),
        "labels": LabelCounts.of(group.label for group in groups).as_dict(),
        "unrated": rows.unrated,
        "reordered": sum(group.moved for group in groups),
        "unread": sorted(rows.unread),
        "bad": [_bad(row) for row in rows.bad[:_BAD_SHOWN]],
    }


def _texts(groups: Sequence[PreferenceGroup]) -> dict[str, int]:
    kinds = Counter("strings" if isinstance(g.prompt, str) else "messages" for g in groups)
    more = {
        "weight": sum(group.weight != 1 for group in groups),
        "target_margin": sum(group.target_margin is not None for group in groups),
        "tools": sum(bool(group.tools) for group in groups),
    }
    return dict(kinds) | {name: count for name, count in more.items() if count}


def _bad(row: BadRow) -> dict[str, str]:
    return {"place": row.source, "field": row.field, "problem": row.problem}


def _groups(config: Config, data: PreparedData) -> dict[str, Any]:
    named = config.data.eval is not None or config.data.eval_split is not None
    is_drawn = config.data.train is None
    return {
        "train": len(data.train),
        "eval": len(data.eval),
        "evaluated": len(data.evaluated_groups()),
        "pairs": sum(group.pairs for group in data.train),
        "labels": LabelCounts.of(group.label for group in data.train).as_dict(),
        "responses": dict(sorted(Counter(len(g.responses) for g in data.train).items())),
        "prompts": len({group.prompt_key for group in data.train}),
        "split": "drawn" if is_drawn else "named" if named else "held out by prompt",
        "eval_fraction": None if named or is_drawn else config.data.eval_fraction,
    }


def _notes(rows: SourceRows | None, data: PreparedData) -> list[str]:
    if rows is None:
        return ["the embedded task draws all pairs from 8 prompts, so repeated ones are meant"]
    return data.notes
