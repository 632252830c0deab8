"""The theorem of DPO: minimising its loss, on labels of a reward, gives the closed-form optimum."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.objectives.closed_form import fit_tabular_policy, population_loss
from dpo_lightning.objectives.partition import optimal_logps

# KL(pi* || policy) in nats that counts as equal.
EQUAL = 1e-6


@pytest.fixture(scope="module")
def real():
    """The 400 likeliest outcomes of each prompt of the controlled task, and their rewards."""
    task = ControlledTask()
    logps = task.outcome_logps(AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL))
    top = logps.topk(400, dim=1)
    return top.values.log_softmax(1), task.rewards.gather(1, top.indices)


def skewed(seed=0, n=60, spread=3.0):
    """Probabilities down to 1e-9, and the rarest responses the most rewarded."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, 3, n, generator=generator, dtype=torch.float64)
    reference = (torch.linspace(0, -18.4, n, dtype=torch.float64) + 0.5 * noise[0]).log_softmax(1)
    rewards = spread * noise[1] + torch.linspace(0, 8, n, dtype=torch.float64)
    return reference, rewards


# The loss ----------------------------------------------------------------------------------------


def test_the_loss_of_two_responses_by_hand():
    """pi_ref = (1/4, 3/4), sigmoid(r1 - r2) = 2/3, beta * (logratio_1 - logratio_2) = log 3.

    The responses differ with probability 3/8 and then cost
    2/3 * -log(3/4) + 1/3 * -log(1/4) = 0.191788 + 0.462098 = 0.653886; else, log 2 = 0.693147.
    3/8 * 0.653886 + 5/8 * 0.693147 = 0.245207 + 0.433217 = 0.678424.
    """
    reference = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    rewards = torch.tensor([[math.log(2), 0.0]], dtype=torch.float64)
    policy = reference + torch.tensor([[2 * math.log(3), 0.0]], dtype=torch.float64)
    value = population_loss(policy, reference, rewards, 0.5)
    assert value.shape == ()
    assert value.item() == pytest.approx(0.678424, abs=1e-6)


def test_the_loss_is_the_mean_over_draws_of_pairs():
    """40,000 pairs drawn and labelled by chance: within 4 standard errors."""
    generator = torch.Generator().manual_seed(0)
    reference, rewards = skewed(n=20)
    policy = (reference + torch.randn(3, 20, generator=generator, dtype=torch.float64)).log_softmax(
        1
    )
    draws = torch.multinomial(reference.exp(), 80_000, replacement=True, generator=generator)
    logratios = (policy - reference).gather(1, draws).view(3, -1, 2)
    drawn = rewards.gather(1, draws).view(3, -1, 2)
    first = (
        torch.rand(3, 40_000, generator=generator, dtype=torch.float64)
        < (drawn[..., 0] - drawn[..., 1]).sigmoid()
    )
    margins = 0.7 * (logratios[..., 0] - logratios[..., 1])
    losses = -torch.nn.functional.logsigmoid(torch.where(first, margins, -margins))
    expected = population_loss(policy, reference, rewards, 0.7).item()
    error = losses.std().item() / math.sqrt(losses.numel())
    assert abs(losses.mean().item() - expected) < 4 * error


def test_gradient_of_the_loss():
    reference, rewards = skewed(n=5)
    policy = reference.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: population_loss(p, reference, rewards, 0.7), policy)


def test_the_loss_of_the_reference_is_log_2(real):
    value = population_loss(real[0], *real, 0.3)
    assert value.item() == pytest.approx(math.log(2), abs=1e-9)


def test_constants_of_a_prompt_change_no_loss():
    """On the policy's logps (its normaliser) or on the rewards (what log Z would absorb)."""
    reference, rewards = skewed()
    policy = optimal_logps(reference, rewards, 2.0)
    shift = torch.tensor([[5.0], [-300.0], [0.125]], dtype=torch.float64)
    value = population_loss(policy, reference, rewards, 0.7)
    for changed in (
        population_loss(policy + shift, reference, rewards, 0.7),
        population_loss(policy, reference, rewards + shift, 0.7),
    ):
        torch.testing.assert_close(changed, value, rtol=1e-10, atol=0)


# The theorem -------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_the_loss_alone_leads_to_the_closed_form_optimum(real, beta):
    """8 prompts with 400 responses each, rewards up to 17 apart, from the reference on."""
    reference, rewards = real
    fit = fit_tabular_policy(reference, rewards, beta)
    optimum = optimal_logps(reference, rewards, beta)
    assert fit.kl[0].min() > 0.1, "the reference is far from it"
    assert fit.kl[-1].max() < EQUAL
    divergence = (optimum.exp() * (optimum - fit.policy_logps)).sum(1)
    torch.testing.assert_close(fit.kl[-1], divergence, rtol=0, atol=1e-12)
    assert (fit.policy_logps.exp().sum(1) - 1).abs().max() < 1e-12
    assert fit.losses.shape == (len(fit.kl),)
    assert fit.losses[0].item() == pytest.approx(math.log(2))
    assert (fit.losses.diff() < 1e-14).all()
    # Far fewer than with steps of the wrong size or direction.
    assert len(fit.losses) - 1 <= 15


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_rare_responses_are_fitted_too(seed, beta):
    """At beta 0.5 the optimum says responses 100,000 times as often as the reference does."""
    reference, rewards = skewed(seed)
    assert reference.min() < math.log(1e-8)
    fit = fit_tabular_policy(reference, rewards, beta)
    assert fit.kl[-1].max() < EQUAL
    optimum = optimal_logps(reference, rewards, beta)
    torch.testing.assert_close(fit.policy_logps, optimum, rtol=0, atol=1e-4)
    if beta == 0.5:
        assert (optimum - reference).max() > math.log(1e5)


def test_no_space_is_too_extreme():
    """150 spaces of up to 11 responses, probabilities below e^-80, rewards 100 apart.

    In some of them the Hessian is singular to float64 and whole Newton steps would lead away.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        n = int(torch.randint(2, 12, (1,), generator=generator))
        tilt, spread = torch.rand(2, 1, generator=generator, dtype=torch.float64)
        noise = torch.randn(2, 4, n, generator=generator, dtype=torch.float64)
        reference, rewards = (20 * tilt * noise[0]).log_softmax(1), 30 * spread * noise[1]
        fit = fit_tabular_policy(reference, rewards, 0.5)
        assert fit.policy_logps.isfinite().all()
        assert (fit.losses.diff() < 1e-13).all()
        assert fit.kl[-1].max() < EQUAL


def test_the_optimum_has_the_least_loss():
    """Its gradient is 0, and a step to any side costs."""
    reference, rewards = skewed(spread=1.0)
    optimum = optimal_logps(reference, rewards, 0.7).requires_grad_()
    least = population_loss(optimum, reference, rewards, 0.7)
    least.backward()
    assert optimum.grad.abs().max() < 1e-15
    generator = torch.Generator().manual_seed(0)
    for size in (0.01, 0.1, 1.0, 5.0):
        for _ in range(20):
            noise = size * torch.randn(3, 60, generator=generator, dtype=torch.float64)
            assert population_loss(optimum + noise, reference, rewards, 0.7) > least


def test_a_constant_on_the_rewards_of_a_prompt_changes_nothing():
    reference, rewards = skewed()
    shift = torch.tensor([[5.0], [-300.0], [0.125]], dtype=torch.float64)
    before = fit_tabular_policy(reference, rewards, 0.5)
    after = fit_tabular_policy(reference, rewards + shift, 0.5)
    torch.testing.assert_close(after.policy_logps, before.policy_logps, rtol=0, atol=1e-6)
    torch.testing.assert_close(after.losses, before.losses, rtol=0, atol=1e-12)


def test_beta_only_scales_the_logratios():
    """The loss sees beta * logratio alone: the same losses, the same implicit reward."""
    reference, rewards = skewed(spread=1.0)
    one, two = (fit_tabular_policy(reference, rewards, beta) for beta in (1.0, 4.0))
    torch.testing.assert_close(one.losses, two.losses, rtol=0, atol=1e-12)

    def implicit(fit, beta):
        values = beta * (fit.policy_logps - reference)
        return values - values[:, :1]

    torch.testing.assert_close(implicit(two, 4.0), implicit(one, 1.0), rtol=0, atol=1e-6)
    torch.testing.assert_close(implicit(one, 1.0), rewards - rewards[:, :1], rtol=0, atol=1e-6)


def test_what_the_reference_never_says_stays_unsaid():
    """pi_ref = (1/2, 1/4, 1/4, 0) and exp(r / beta) = (1, 2, 4, 8): pi* = (1/4, 1/4, 1/2, 0)."""
    reference = torch.tensor([[0.5, 0.25, 0.25, 0.0]], dtype=torch.float64).log()
    rewards = 0.5 * torch.tensor([[1.0, 2.0, 4.0, 8.0]], dtype=torch.float64).log()
    fit = fit_tabular_policy(reference, rewards, 0.5)
    assert fit.policy_logps.exp()[0].tolist() == pytest.approx([0.25, 0.25, 0.5, 0], abs=1e-9)
    assert fit.kl[-1].item() == pytest.approx(0, abs=1e-12)


def test_steps_are_a_bound():
    reference, rewards = skewed()
    assert fit_tabular_policy(reference, rewards, 0.5, steps=3).kl.shape == (4, 3)
    unchanged = fit_tabular_policy(reference, rewards, 0.5, steps=0)
    torch.testing.assert_close(unchanged.policy_logps, reference)
    assert unchanged.losses.shape == (1,)


def test_wrong_arguments_are_refused():
    reference, rewards = skewed(n=4)
    for arguments, message in (
        ((reference, rewards, 0.0), "beta is 0.0"),
        ((reference, rewards, math.nan), "beta is nan"),
        ((reference, rewards[:, :3], 1.0), r"rewards \(3, 3\)"),
        ((reference[0], rewards[0], 1.0), r"shape \(4,\)"),
        ((reference.float(), rewards, 1.0), "float64"),
        ((reference + 0.1, rewards, 1.0), "not normalised"),
        ((reference, rewards / 0, 1.0), "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            fit_tabular_policy(*arguments)


@pytest.mark.parametrize("jump", [30.0, 40.0, 100.0, 2000.0])
def test_labels_that_are_certain_in_float64_end_the_fit(jump):
    """Across a jump of 35 the loss is 0 to the last bit: no nan, and pi* still holds nothing."""
    reference, _ = skewed()
    rewards = torch.full_like(reference, jump)
    rewards[:, 0] = 0.0
    fit = fit_tabular_policy(reference, rewards, 0.5)
    assert fit.policy_logps.isfinite().all()
    assert (fit.losses.diff() < 1e-14).all()
    assert fit.kl[-1].max() < EQUAL
