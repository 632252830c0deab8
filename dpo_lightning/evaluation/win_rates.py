"""Outcomes of answers against others, and means with intervals. Pure Python, no torch.

The interval of a win rate is Wilson's, over prompts: answers to one prompt count as one, with the
mean of their outcomes. Ties count half, for which the interval is a little wide and never narrow:
no value between 0 and 1 varies more than one that is either.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Hashable, Sequence

from dpo_lightning.errors import UserError

NORMAL_95 = 1.959964

MOST_MISSING = 0.1
"""Share of answers without a mark above which a mean of the others is not given."""


def of_marks(own: float | None, other: float | None) -> float | None:
    """The outcome of two marks: 1 for a higher one, half for a tie, None where one is missing."""
    if own is None or other is None:
        return None
    return 1.0 if own > other else 0.5 if own == other else 0.0


def of_both_orders(first: str | None, swapped: str | None) -> float | None:
    """The outcome of one comparison that was asked in both orders.

    Args:
        first: The better one where ours stood first: ``first``, ``second`` or ``tie``.
        swapped: The better one where ours stood second.

    Returns:
        1 if ours is better both times, 0 if the other is; half where they disagree or say so; None
        where one of the two is missing.
    """
    if first is None or swapped is None:
        return None
    if (first, swapped) == ("first", "second"):
        return 1.0
    return 0.0 if (first, swapped) == ("second", "first") else 0.5


def mean_by_owner(values: Sequence[float | None], owners: Sequence[Hashable]) -> list[float]:
    """The mean of the known values of each owner that has one."""
    found: defaultdict[Hashable, list[float]] = defaultdict(list)
    for value, owner in zip(values, owners, strict=True):
        if value is not None:
            found[owner].append(value)
    return [statistics.fmean(own) for own in found.values()]


def wilson(mean: float, count: int) -> tuple[float, float]:
    """The 95% score interval of a share.

    Args:
        mean: The share.
        count: Number of independent items that it is the mean of.

    Example:
        >>> [round(end, 4) for end in wilson(0.75, 10)]
        [0.4422, 0.9191]
    """
    z2 = NORMAL_95**2
    middle = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_95 * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    # Rounding must not put the mean outside its own interval.
    return min(mean, max(0.0, middle - half)), max(mean, min(1.0, middle + half))


def win_rate(
    outcomes: Sequence[float | None], owners: Sequence[Hashable]
) -> tuple[float, tuple[float, float]] | None:
    """The mean outcome of answers, and its interval over prompts; None where none is known.

    Args:
        outcomes: 1, 0.5 or 0 for each answer, None where it is missing.
        owners: The prompt of each.
    """
    known = [value for value in outcomes if value is not None]
    if not known:
        return None
    mean = statistics.fmean(known)
    return mean, wilson(mean, len(mean_by_owner(outcomes, owners)))


def normal(
    values: Sequence[float | None], owners: Sequence[Hashable]
) -> tuple[float, tuple[float, float]] | None:
    """A mean of answers and its normal 95% interval over prompts, endless for one; None for none.

    Args:
        values: One for each answer, None where it is missing.
        owners: The prompt of each.
    """
    known, means = [v for v in values if v is not None], mean_by_owner(values, owners)
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(means) == 1:
        return mean, (-math.inf, math.inf)
    half = NORMAL_95 * statistics.stdev(means) / math.sqrt(len(means))
    return mean, (mean - half, mean + half)


def why_withheld(values: Sequence[float | None]) -> str | None:
    """Reason why a mean of the known values is not given; None if it may be.

    Args:
        values: None where one is missing.
    """
    missing = sum(value is None for value in values)
    if not values or missing <= MOST_MISSING * len(values):
        return None
    return (
        f"{missing} of {len(values)} answers have no mark, more than {MOST_MISSING:.0%}, so no "
        "mean is reported"
    )


def paired_by_prompt(own: Sequence[Hashable], other: Sequence[Hashable], *, key: str) -> list[int]:
    """Places in another list of the same prompts; the n-th answer goes with the n-th there.

    Args:
        own: Prompt of each answer.
        other: Prompt of each of the others.
        key: Name of the other list.

    Raises:
        UserError: If one of the prompts has no answer there.
    """
    places: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, prompt in enumerate(other):
        places[prompt].append(place)
    found = []
    for number, prompt in enumerate(own, start=1):
        if not places[prompt]:
            text = " ".join(str(prompt).split())[:60]
            raise UserError(
                f"{key}: no answer, or too few, to prompt {number} of the others, {text!r}; both "
                "have to answer the same prompts, each as often"
            )
        found.append(places[prompt].pop(0))
    return found
