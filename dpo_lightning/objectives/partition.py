"""The partition function: what turns scores of the responses to one prompt into probabilities.

Two of them appear in preference optimization. Over the responses of one *group*, with scores
s_k = beta * logratio_k, it is Z = sum_k exp(s_k): the normaliser of DPO (two responses) and of
Plackett-Luce (K). Over *every* response, weighted by the reference, it is
Z(x) = sum_y pi_ref(y|x) exp(r(x, y) / beta), Eq. 4 of https://arxiv.org/abs/2305.18290, the
normaliser of the closed-form optimum pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x).

Everything stays in logs: exp(-783 * 0.14) is already 0 in float32, and so is the Z of a group of
ordinary long responses.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def log_partition(scores: Tensor, group: Tensor) -> Tensor:
    """Log Z of each group: the log-sum-exp of its scores, differentiable.

    Args:
        scores: (N,), floating. The groups' scores, one group after the other.
        group: (N,), int64. The group of each score, numbered 0..n-1 in order.

    Returns:
        (n,), the dtype of `scores` but at least float32. `exp(scores - log_z[group])` sums to 1
        in every group.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    n = int(group[-1]) + 1 if group.numel() else 0
    lowest = scores.new_full((n,), -math.inf)
    highest = lowest.scatter_reduce(0, group, scores.detach(), "amax")
    # A group of nothing but -inf has log Z = -inf; -inf - -inf would make it nan.
    shift = torch.where(highest.isfinite(), highest, 0.0)
    total = scores.new_zeros(n).index_add(0, group, (scores - shift[group]).exp())
    return total.log() + shift


def exact_log_partition(reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Log Z(x) = log sum_y pi_ref(y|x) exp(r(x, y) / beta), over a space that is enumerated.

    Args:
        reference_logps: (..., responses), floating. log pi_ref of every response; -inf is allowed.
        rewards: (..., responses), floating. The reward of every response.
        beta: Above 0.

    Returns:
        (...), one value per prompt.
    """
    return torch.logsumexp(reference_logps + rewards / beta, dim=-1)


def optimal_logps(reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Log pi*(y|x), the policy with the highest E[r] - beta * KL(pi || pi_ref).

    Args:
        reference_logps: (..., responses), floating. log pi_ref of every response; -inf is allowed.
        rewards: (..., responses), floating. The reward of every response. A constant added to all
            rewards of a prompt changes nothing.
        beta: Above 0.

    Returns:
        (..., responses); the probabilities of each prompt's responses sum to 1.
    """
    log_z = exact_log_partition(reference_logps, rewards, beta)
    return reference_logps + rewards / beta - log_z.unsqueeze(-1)
