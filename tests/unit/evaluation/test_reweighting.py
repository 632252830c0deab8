"""Interpolated policies from other models' answers: bias, variance, intervals, what is shown."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.evaluation.one_policy import LAMBDAS, plan_mixtures
from dpo_lightning.evaluation.reweighting import (
    PromptEstimates,
    estimate_interpolated,
    over_prompts,
    plain_estimates,
)
from dpo_lightning.objectives.partition import optimal_logps
from tests.support.redraws import Coverage, Enumerated, Normal, coverage, pooled


def estimate(logps, counts, lam, rewards=None):
    return estimate_interpolated(logps, counts, lam, rewards=rewards, reference=0, policy=1)


def tensor(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_of_equal_models_it_is_a_stratified_mean():
    """Sixteen answers twice, all of weight 1; the means of the halves are 2 and 5, so 3.5.

    Of each half one in two is a above and one a below its mean, a = 1 and 2: variances 16/15 and
    64/15, of means of 16 a sixteenth of that, weighed by (1/2)^2: (16 + 64) / 15 / 16 / 4 = 1/12.
    """
    rewards = torch.cat([tensor(1, 3).repeat(8), tensor(3, 7).repeat(8)])[None]
    found = estimate(torch.full((1, 32, 2), -1.5).double(), [16, 16], 0.7, rewards)
    assert float(found.reward) == pytest.approx(3.5)
    assert float(found.reward_variance) == pytest.approx(1 / 12)
    assert float(found.kl) == pytest.approx(0.0, abs=1e-12)
    assert float(found.ess) == pytest.approx(32)
    assert float(found.pareto_k) == -math.inf


def left_out(weights, ratios, rewards, counts, lam):
    """Reward and KL, bias and variance of each, by the jackknife written out as loops."""
    n = sum(counts)
    owner = [model for model, count in enumerate(counts) for _ in range(count)]

    def values(shares):
        z = sum(s * w for s, w in zip(shares, weights, strict=True))
        reward = sum(s * w * r for s, w, r in zip(shares, weights, rewards, strict=True)) / z
        ratio = sum(s * w * x for s, w, x in zip(shares, weights, ratios, strict=True)) / z
        return reward, lam * ratio - math.log(z)

    whole = values([1 / n] * n)
    bias, variance = [0.0, 0.0], [0.0, 0.0]
    for model, count in enumerate(counts):
        # The others of this model stand for all of its share.
        without = [
            values(
                [
                    0.0 if j == i else count / n / (count - 1) if owner[j] == model else 1 / n
                    for j in range(n)
                ]
            )
            for i in range(n)
            if owner[i] == model
        ]
        for which in range(2):
            mean = sum(v[which] for v in without) / count
            bias[which] += (count - 1) * (mean - whole[which])
            variance[which] += (count - 1) / count * sum((v[which] - mean) ** 2 for v in without)
    return [whole[which] - bias[which] for which in range(2)], variance


def test_estimates_are_those_of_the_jackknife_written_out():
    """Three models of 4 responses, 12, 9 and 5 answers, at 1.3 times the way."""
    torch.manual_seed(3)
    models = torch.randn(3, 4).double().log_softmax(-1)
    counts, lam = [12, 9, 5], 1.3
    drawn = torch.cat(
        [torch.multinomial(m.exp(), c, True) for m, c in zip(models, counts, strict=True)]
    )
    logps = models.T[drawn]  # (n, models)
    rewards = torch.randn(26).double()
    mixture = sum(c / 26 * logps[:, j].exp() for j, c in enumerate(counts))
    ratios = logps[:, 1] - logps[:, 0]
    weights = (logps[:, 0] + lam * ratios).exp() / mixture
    [reward, kl], variances = left_out(
        weights.tolist(), ratios.tolist(), rewards.tolist(), counts, lam
    )
    found = estimate(logps[None], counts, lam, rewards[None])
    assert float(found.reward) == pytest.approx(reward)
    assert float(found.kl) == pytest.approx(kl)
    assert float(found.reward_variance) == pytest.approx(variances[0])
    assert float(found.kl_variance) == pytest.approx(variances[1])


def test_log_probabilities_of_long_answers_are_taken():
    """exp(-2000) is 0, and a common shift of a prompt's answers changes no estimate."""
    torch.manual_seed(0)
    logps = torch.randn(2, 40, 2).double()
    near = estimate(logps, [20, 20], 0.5, torch.randn(2, 40).double())
    far = estimate(logps - 2000, [20, 20], 0.5)
    assert torch.allclose(near.kl, far.kl)
    assert torch.allclose(near.ess, far.ess)
    assert far.reward is None


def test_the_size_is_a_harmonic_mean():
    """A prompt of 8 answers weighs errors as three of 24 do: 2 / (1/8 + 1/24) = 12."""
    found = estimate(torch.zeros(2, 32, 2).double(), [16, 16], 0.5)
    found = PromptEstimates(None, None, found.kl, found.kl_variance, tensor(8, 24), found.pareto_k)
    assert float(found.size) == pytest.approx(12)
    assert not found.trusted


@pytest.mark.parametrize(
    ("ess", "shape", "trusted"), [(14, 0.69, True), (13.9, 0.69, False), (30, 0.7, False)]
)
def test_a_point_needs_answers_and_a_light_tail(ess: float, shape: float, trusted: bool):
    found = PromptEstimates(None, None, tensor(0), tensor(0), tensor(ess), torch.tensor(shape))
    assert bool(found.trusted) == trusted


def test_intervals_by_hand():
    """Prompts at 3 and 5, each of variance 5/8 from 4 answers.

    For these prompts: variances sum to 5/4, known by (5/4)^2 / (2 (5/8)^2 / 3) = 6 degrees of
    freedom, t = 2.4469, so half of it is 2.4469 sqrt(5/4) / 2. For prompts like these: deviation
    sqrt(2), over sqrt(2) prompts is 1, and t of one degree 12.7062.
    """
    found = over_prompts(tensor(3, 5), tensor(0.625, 0.625), tensor(4, 4))
    assert float(found.mean) == 4
    assert float(found.within) == pytest.approx(2.446912 * math.sqrt(1.25) / 2, rel=1e-5)
    assert float(found.over_prompts) == pytest.approx(12.706205, rel=1e-5)


def test_one_prompt_says_nothing_of_others():
    found = over_prompts(tensor(3), tensor(0.25), tensor(5))
    assert float(found.within) == pytest.approx(2.776445 * 0.5, rel=1e-5)
    assert float(found.over_prompts) == math.inf


def test_values_that_do_not_vary_are_certain():
    found = over_prompts(tensor(0, 0), tensor(0, 0), tensor(16, 16))
    assert (float(found.within), float(found.over_prompts)) == (0.0, 0.0)


def test_plain_answers():
    """1, 2, 6: mean 3, variance ((-2)^2 + (-1)^2 + 3^2) / 2 = 7, of the mean a third of that."""
    mean, variance = plain_estimates(tensor(1, 2, 6)[None])
    assert (float(mean), float(variance)) == pytest.approx((3.0, 7 / 3))


# Coverage -----------------------------------------------------------------------------------------


def covers(found: Coverage) -> bool:
    return 0.92 <= found.reward <= 0.98 and 0.92 <= found.kl <= 0.98


@pytest.fixture(scope="module")
def embedded() -> Enumerated:
    """The embedded task's reference, and the optimum of beta 0.5 as the policy; 2.8 nats away."""
    task = ControlledTask()
    reference = task.outcome_logps(AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL).eval())
    policy = optimal_logps(reference, task.rewards, 0.5)
    return Enumerated(torch.stack([reference, policy]), [16, 16], task.rewards)


def test_shown_points_of_the_embedded_task_are_covered(embedded):
    """A thousand redraws of 16 + 16 answers to the eight prompts, at beta 5 to 0.5."""
    found = {lam: coverage(embedded, lam, draws=1000) for lam in (0.1, 0.5, 1.0)}
    assert all(covers(one) for one in found.values()), found
    assert all(one.shown > 0.9 for one in found.values()), found


def test_points_far_from_what_was_drawn_are_not_shown(embedded):
    """Beta 0.1, which rests on answers that nobody drew."""
    assert coverage(embedded, 5.0, draws=200).shown == 0


@pytest.mark.parametrize(("kl", "lam"), [(10, 0.5), (20, 0.25), (20, 0.5), (40, 0.5), (2.5, 2.0)])
def test_points_between_models_far_apart_are_not_shown(kl: float, lam: float):
    """At KL 20 and lambda 0.5 the KL is 5 nats, and two models' answers would say 7 to 8."""
    models = Normal(kl, 32, [0.0, 1.0], [16, 16])
    assert coverage(models, lam, draws=100).shown == 0


def test_answers_drawn_on_the_way_make_a_point_known():
    """The same place with four answers to each prompt from nearby."""
    models = Normal(20, 32, [0.0, 1.0, 0.4, 0.5, 0.6], [16, 16, 8, 8, 8])
    found = coverage(models, 0.5, draws=300)
    assert found.shown == 1
    assert covers(found)


@pytest.mark.slow  # a thousand redraws of ten points, twice
@pytest.mark.parametrize("prompts", [8, pytest.param(64, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "kl", [2.5, *(pytest.param(kl, marks=pytest.mark.long) for kl in (10, 20, 40))]
)
def test_shown_points_of_normal_log_ratios_are_covered(kl: float, prompts: int):
    """With policy and reference alone, and with what the command draws beside them."""
    mixtures = plan_mixtures(LAMBDAS, prompts=prompts, seed=0)
    lambdas, counts = [m.lam for m in mixtures], [m.count for m in mixtures]
    for used in (2, len(lambdas)):
        models = Normal(kl, prompts, lambdas[:used], counts[:used])
        found = [coverage(models, lam, draws=1000) for lam in (*LAMBDAS, 0.9, 1.25)]
        print(f"KL {kl:g}, {prompts} prompts, {used} models: {pooled(found)}")
        assert covers(pooled(found)), found
        for one in found:
            assert one.shown < 0.1 or covers(one), found
