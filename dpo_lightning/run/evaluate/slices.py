"""Slices of held-out groups by length or by a column of their rows, with intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_lightning.data.thumbs import row_of
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.items import GroupItems, numbered
from dpo_lightning.evaluation.uncertainty import Interval, bootstrap, by_prompt, wilson

ACCURACY = "rewards/accuracies"
MOST_SLICES = 20
"""Values of a column that have a slice of their own, the most frequent ones."""

_OTHERS = "(all others)"
_NONE = "(none)"
# Numbers of more values than these are cut into as many ranges.
_RANGES = 4


@dataclass(frozen=True, slots=True)
class Slice:
    """Some of the held-out groups.

    Attributes:
        by: ``prompt_tokens``, ``chosen_tokens`` or the name of a column.
        value: Their value of it, or range of values.
        groups: Their numbers.
    """

    by: str
    value: str
    groups: NDArray[np.int64]


def slices_by_length(groups: Sequence[TokenGroup]) -> list[Slice]:
    """Slices by the tokens of the prompt, and by those of the better response.

    Args:
        groups: The held-out groups.
    """
    lengths = {
        "prompt_tokens": [len(group.prompt) for group in groups],
        "chosen_tokens": [len(group.responses[0]) for group in groups],
    }
    return [own for by, values in lengths.items() for own in _by_value(by, list(values))]


def slices_by_column(
    groups: Sequence[TokenGroup], column: str, values: Mapping[str, Any]
) -> list[Slice]:
    """Slices by a column of the rows that the groups were made of.

    Args:
        groups: The held-out groups.
        column: Its name.
        values: Its values by the place of the row.

    Raises:
        UserError: If its values are lists or objects, which are no values to slice by.
    """
    found = [values.get(row_of(group.source)) for group in groups]
    for group, value in zip(groups, found, strict=True):
        if isinstance(value, list | dict):
            kind = "a list" if isinstance(value, list) else "an object"
            raise UserError(
                f"--slice {column}: {group.source} has {kind} there; name a column of texts or "
                f"numbers, or a part of an object, such as {column}.<name>"
            )
    return _by_value(column, found)


def _by_value(by: str, values: Sequence[Any]) -> list[Slice]:
    known = [value for value in values if value is not None]
    numbers = bool(known) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in known
    )
    if numbers and len({*known}) > _RANGES:
        labels = _ranges(values)
    else:
        labels = [_NONE if value is None else _label(value) for value in values]
        frequent = [label for label, _ in Counter(labels).most_common(MOST_SLICES)]
        labels = [label if label in frequent else _OTHERS for label in labels]
    order = _in_order(labels, values)
    at = np.array(labels)
    return [Slice(by, label, np.flatnonzero(at == label)) for label in order]


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _ranges(values: Sequence[Any]) -> list[str]:
    """Labels of ranges with about as many values in each."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    cuts = np.unique(np.quantile(known, np.linspace(0, 1, _RANGES + 1)[1:-1], method="lower"))
    of_known = np.searchsorted(cuts, known, side="left")
    names = {
        int(number): (
            float(known[of_known == number].min()),
            float(known[of_known == number].max()),
        )
        for number in np.unique(of_known)
    }
    places = iter(of_known.tolist())
    labels = []
    for value in values:
        if value is None:
            labels.append(_NONE)
            continue
        low, high = names[next(places)]
        labels.append(f"{low:g}" if low == high else f"{low:g} to {high:g}")
    return labels


def _in_order(labels: Sequence[str], values: Sequence[Any]) -> list[str]:
    """The labels by their least value, texts by the alphabet; what is none or left comes last."""
    least: dict[str, Any] = {}
    for label, value in zip(labels, values, strict=True):
        if label not in (_NONE, _OTHERS):
            key = (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))
            least[label] = min(least.get(label, key), key)
    return [*sorted(least, key=least.__getitem__), *(x for x in (_OTHERS, _NONE) if x in labels)]


# Numbers of a slice -----------------------------------------------------------------------------


def prompts_of(groups: Sequence[TokenGroup]) -> NDArray[np.int64]:
    """Number of the prompt of each group, (G,)."""
    return numbered([group.prompt_key for group in groups])


def entry_of(
    items: GroupItems, prompts: NDArray[np.int64], groups: NDArray[np.int64]
) -> dict[str, Any]:
    """Metrics and their intervals of some groups, as entries of JSON.

    Args:
        items: Measurements of all groups.
        prompts: Number of the prompt of each, (G,).
        groups: Numbers of those that are meant, 1 or more.
    """
    metrics = items.metrics(groups)
    intervals = group_intervals(items, prompts, groups)
    return {
        "groups": len(groups),
        "prompts": len(np.unique(prompts[groups])),
        "metrics": {f"eval/{name}": value for name, value in metrics.items()},
        "intervals": {
            f"eval/{name}": None if own is None else list(own) for name, own in intervals.items()
        },
    }


def group_intervals(
    items: GroupItems, prompts: NDArray[np.int64], groups: NDArray[np.int64]
) -> dict[str, Interval | None]:
    """Intervals of 95% of the metrics of some groups.

    The accuracy of pairs that each have a prompt of their own is a share, with a binomial
    interval; all else is bootstrapped over prompts.

    Args:
        items: Measurements of all groups.
        prompts: Number of the prompt of each, (G,).
        groups: Numbers of those that are meant.
    """
    sums = by_prompt(items.sums[groups], prompts[groups])
    found = bootstrap(sums, items.of_sums)
    whole = items.values().get("eval/rewards/accuracies")
    if whole is None:
        return found
    accuracies = whole[groups]
    if len(sums) == len(groups) and np.isin(accuracies, (0.0, 0.5, 1.0)).all():
        found[ACCURACY] = wilson(float(accuracies.sum()), len(groups))
    return found
