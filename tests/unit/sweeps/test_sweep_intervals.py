"""Losses against the best, bounded for all configurations at once."""

import math
import statistics

import numpy as np
import pytest

from dpo_lightning.sweeps.report.intervals import (
    Evidence,
    against_best,
    from_items,
    from_seeds,
    unpaired,
)


def test_two_that_answered_the_same_items(tmp_path):
    """100 items: one is right where the other is wrong in 10, the other way round in 6.

    The mean difference is 0.04. Squares sum to 16, so the variance of a difference is
    (16 - 100 * 0.04^2) / 99 = 0.16 and of their mean 0.0016; the floor adds (1 / 100)^2. The root
    of 0.0017 is 0.041231. Of one comparison the quantile is 1.645: the worse one loses at most
    0.04 + 1.645 * 0.041231 = 0.1078, and the better one, if the other is truly better, at most
    -0.04 + 0.0678 = 0.0278. Unpaired errors would be sqrt(0.9 * 0.1 / 100) and like it, together
    0.044: the pairing is not a detail.
    """
    one = [1.0] * 84 + [1.0] * 10 + [0.0] * 6
    other = [1.0] * 84 + [0.0] * 10 + [1.0] * 6
    found = against_best(from_items(np.array([[one], [other]]), spread=1.0, unit="rows"))
    assert found.best == 0
    assert found.loss == pytest.approx([0.0, 0.04])
    assert found.quantile == pytest.approx(1.645, rel=0.03)
    assert found.upper == pytest.approx([0.0278, 0.1078], abs=0.0015)
    assert found.may_be_best.tolist() == [True, True]
    assert found.item_variance[1] == pytest.approx(0.0017)


@pytest.mark.parametrize(
    ("others", "quantile"), [(1, 1.645), (2, 1.916), (3, 2.062), (7, 2.340), (15, 2.61)]
)
def test_more_comparisons_need_more_standard_errors(others, quantile):
    """Independent means of one error: one-sided quantiles of Dunnett's tables, correlation 1/2."""
    count = others + 1
    found = against_best(Evidence(np.zeros(count), np.eye(count)))
    assert found.quantile == pytest.approx(quantile, rel=0.03)


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 6.314), (3, 2.920), (5, 2.132)])
def test_few_seeds_need_the_quantiles_of_a_t_distribution(seeds, quantile):
    """Two exact means that differ by seed alone: one-sided t with one degree less than seeds.

    With differences d - 1 … of deviation s the standard error is s / sqrt(seeds).
    """
    differences = np.arange(seeds, dtype=float)
    found = against_best(from_seeds(np.array([differences + 1, np.zeros(seeds)])))
    error = statistics.stdev(differences) / math.sqrt(seeds)
    assert found.quantile == pytest.approx(quantile, rel=0.1)
    assert found.seed_variance[1] == pytest.approx(error**2)
    mean = 1 + (seeds - 1) / 2
    assert found.upper[1] == pytest.approx(mean + found.quantile * error)


def test_what_is_exact_has_no_error_and_what_is_unknown_has_no_bound():
    exact = against_best(from_seeds(np.array([[3.0], [1.0]])))
    assert (exact.upper.tolist(), exact.may_be_best.tolist()) == ([0.0, 2.0], [True, False])
    known = against_best(unpaired(np.array([3.0, 1.0]), np.array([0.3, 0.4])))
    # Errors of two independent means: sqrt(0.09 + 0.16) = 0.5.
    assert known.upper[1] == pytest.approx(2 + 1.645 * 0.5, abs=0.02)
    unknown = against_best(unpaired(np.array([3.0, 1.0]), np.array([0.3, math.inf])))
    assert unknown.upper.tolist() == [math.inf, math.inf]
    assert unknown.may_be_best.all()


def test_items_that_do_not_differ_are_no_proof_of_equality():
    """200 items, the same in both: a next one may differ, so the bound is 1.645 / 200."""
    same = np.ones((2, 1, 200))
    found = against_best(from_items(same, spread=1.0, unit="rows"))
    assert found.upper == pytest.approx([1.645 / 200] * 2, rel=0.03)


def simulated(rng, truth, *, seeds: int, items: int, kind: str, seed_error: float):
    """A sweep: items of different difficulty that all share, seeds as blocks, and own noise."""
    count = len(truth)
    level = np.array(truth)[:, None] + seed_error * rng.normal(size=(count, seeds))
    level = level[:, :, None] + rng.normal(size=items) + 0.6 * rng.normal(size=(count, 1, items))
    values = level + 0.4 * rng.normal(size=(count, seeds, items))
    if kind == "marks":
        return values, np.array(truth)
    error = math.sqrt(1 + 0.6**2 + 0.4**2 + seed_error**2)
    normal = statistics.NormalDist()
    return (values > -1).astype(float), np.array([normal.cdf((1 + x) / error) for x in truth])


def coverage(truth, **settings) -> float:
    """Share of 1,000 sweeps in which every true loss against the true best is within its bound."""
    rng = np.random.default_rng(7)
    covered = 0
    for _ in range(1000):
        values, means = simulated(rng, truth, **settings)
        spread = 1.0 if settings["kind"] == "answers" else float(values.std())
        found = against_best(from_items(values, spread=spread, unit="rows"), draws=500)
        covered += bool((means.max() - means <= found.upper + 1e-12).all())
    return covered / 1000


EQUAL = [0.0] * 6


def test_simultaneous_bounds_cover_in_a_thousand_sweeps():
    """One clearly the best: the bounds of its five rivals hold together in about 95%, no more."""
    found = coverage([*EQUAL[:5], 0.6], seeds=1, items=120, kind="answers", seed_error=0.0)
    assert 0.935 <= found <= 0.975


@pytest.mark.long
@pytest.mark.slow  # repeats the quick one, for marks, for seeds, and where all are equal
@pytest.mark.parametrize("kind", ["marks", "answers"])
@pytest.mark.parametrize(
    ("truth", "seeds", "seed_error"),
    [
        (EQUAL, 1, 0.0),
        (EQUAL, 3, 0.1),
        ([*EQUAL, 0.1, 0.2], 1, 0.0),
        ([*EQUAL, 0.6], 2, 0.1),
        ([*EQUAL, 0.6], 3, 0.1),
        ([0.0, 0.1, 0.2, 0.3, 0.4], 3, 0.05),
    ],
)
def test_simultaneous_bounds_cover_whatever_is_true(kind, truth, seeds, seed_error):
    found = coverage(truth, seeds=seeds, items=150, kind=kind, seed_error=seed_error)
    assert found >= 0.935


@pytest.mark.slow  # the same, of the ratio that the bounds are made of
def test_the_lead_of_one_named_before_is_bounded_in_95_percent_where_all_are_equal():
    """All equal: no other's lead over the first may pass its bound, and it does in 5%.

    There the losses themselves, all 0, are always covered; this is what their bounds rest on.
    """
    rng = np.random.default_rng(3)
    passed = 0
    for _ in range(1000):
        values, _ = simulated(rng, EQUAL, seeds=1, items=150, kind="answers", seed_error=0.0)
        means = values.mean(axis=(1, 2))
        # As if the first were the best: it is put far ahead, and what it leads by is known.
        lead = 10.0
        shifted = values + np.array([lead, 0, 0, 0, 0, 0])[:, None, None]
        found = against_best(from_items(shifted, spread=1.0, unit="rows"), draws=500)
        assert found.loss[1] == pytest.approx(lead + means[0] - means[1])
        passed += bool((found.upper[1:] < lead).any())
    assert 0.03 <= passed / 1000 <= 0.065
