"""Interpolated policies, importance weights of several models, the shape of their tail."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.objectives.interpolation import (
    balance_log_weights,
    effective_size,
    interpolated_logps,
    log_interpolation_partition,
    pareto_k,
)
from dpo_lightning.objectives.partition import exact_log_partition, optimal_logps
from tests.support.properties import examples

HALF = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
FIFTH = torch.tensor([0.2, 0.8], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("lam", "first"), [(0.0, 1 / 2), (0.5, 1 / 3), (1.0, 1 / 5), (2.0, 1 / 17)]
)
def test_the_odds_go_with_lambda(lam: float, first: float):
    """From even odds to 1 : 4 the odds are 1 : 4^lam: 1, 2, 4 and 16."""
    found = interpolated_logps(HALF, FIFTH, lam).exp()
    assert found.tolist() == pytest.approx([first, 1 - first])


def test_the_normaliser_is_a_mean_under_the_reference():
    """Z_(1/2) = sqrt(1/2 * 1/5) + sqrt(1/2 * 4/5) = 3 sqrt(1/10); Z_0 = Z_1 = 1."""
    found = [log_interpolation_partition(HALF, FIFTH, lam).exp() for lam in (0.0, 0.5, 1.0)]
    assert [*map(float, found)] == pytest.approx([1.0, 3 * math.sqrt(0.1), 1.0])


values = st.lists(st.floats(-4, 4), min_size=5, max_size=5)


@settings(max_examples=examples(40))
@given(values, values, st.floats(0.05, 5), st.floats(0.05, 4))
def test_the_power_of_an_optimum_is_the_optimum_of_another_beta(scores, rewards, beta, lam):
    """pi* over pi_ref is exp(r / beta) / Z(beta), so log Z_lam = log Z(beta / lam) - lam log Z."""
    reference = torch.tensor(scores, dtype=torch.float64).log_softmax(-1)
    reward = torch.tensor(rewards, dtype=torch.float64)
    optimum = optimal_logps(reference, reward, beta)
    found = interpolated_logps(reference, optimum, lam)
    assert torch.allclose(found, optimal_logps(reference, reward, beta / lam), atol=1e-8)
    log_z = exact_log_partition(reference, reward, beta / lam)
    log_z = log_z - lam * exact_log_partition(reference, reward, beta)
    assert torch.allclose(log_interpolation_partition(reference, optimum, lam), log_z, atol=1e-8)


# Weights ------------------------------------------------------------------------------------------


def test_weights_are_over_the_mixture_by_the_counts():
    """One answer of (1/2, 1/2) and three of (1/5, 4/5).

    The mixture says the first response with 1/4 * 1/2 + 3/4 * 1/5 = 11/40 and the second with
    29/40. The target (1/3, 2/3) weighs them by 40/33 and 80/87, whoever drew them.
    """
    models = torch.stack([HALF, FIFTH], dim=1)  # (responses, models)
    drawn = torch.tensor([1, 0, 1, 0])
    target = torch.tensor([1 / 3, 2 / 3], dtype=torch.float64).log()
    weights = balance_log_weights(models[drawn], [1, 3], target[drawn]).exp()
    assert weights.tolist() == pytest.approx([80 / 87, 40 / 33, 80 / 87, 40 / 33])


def test_the_mean_weight_is_the_normaliser_on_average():
    """Over all eight outcomes of one draw of the first model and two of the second."""
    models, counts = torch.stack([HALF, FIFTH], dim=1), [1, 2]
    log_target = torch.tensor([0.9, -0.4], dtype=torch.float64)
    owners = [0, 1, 1]
    mean = 0.0
    for outcome in itertools.product(range(2), repeat=3):
        drawn = torch.tensor(outcome)
        chance = models[drawn, torch.tensor(owners)].sum().exp()
        weights = balance_log_weights(models[drawn], counts, log_target[drawn]).exp()
        mean += float(chance * weights.mean())
    assert mean == pytest.approx(math.exp(0.9) + math.exp(-0.4))


def test_effective_size():
    """(1 + 1 + 1 + 5)^2 / (1 + 1 + 1 + 25) = 64 / 28; a common factor, however large, is none."""
    log_weights = torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64).log()
    assert float(effective_size(log_weights + 1000)) == pytest.approx(64 / 28)


# Tails --------------------------------------------------------------------------------------------


def quantiles(k: float, n: int = 3000) -> torch.Tensor:
    """Quantiles of the generalised Pareto distribution of shape k: ((1 - u)^-k - 1) / k."""
    rest = 1 - (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return -rest.log() if k == 0 else (rest**-k - 1) / k


@pytest.mark.parametrize("k", [0.0, 0.3, 0.6, 0.8, 1.2])
def test_the_shape_of_a_pareto_tail_is_found(k: float):
    """Beyond any value such a distribution has the same shape.

    The tail is of 3 sqrt(3000) = 164 weights; ten more of shape 1/2 are the prior's.
    """
    expected = (164 * k + 10 * 0.5) / 174
    assert float(pareto_k(quantiles(k))) == pytest.approx(expected, abs=0.06)


def test_a_short_tail_leans_on_the_prior():
    """Of 30 weights 6 are the tail, and 10 of shape 1/2 the prior: a wild fit counts 6 of 16."""
    weights = torch.ones(30, dtype=torch.float64)
    weights[-6:] = 1 + torch.logspace(0, 6, 6, dtype=torch.float64)
    assert pareto_k(weights) > 0.7
    assert pareto_k(quantiles(0.0, 30)) < 0.5


@settings(max_examples=examples(25))
@given(st.integers(0, 10_000), st.floats(1e-6, 1e6))
def test_scale_and_order_do_not_matter(seed: int, scale: float):
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(60, generator=draw, dtype=torch.float64).mul(1.5).exp()
    other = scale * weights[torch.randperm(60, generator=draw)]
    both = pareto_k(torch.stack([other, weights.square()]))
    assert float(both[0]) == pytest.approx(float(pareto_k(weights)), abs=1e-6)
    assert float(both[1]) == pytest.approx(float(pareto_k(weights.square())))


def test_a_tail_without_a_large_weight_has_no_shape():
    """Weights of a policy's own answers, all but the same: what differs in them is rounding."""
    flat = 2 - 1e-12 * quantiles(1.2, 100)
    assert pareto_k(flat) == -math.inf
    assert pareto_k(torch.ones(40, dtype=torch.float64)) == -math.inf
    assert pareto_k(flat + quantiles(1.2, 100)) > 0.7


def test_too_few_weights_have_no_tail():
    with pytest.raises(ValueError, match="24 weights have no tail to fit: at least 25"):
        pareto_k(torch.ones(24))
    assert pareto_k(torch.ones(25)) == -math.inf
