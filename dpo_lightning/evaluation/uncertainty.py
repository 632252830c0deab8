"""Intervals of 95% around metrics of held-out prompts. Imports only NumPy.

Rows of one prompt go together, so prompts are what is drawn anew: a percentile bootstrap over them.
A share of pairs that are right or wrong has Wilson's binomial interval instead, as a bootstrap of
pairs that are all right would have no width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
SEED = 20230529
_NORMAL_95 = 1.959964

Interval = tuple[float, float]
Array = NDArray[np.float64]


def by_prompt(values: Array, prompts: NDArray[np.int64]) -> Array:
    """Sums over the rows of each prompt.

    Args:
        values: (G, C), or (G,).
        prompts: Number of the prompt of each row, (G,).

    Returns:
        (P, C), or (P,).
    """
    _, places = np.unique(prompts, return_inverse=True)
    found = np.zeros((places.max(initial=-1) + 1, *values.shape[1:]))
    np.add.at(found, places, values)
    return found


def bootstrap(
    sums: Array, statistic: Callable[[Array], dict[str, float]]
) -> dict[str, Interval | None]:
    """Percentile intervals over prompts of whatever is made of sums.

    Args:
        sums: What each prompt adds, (P, C).
        statistic: Values by name, of the sums of all, (C,).

    Returns:
        The intervals by name; None where there is one prompt, or a value is not finite.
    """
    count = len(sums)
    whole = statistic(sums.sum(axis=0))
    if count < 2:
        return dict.fromkeys(whole)
    rng = np.random.default_rng(SEED)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES) @ sums
    found = [statistic(row) for row in drawn]
    return {
        name: _percentiles([values[name] for values in found], value)
        for name, value in whole.items()
    }


def bootstrap_mean(values: Array, prompts: NDArray[np.int64]) -> Interval | None:
    """Percentile interval over prompts of a mean over rows.

    Args:
        values: Of each row, (G,).
        prompts: Number of the prompt of each row, (G,).
    """
    if not np.isfinite(values).all():
        return None
    sums = by_prompt(np.stack([values, np.ones_like(values)], axis=1), prompts)
    return bootstrap(sums, lambda total: {"mean": float(total[0] / total[1])})["mean"]


def _percentiles(values: list[float], value: float) -> Interval | None:
    known = np.array(values)
    known = known[np.isfinite(known)]
    if not math.isfinite(value) or not len(known):
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    # Rounding must not put a value outside its own interval.
    return min(float(low), value), max(float(high), value)


def wilson(right: float, count: int) -> Interval:
    """Wilson's interval of a share.

    Args:
        right: Number of those that are right; a tie is one half.
        count: Number of all, 1 or more.

    Example:
        >>> low, high = wilson(8, 10)
        >>> round(low, 3), round(high, 3)
        (0.49, 0.943)
    """
    share, z2 = right / count, _NORMAL_95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    half = _NORMAL_95 * spread / (1 + z2 / count)
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))
