"""Reward and KL of interpolated policies from answers that other models drew, with intervals.

Per prompt they are ratios of weighted means: E[r] = sum w r / sum w, and KL(pi_lam || pi_ref) =
lam E[log pi / pi_ref] - log Z_lam. Of few answers a ratio is biased, and the bias is the same for
all prompts, so that more of them do not average it out. The jackknife over the answers, one left
out of those of its model, takes the bias off and gives the variance.

There are two intervals. *Within* is of the mean over the prompts that were asked, and covers what
other answers to them would give. The other one is of prompts like these, and covers what other
prompts would give as well: it is Student's, of the prompts' estimates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_lightning.objectives.interpolation import (
    MOST_PARETO_K,
    balance_log_weights,
    effective_size,
    pareto_k,
)

# Below it intervals miss more often than they say: of log-ratios at a KL of 2.5 to 40, 8 to 64
# prompts, those of points with 14 and more cover 92 to 98 times in a hundred, of points with 10 to
# 12 down to 85 times.
LEAST_ESS = 14.0

_LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class PromptEstimates:
    """Estimates of one interpolated policy, prompt by prompt; tensors are (..., prompts).

    Attributes:
        reward: Expected reward; None without rewards.
        reward_variance: Variance of each of these estimates, over other answers.
        kl: KL from the reference, nats an answer.
        kl_variance: The same of these.
        ess: Answers of the interpolated policy itself that would be worth as much.
        pareto_k: Shape of the tail of the weights of all prompts together, (...).
    """

    reward: Tensor | None
    reward_variance: Tensor | None
    kl: Tensor
    kl_variance: Tensor
    ess: Tensor
    pareto_k: Tensor

    @property
    def size(self) -> Tensor:
        """Effective answers of a prompt: the harmonic mean over them, (...).

        The error of a prompt's estimate goes with 1 / ess, and prompts are averaged.
        """
        return 1 / (1 / self.ess).mean(-1)

    @property
    def trusted(self) -> Tensor:
        """True where the intervals can be relied upon, (...)."""
        return (self.size >= LEAST_ESS) & (self.pareto_k < MOST_PARETO_K)


@dataclass(frozen=True, slots=True)
class Measured:
    """A mean over prompts with 95% intervals; tensors (...).

    Attributes:
        mean: The mean.
        within: Half the width of the interval for these prompts.
        over_prompts: The same for prompts like these; infinite for one prompt.
    """

    mean: Tensor
    within: Tensor
    over_prompts: Tensor


def estimate_interpolated(
    logps: Tensor,
    counts: Sequence[int],
    lam: float,
    *,
    rewards: Tensor | None,
    reference: int,
    policy: int,
) -> PromptEstimates:
    """Reward and KL of pi_ref^(1 - lam) pi^lam / Z_lam, from answers of several models.

    Args:
        logps: (..., prompts, n, models), float64. Log-probability of each answer under each model;
            answers stand model by model.
        counts: Answers that each model drew to a prompt, at least two each; they sum to n.
        lam: 0 is the reference, 1 the policy.
        rewards: (..., prompts, n). None: only the KL is estimated.
        reference: Place of the reference among the models.
        policy: Place of the policy.
    """
    base = logps[..., reference]
    ratios = logps[..., policy] - base
    log_weights = balance_log_weights(logps, counts, base + lam * ratios)
    shift = log_weights.amax(-1, keepdim=True)
    weights = (log_weights - shift).exp()
    kl, kl_variance = _jackknifed(
        lambda w, s: lam * s / w - w.log(), [weights, weights * ratios], counts
    )
    reward = reward_variance = None
    if rewards is not None:
        reward, reward_variance = _jackknifed(
            lambda w, r: r / w, [weights, weights * rewards], counts
        )
    shares = weights / weights.mean(-1, keepdim=True)
    return PromptEstimates(
        reward=reward,
        reward_variance=reward_variance,
        # log Z of the shifted weights is smaller by the shift.
        kl=kl - shift.squeeze(-1),
        kl_variance=kl_variance,
        ess=effective_size(log_weights),
        pareto_k=pareto_k(shares.flatten(-2)),
    )


def _jackknifed(
    function: Callable[..., Tensor], terms: Sequence[Tensor], counts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """A function of means, without the bias of its curvature, and its variance, (...) each.

    Leaving out one of a model's answers leaves that model its share of the mixture: the mean over
    its answers is then one over the others.

    Args:
        function: From the mean of each term, over all answers.
        terms: (..., n) each.
        counts: Answers of each model.
    """
    total = sum(counts)
    means = [term.mean(-1, keepdim=True) for term in terms]
    value = function(*means)
    bias, variance = torch.zeros_like(value), torch.zeros_like(value)
    parts = [term.split(list(counts), dim=-1) for term in terms]
    for number, count in enumerate(counts):
        without = []
        for mean, part in zip(means, parts, strict=True):
            own = part[number]
            shift = (own.mean(-1, keepdim=True) - own) / (count - 1)
            without.append(mean + count / total * shift)
        values = function(*without)
        centre = values.mean(-1, keepdim=True)
        bias += (count - 1) * (centre - value)
        variance += (count - 1) / count * (values - centre).square().sum(-1, keepdim=True)
    return (value - bias).squeeze(-1), variance.squeeze(-1)


def plain_estimates(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and its variance, prompt by prompt, of answers that a model drew itself.

    Args:
        values: (..., prompts, answers), at least two answers.
    """
    return values.mean(-1), values.var(-1) / values.shape[-1]


def over_prompts(values: Tensor, variances: Tensor, sizes: Tensor) -> Measured:
    """The mean over prompts, with its two intervals.

    Args:
        values: (..., prompts). The estimate of each.
        variances: (..., prompts). Their variances over other answers.
        sizes: (..., prompts). Answers that each rests on: so many say how large its variance is.
    """
    count = values.shape[-1]
    total = variances.sum(-1)
    # Welch and Satterthwaite: how many answers a sum of variances rests on.
    parts = (variances.square() / (sizes - 1).clamp(min=1)).sum(-1)
    degrees = torch.where(parts > 0, total.square() / parts, math.inf)
    within = _student(degrees) * total.sqrt() / count
    if count == 1:
        return Measured(values.mean(-1), within, torch.full_like(within, math.inf))
    spread = values.std(-1) / math.sqrt(count)
    return Measured(values.mean(-1), within, _student(torch.tensor(count - 1.0)) * spread)


def _student(degrees: Tensor) -> Tensor:
    """Two-sided quantile of Student's distribution, of the same shape."""
    # Here, because it takes longer to import than all else.
    from scipy.special import stdtrit

    # Beyond a million degrees it is the normal one.
    quantiles = stdtrit(degrees.clamp(max=1e6).numpy(), (1 + _LEVEL) / 2)
    return torch.as_tensor(quantiles, dtype=torch.float64)
