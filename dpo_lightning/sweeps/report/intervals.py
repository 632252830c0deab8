"""Losses against the best of several means, bounded for all of them at once. Imports only NumPy.

Hsu's multiple comparisons with the best: whichever configuration is truly the best, its lead over
each other stays below the observed lead plus ``c`` standard errors of the difference, for all
others at once in 95% of sweeps. ``c`` is the quantile of the largest of these ratios (max-t), drawn
from the covariance that items and seeds show. Two things vary: the held-out items, which all
configurations share, and the training, which only several seeds show; seeds are blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
# Beside items the variance of few seeds has no exact distribution, and the draws cover a little
# less than they say: in simulated sweeps of two seeds 93 to 94% at 95. Seeds alone are exact.
_LEVEL_OF_BOTH = 0.97
DRAWS = 10_000
_SEED = 20230529
# One-sided, of a normal distribution: no bound is closer than that of one comparison.
_NORMAL_95 = 1.6449
# What is left of the variance of two that move together is rounding.
_ROUNDING = 1e-12

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Evidence:
    """Observed means of the configurations, and what their errors have in common.

    Attributes:
        means: The mean of each, larger is better, (k,).
        item_covariance: Covariance of the means over another draw of items, (k, k); infinite on
            the diagonal where nothing is known.
        floor: Variance that no difference of two falls below, as few items show no more.
        items: Number of items, None where the means are exact or not paired.
        seed_means: Mean of each seed, (S, k) with S >= 2, or None where there is one seed.
        unit: What the items are.
    """

    means: Array
    item_covariance: Array
    floor: float = 0.0
    items: int | None = None
    seed_means: Array | None = None
    unit: str | None = None

    @property
    def seeds(self) -> int:
        """Seeds that each configuration was trained with."""
        return 1 if self.seed_means is None else len(self.seed_means)


@dataclass(frozen=True, slots=True)
class LossBounds:
    """Each configuration against the best, all at once.

    Attributes:
        best: Position of the largest mean.
        loss: Observed loss against that one, (k,).
        upper: Upper bound of the loss against the true best, (k,).
        may_be_best: True where the configuration may be the true best, (k,).
        quantile: Standard errors that the bounds against the best allow.
        item_variance: Of the difference to the best over another draw of items, (k,).
        seed_variance: The same over other seeds, (k,).
    """

    best: int
    loss: Array
    upper: Array
    may_be_best: NDArray[np.bool_]
    quantile: float
    item_variance: Array
    seed_variance: Array


def from_items(values: Array, *, spread: float, unit: str) -> Evidence:
    """Evidence of metrics that are means over shared items.

    Args:
        values: Shape (k, S, N): configuration, seed, item; all finite, N >= 2.
        spread: What one item may differ by between two configurations; that of one item more is
            the least error of a difference.
        unit: What the items are.
    """
    _, seeds, items = values.shape
    by_item = values.mean(axis=1)
    covariance = np.atleast_2d(np.cov(by_item)) / items
    by_seed = values.mean(axis=2).T if seeds > 1 else None
    return Evidence(
        values.mean(axis=(1, 2)), covariance, (spread / items) ** 2, items, by_seed, unit
    )


def from_seeds(values: Array) -> Evidence:
    """Evidence of metrics that are exact for their policy.

    Args:
        values: Shape (k, S): configuration, seed.
    """
    count, seeds = values.shape
    by_seed = values.T if seeds > 1 else None
    return Evidence(values.mean(axis=1), np.zeros((count, count)), seed_means=by_seed)


def unpaired(means: Array, stderrs: Array) -> Evidence:
    """Evidence of metrics whose items cannot be paired.

    Args:
        means: Shape (k,).
        stderrs: Their standard errors, infinite where they are unknown.
    """
    return Evidence(means, np.diag(np.square(stderrs)))


def against_best(evidence: Evidence, *, draws: int = DRAWS) -> LossBounds:
    """LossBounds of the losses against the best, which hold all at once in 95% of sweeps.

    Args:
        evidence: Of at least one configuration.
        draws: Draws for the quantile.
    """
    means = evidence.means
    items, seeds = _pairwise(evidence.item_covariance), np.zeros((len(means), len(means)))
    if evidence.seed_means is not None:
        seeds = _pairwise(np.atleast_2d(np.cov(evidence.seed_means.T)) / evidence.seeds)
    error = np.sqrt(items + seeds + evidence.floor * ~np.eye(len(means), dtype=bool))
    quantiles = _quantiles(evidence, items, draws)
    lead = means[:, None] - means[None, :]
    # Of j over i, were j the best; the diagonal is no comparison.
    above = lead + quantiles[:, None] * error
    np.fill_diagonal(above, -math.inf)
    best = int(means.argmax())
    return LossBounds(
        best=best,
        loss=means[best] - means,
        upper=np.maximum(0.0, above.max(axis=0)) if len(means) > 1 else np.zeros(1),
        may_be_best=np.array([(np.delete(row, i) >= 0).all() for i, row in enumerate(above)]),
        quantile=float(quantiles[best]),
        item_variance=items[best] + evidence.floor,
        seed_variance=seeds[best],
    )


def _pairwise(covariance: Array) -> Array:
    """Variance of each difference of two."""
    own = covariance.diagonal()
    both = own[:, None] + own[None, :]
    with np.errstate(invalid="ignore"):  # of an infinite one with itself
        found: Array = both - 2 * covariance
        found = np.where(np.isinf(both) | (found > _ROUNDING * both), found, 0.0)
    np.fill_diagonal(found, 0.0)
    return found


def _quantiles(evidence: Evidence, items: Array, draws: int) -> Array:
    """For each configuration as the best: the 95% quantile of its largest ratio to the others.

    A draw is a sweep in which all are equal. Its item part is normal, as a mean over many items
    is. Its seeds are drawn as so many normal ones, and their variance is estimated again from
    these few: that gives the wide tails of few seeds.
    """
    count = len(evidence.means)
    rng = np.random.default_rng(_SEED)
    known = np.where(np.isfinite(evidence.item_covariance), evidence.item_covariance, 0.0)
    weights, vectors = np.linalg.eigh(known)
    root = vectors * np.sqrt(np.maximum(0.0, weights))
    shift = rng.standard_normal((draws, count)) @ root.T
    seeds, level = None, LEVEL
    if evidence.seed_means is not None:
        level = _LEVEL_OF_BOTH if known.any() else LEVEL
        number = len(evidence.seed_means)
        centred = evidence.seed_means - evidence.seed_means.mean(axis=0)
        multipliers = rng.standard_normal((draws, number, number)) / math.sqrt(number - 1)
        seeds = multipliers @ centred  # (draws, S, k)
        shift = shift + seeds.mean(axis=1)
    found = np.empty(count)
    for j in range(count):
        variance = items[j]
        if seeds is not None:
            gaps = seeds[:, :, [j]] - seeds
            variance = variance + gaps.var(axis=1, ddof=1) / seeds.shape[1]
        # Two that are the same in every item and seed have no error, and no gap.
        scale = np.where(variance > 0, 1 / np.sqrt(np.where(variance > 0, variance, 1.0)), 0.0)
        found[j] = np.quantile(((shift[:, [j]] - shift) * scale).max(axis=1), level)
    return np.maximum(found, _NORMAL_95)
