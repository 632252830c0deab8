"""Policies between a reference and a trained policy, and beyond it: the frontier in one policy.

pi_lam(y|x) = pi_ref(y|x)^(1 - lam) pi(y|x)^lam / Z_lam(x) has the normaliser
Z_lam(x) = E_ref[(pi / pi_ref)^lam], the partition function once more. Where pi is the optimum
pi_ref exp(r / beta) / Z of some reward, (pi / pi_ref)^lam is exp(lam r / beta) up to a constant of
the prompt, so that pi_lam is the optimum of beta / lam: one policy holds all of them.

Answers of several models say what they are worth under pi_lam by importance weights. With n_j
answers of model q_j, n in all, the balance heuristic (Veach and Guibas 1995) weighs each by
pi_lam / sum_j (n_j / n) q_j, whichever model it came from: no weight is large where any of the
models draws enough.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Largest shape of a tail with which a mean of so many weights still settles (Vehtari et al. 2024).
MOST_PARETO_K = 0.7

# Tails are fitted to a fifth of the weights, but to no more than thrice the root of their number.
_TAIL_SHARE = 0.2
_TAIL_ROOTS = 3.0
_LEAST_TAIL = 5
# A tail that rises by no more than this share has no large weight, whatever shape is fitted to it.
_FLAT = 0.5
# Weight of the prior, in weights of the tail, and its mean: the published fit's own.
_PRIOR_COUNT = 10
_PRIOR_SHAPE = 0.5


def interpolated_logps(reference_logps: Tensor, policy_logps: Tensor, lam: float) -> Tensor:
    """Log pi_lam of every response, over a space that is enumerated.

    Args:
        reference_logps: (..., responses), floating. log pi_ref of every response, finite.
        policy_logps: (..., responses), floating. log pi, finite.
        lam: 0 is the reference, 1 the policy; beyond 1 it goes on in the same direction.

    Returns:
        (..., responses); the probabilities of each prompt's responses sum to 1.

    Example:
        Half way from (1/2, 1/2) to (1/5, 4/5) the odds are the root of 4.

        >>> reference = torch.tensor([0.5, 0.5]).log()
        >>> policy = torch.tensor([0.2, 0.8]).log()
        >>> interpolated_logps(reference, policy, 0.5).exp()
        tensor([0.3333, 0.6667])
    """
    scores = reference_logps + lam * (policy_logps - reference_logps)
    return scores.log_softmax(-1)


def log_interpolation_partition(
    reference_logps: Tensor, policy_logps: Tensor, lam: float
) -> Tensor:
    """Log Z_lam(x) = log E_ref[(pi / pi_ref)^lam], over a space that is enumerated; (...)."""
    return torch.logsumexp(reference_logps + lam * (policy_logps - reference_logps), dim=-1)


def balance_log_weights(logps: Tensor, counts: Sequence[int], log_target: Tensor) -> Tensor:
    """Log importance weights of answers of several models, by the balance heuristic.

    Args:
        logps: (..., n, models), floating. Log-probability of each answer under each model.
        counts: Answers that were drawn from each model, which sum to n.
        log_target: (..., n). Log-probability of each answer under the target, up to a constant.

    Returns:
        (..., n). The mean of `exp` of them estimates the target's normaliser without bias.

    Example:
        One answer each of (1/2, 1/2) and (1/5, 4/5), both the second response, which the mixture
        draws with 13/20; the target (1/3, 2/3) weighs it by 40/39.

        >>> logps = torch.tensor([[0.5, 0.8], [0.5, 0.8]]).log()  # (n, models)
        >>> target = torch.tensor([2 / 3, 2 / 3]).log()  # (n,)
        >>> balance_log_weights(logps, [1, 1], target).exp()
        tensor([1.0256, 1.0256])
    """
    shares = torch.tensor(counts, dtype=logps.dtype, device=logps.device) / sum(counts)
    return log_target - torch.logsumexp(logps + shares.log(), dim=-1)


def effective_size(log_weights: Tensor) -> Tensor:
    """Effective sample size (sum w)^2 / sum w^2 of Kong (1992), (..., n) -> (...)."""
    weights = (log_weights - log_weights.amax(-1, keepdim=True)).exp()
    return weights.sum(-1).square() / weights.square().sum(-1)


def pareto_k(weights: Tensor) -> Tensor:
    """Shape of the generalised Pareto distribution that the largest weights follow.

    Moments of order 1 / k and above do not exist; at 0.7 and above a mean of any usual number of
    weights is not to be trusted (Pareto-smoothed importance sampling, arXiv 1507.02646). The fit is
    that of Zhang and Stephens (2009), pulled towards 1/2 by a prior worth ten weights, as there.

    Args:
        weights: (..., n), at least 0. Of 25 at least, so that there is a tail.

    Returns:
        (...), the dtype of `weights`; -inf where the largest weight is at most 1.5 times
        the one that the tail begins behind.

    Raises:
        ValueError: For fewer weights.
    """
    n = weights.shape[-1]
    tail = int(min(_TAIL_SHARE * n, _TAIL_ROOTS * math.sqrt(n)))
    if tail < _LEAST_TAIL:
        raise ValueError(f"{n} weights have no tail to fit: at least 25 are needed")
    largest = weights.topk(tail + 1, dim=-1).values.flip(-1)
    excess = largest[..., 1:] - largest[..., :1]  # in ascending order
    bounded = excess[..., -1] <= _FLAT * largest[..., 0]
    # Values that are not fitted must not make a nan of a gradient or a warning of a log.
    shape = _fitted_shape(torch.where(bounded.unsqueeze(-1), torch.ones_like(excess), excess))
    shape = (tail * shape + _PRIOR_COUNT * _PRIOR_SHAPE) / (tail + _PRIOR_COUNT)
    return torch.where(bounded, -math.inf, shape)


def _fitted_shape(excess: Tensor) -> Tensor:
    """The shape by Zhang and Stephens' weighted mean over a grid of the profile likelihood.

    With theta = -k / sigma, k(theta) is the mean of log(1 - theta x) and the profile likelihood
    n (log(-theta / k) - k - 1). The grid lies below 1 / max x, as far as the first quartile says.
    """
    n = excess.shape[-1]
    points = 30 + int(math.sqrt(n))
    steps = torch.arange(1, points + 1, dtype=excess.dtype, device=excess.device) - 0.5
    largest = excess[..., -1:]
    quartile = excess[..., int(n / 4 + 0.5) - 1].unsqueeze(-1)
    # Of many equal weights the quartile may be 0.
    quartile = torch.where(quartile > 0, quartile, 1e-6 * largest)
    theta = 1 / largest + (1 - (points / steps).sqrt()) / (3 * quartile)  # (..., points)
    k = torch.log1p(-theta.unsqueeze(-1) * excess.unsqueeze(-2)).mean(-1)
    likelihood = n * ((-theta / k).log() - k - 1)
    # At theta = 0 the distribution is exponential, and -theta / k is 0 / 0.
    likelihood = torch.where(likelihood.isnan(), -math.inf, likelihood)
    theta = (likelihood.softmax(-1) * theta).sum(-1, keepdim=True)
    return torch.log1p(-theta * excess).mean(-1)
