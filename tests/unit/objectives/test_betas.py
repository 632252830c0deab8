"""Betas that change, over the run or with the margins of a step."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.objectives.betas import BetaPlan, adapted_beta
from tests.support.properties import examples

betas = st.floats(1e-3, 10)


@pytest.mark.parametrize("step", [0, 1, 7, 99])
def test_constant(step):
    assert BetaPlan(start=0.1, total_steps=10).at(step) == 0.1
    # An end is not looked at, and nor is another schedule without an end.
    assert BetaPlan(start=0.1, end=0.5, total_steps=10).at(step) == 0.1
    assert BetaPlan(start=0.1, schedule="linear", total_steps=10).at(step) == 0.1


def test_linear_by_hand():
    """Five steps from 0.1 to 0.5: 0.1 more each."""
    plan = BetaPlan(start=0.1, end=0.5, schedule="linear", total_steps=5)
    assert [plan.at(i) for i in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


def test_cosine_by_hand():
    """(1 - cos(pi k / 4)) / 2 is 0, 0.146447, 0.5, 0.853553, 1; times a fall by 0.4 from 0.5."""
    plan = BetaPlan(start=0.5, end=0.1, schedule="cosine", total_steps=5)
    expected = [0.5, 0.4414214, 0.3, 0.1585786, 0.1]
    assert [plan.at(i) for i in range(5)] == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@given(start=betas, end=betas, steps=st.integers(2, 5000))
@settings(max_examples=examples(50))
def test_it_starts_and_ends_where_it_is_said_and_is_monotone_between(schedule, start, end, steps):
    plan = BetaPlan(start=start, end=end, schedule=schedule, total_steps=steps)
    assert plan.at(0) == start
    assert plan.at(steps - 1) == pytest.approx(end, rel=1e-12)
    # Beyond either end it stays.
    assert plan.at(-1) == start
    assert plan.at(steps + 10) == plan.at(steps - 1)
    values = [plan.at(i) for i in range(0, steps, max(1, steps // 50))]
    assert values == sorted(values, reverse=end < start)
    assert all(min(start, end) - 1e-12 <= value <= max(start, end) + 1e-12 for value in values)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_run_of_one_step_or_none_has_the_first_beta(schedule):
    for steps in (0, 1):
        plan = BetaPlan(start=0.2, end=0.4, schedule=schedule, total_steps=steps)
        assert plan.at(0) == 0.2


@pytest.mark.parametrize(
    ("plan", "changes"),
    [
        (BetaPlan(start=0.1), False),
        (BetaPlan(start=0.1, end=0.2), False),
        (BetaPlan(start=0.1, schedule="linear"), False),
        (BetaPlan(start=0.1, end=0.2, schedule="linear"), True),
        (BetaPlan(start=0.1, end=0.2, schedule="cosine"), True),
        (BetaPlan(start=0.1, adaptive=0.5), True),
    ],
)
def test_whether_it_changes(plan, changes):
    assert plan.changes is changes


def adapted(beta, margin, average, strength):
    values = torch.tensor([margin, average], dtype=torch.float64)
    return adapted_beta(beta, values[0], values[1], strength=strength)


def test_adapted_by_hand():
    """0.1 * (1 + 0.6 * (1.5 - 1)) = 0.13; with a margin of 0.5, 0.1 * (1 - 0.3) = 0.07."""
    assert adapted(0.1, 1.5, 1.0, 0.6).item() == pytest.approx(0.13, rel=1e-12)
    assert adapted(0.1, 0.5, 1.0, 0.6).item() == pytest.approx(0.07, rel=1e-12)
    assert adapted(0.1, 7.0, 7.0, 0.6).item() == 0.1
    assert adapted(0.1, 7.0, 1.0, 0.0).item() == 0.1


@pytest.mark.parametrize("margin", [-1.0, -10.0, -1e6])
def test_it_stays_above_0(margin):
    """1 + 1 * (margin - 0) <= 0: a thousandth of beta, whatever the margin."""
    assert adapted(0.1, margin, 0.0, 1.0).item() == pytest.approx(1e-4, rel=1e-12)


def test_no_gradient_goes_through_it():
    margin = torch.tensor(0.5, requires_grad=True)
    value = adapted_beta(0.1, margin * 2, torch.tensor(0.25), strength=1.0)
    assert value.ndim == 0
    assert not value.requires_grad
    assert math.isclose(value.item(), 0.1 * 1.75, rel_tol=1e-6)
