"""Intervals over prompts: against formulas, and where there is nothing to draw."""

import math

import numpy as np
import pytest

from dpo_lightning.evaluation.uncertainty import bootstrap, bootstrap_mean, by_prompt, wilson


def mean(sums: np.ndarray) -> dict[str, float]:
    return {"mean": float(sums[0] / sums[1])}


def test_rows_of_one_prompt_add_up():
    values = np.array([[1.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    assert by_prompt(values, np.array([7, 3, 7])).tolist() == [[2.0, 1.0], [5.0, 2.0]]
    assert by_prompt(np.array([1.0, 2.0]), np.array([0, 0])).tolist() == [3.0]


def test_the_interval_of_a_mean_has_the_usual_width():
    """450 of 1000 right: 1.96 * sqrt(0.45 * 0.55 / 1000) = 0.0308 to each side."""
    values = np.array([1.0] * 450 + [0.0] * 550)
    low, high = bootstrap_mean(values, np.arange(1000))
    assert low == pytest.approx(0.45 - 0.0308, abs=0.004)
    assert high == pytest.approx(0.45 + 0.0308, abs=0.004)


def test_rows_of_one_prompt_are_drawn_together():
    """Ten prompts with a hundred equal rows each say as much as ten rows: sqrt(100) times wider."""
    of_prompt = np.random.default_rng(0).normal(size=10)
    values, prompts = np.repeat(of_prompt, 100), np.repeat(np.arange(10), 100)
    together = bootstrap_mean(values, prompts)
    apart = bootstrap_mean(values, np.arange(1000))
    width = [high - low for low, high in (together, apart)]
    assert width[0] / width[1] == pytest.approx(10, rel=0.15)


def test_a_ratio_is_drawn_as_one():
    """Prompts of 1 and of 3 rows, all rows 0.5: the mean is 0.5 in every draw."""
    sums = np.array([[0.5, 1.0], [1.5, 3.0]])
    assert bootstrap(sums, mean) == {"mean": (0.5, 0.5)}


def test_one_prompt_or_no_number_has_no_interval():
    assert bootstrap(np.array([[1.0, 1.0]]), mean) == {"mean": None}
    assert bootstrap_mean(np.array([1.0, math.nan]), np.arange(2)) is None
    assert bootstrap(np.ones((2, 2)), lambda _: {"x": math.nan}) == {"x": None}


def test_a_share_has_a_width_where_all_are_right():
    """z = 1.96, z^2 = 3.8415: 20 of 20 is 1/(1 + z^2/20) = 0.8389 to 1; 8 of 10 by the formula."""
    assert wilson(20, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
