"""Statistics of a metric over a few seeds and many evaluated items. Imports only NumPy.

Items (evaluation groups or sampled prompts) are the same for every seed, so both are resampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
PERMUTATIONS = 9999
SEED = 20230529
_NORMAL_95 = 1.959964
# Numbers held at once while resampling; more only costs memory.
_BLOCK = 2_000_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its uncertainty.

    Attributes:
        mean: The mean.
        stderr: Its standard error, 0 where the value is exact, None where it is unknown.
        low: Lower end of the 95% interval, if known.
        high: Upper end of it.
    """

    mean: float
    stderr: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class PairedTest:
    """A paired comparison.

    Attributes:
        difference: Mean of the differences.
        low: Lower end of its 95% bootstrap interval.
        high: Upper end of it.
        p: Two-sided p-value of the sign-flip permutation test.
        count: Number of differences.
    """

    difference: float
    low: float
    high: float
    p: float
    count: int


def over_items(values: ArrayLike) -> Estimate:
    """Two-level bootstrap: seeds are drawn with replacement, then items.

    Args:
        values: One row per seed, one column per item, all finite, shape (S, N).
    """
    array = np.asarray(values, dtype=np.float64)
    means = _resampled_means(array)
    return _from_resamples(float(array.mean()), means, float(means.std()))


def over_seeds(values: ArrayLike) -> Estimate:
    """Mean of one value per seed: its standard error, and a bootstrap over the seeds.

    Args:
        values: At least two finite values, shape (S,).
    """
    array = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(SEED).integers(len(array), size=(RESAMPLES, len(array)))
    stderr = float(array.std(ddof=1)) / math.sqrt(len(array))
    return _from_resamples(float(array.mean()), array[draws].mean(axis=1), stderr)


def single(mean: float, stderr: float | None) -> Estimate:
    """One value with the standard error that was reported with it, if any."""
    if stderr is None:
        return Estimate(mean, None, None, None)
    return Estimate(mean, stderr, mean - _NORMAL_95 * stderr, mean + _NORMAL_95 * stderr)


def moved(estimate: Estimate, mean: float) -> Estimate:
    """The same spread around another mean: the metric weighs items, its resamples do not."""
    shift = mean - estimate.mean
    low = None if estimate.low is None else estimate.low + shift
    high = None if estimate.high is None else estimate.high + shift
    return Estimate(mean, estimate.stderr, low, high)


def paired_test(differences: ArrayLike) -> PairedTest:
    """Tests whether paired differences are centred on zero.

    Args:
        differences: One per item or seed, at least two and all finite, shape (N,).
    """
    # Here, because it takes longer to import than all else of a report's numbers.
    from scipy.stats import permutation_test

    array = np.asarray(differences, dtype=np.float64)
    interval = over_items(array[None, :])
    if interval.low is None or interval.high is None:  # pragma: no cover
        raise AssertionError("a bootstrap has an interval")
    # Of one sample it flips signs, which is what exchanging the two of a pair does.
    test = permutation_test(
        (array,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=PERMUTATIONS,
        batch=max(1, _BLOCK // len(array)),
        alternative="two-sided",
        rng=np.random.default_rng(SEED),
    )
    p = float(np.clip(test.pvalue, 0, 1))
    return PairedTest(interval.mean, interval.low, interval.high, p, len(array))


def _resampled_means(values: NDArray[np.float64]) -> NDArray[np.float64]:
    seeds, items = values.shape
    rng = np.random.default_rng(SEED)
    means = np.empty(RESAMPLES)
    block = max(1, _BLOCK // items)
    for start in range(0, RESAMPLES, block):
        count = min(block, RESAMPLES - start)
        drawn = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=count) / seeds
        picked = rng.integers(items, size=(count, items))
        # The mean over the drawn seeds of each item, then over the drawn items.
        means[start : start + count] = np.take_along_axis(drawn @ values, picked, axis=1).mean(1)
    return means


def _from_resamples(mean: float, means: NDArray[np.float64], stderr: float) -> Estimate:
    low, high = np.percentile(means, [2.5, 97.5])
    # Rounding must not put the mean outside its own interval.
    return Estimate(mean, stderr, min(float(low), mean), max(float(high), mean))
