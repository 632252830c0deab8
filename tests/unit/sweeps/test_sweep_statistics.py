"""Bootstraps and the paired test."""

import math

import numpy as np
import pytest

from dpo_lightning.sweeps.report.statistics import (
    Estimate,
    moved,
    over_items,
    over_seeds,
    paired_test,
    single,
)


def test_items_of_one_seed_give_the_usual_standard_error():
    """Values 0 and 1, 450 of 1000 right: sqrt(0.45 * 0.55 / 1000) = 0.015732."""
    found = over_items([[1.0] * 450 + [0.0] * 550])
    assert found.mean == 0.45
    assert found.stderr == pytest.approx(0.015732, rel=0.06)
    assert found.low == pytest.approx(0.45 - 1.96 * 0.015732, abs=0.004)
    assert found.high == pytest.approx(0.45 + 1.96 * 0.015732, abs=0.004)


def test_seeds_that_disagree_widen_the_interval():
    """Items all alike, seeds 0.4 and 0.6: a mean of two drawn seeds is 0.4, 0.5 or 0.6.

    Its deviation is sqrt(0.5 * 0.01) = 0.0707, whatever the number of items.
    """
    found = over_items(np.repeat([[0.4], [0.6]], 500, axis=1))
    assert found.mean == pytest.approx(0.5)
    assert found.stderr == pytest.approx(0.0707, rel=0.05)
    assert (found.low, found.high) == pytest.approx((0.4, 0.6))


def test_seeds_alone():
    """1, 2, 3: deviation 1 (n - 1), standard error 1 / sqrt(3)."""
    found = over_seeds([1.0, 2.0, 3.0])
    assert (found.mean, found.stderr) == (2.0, pytest.approx(1 / math.sqrt(3)))
    assert 1.0 <= found.low < 2.0 < found.high <= 3.0


def test_one_value_with_and_without_an_error():
    assert single(2.0, None) == Estimate(2.0, None, None, None)
    assert single(2.0, 0.5).low == pytest.approx(2 - 1.96 * 0.5, abs=1e-3)
    assert moved(single(2.0, 0.5), 3.0).high == pytest.approx(3 + 1.96 * 0.5, abs=1e-3)


def test_the_paired_test_sees_what_is_there_and_not_what_is_not():
    draw = np.random.default_rng(0)
    noise = draw.normal(size=400)
    assert paired_test(noise + 0.3).p < 0.001
    assert paired_test(noise - noise.mean()).p > 0.9
    found = paired_test(noise + 0.3)
    assert found.count == 400
    assert found.difference == pytest.approx((noise + 0.3).mean())
    assert found.low < found.difference < found.high


@pytest.mark.slow
def test_the_paired_test_keeps_its_level():
    """Of 200 samples without an effect about 5% have p below 0.05."""
    draw = np.random.default_rng(1)
    hits = sum(paired_test(draw.normal(size=12)).p < 0.05 for _ in range(200))
    assert 2 <= hits <= 22


def test_all_signs_of_few_differences():
    """Four differences of one sign: 2 of 16 sign patterns are as extreme."""
    assert paired_test([1.0, 2.0, 1.5, 1.2]).p == pytest.approx(2 / 16)
