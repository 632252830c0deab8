"""The partition function, which turns scores of the responses to one prompt into probabilities.

Two of them appear in preference optimization. Over the responses of one *group*, with scores
s_k = beta * logratio_k, it is Z = sum_k exp(s_k): the normaliser of DPO (two responses) and of
Plackett-Luce (K). Over *every* response, weighted by the reference, it is
Z(x) = sum_y pi_ref(y|x) exp(r(x, y) / beta), Eq. 4 of https://arxiv.org/abs/2305.18290, the
normaliser of the closed-form optimum pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x).

The second is known exactly where every response can be listed, in one tensor
(`exact_log_partition`) or in pieces (`StreamedPartition`), and estimated from the rewards of
samples of the reference where not (`estimate_log_partition`).

Everything stays in logs: exp(-783 * 0.14) is already 0 in float32, and so is the Z of a group of
ordinary long responses.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def log_partition(scores: Tensor, group: Tensor, *, groups: int | None = None) -> Tensor:
    """Log Z of each group: the log-sum-exp of its scores, differentiable.

    Args:
        scores: (N,), floating. The groups' scores, one group after the other.
        group: (N,), int64. The group of each score, numbered 0..n-1 in order.
        groups: n, where the host knows it: then it does not wait for a device.

    Returns:
        (n,), the dtype of `scores` but at least float32. `exp(scores - log_z[group])` sums to 1
        in every group.

    Example:
        A pair and a group of three, each with equal scores: log 2 and log 3.

        >>> scores = torch.zeros(5)  # (N,)
        >>> group = torch.tensor([0, 0, 1, 1, 1])  # (N,)
        >>> log_partition(scores, group)  # (n,)
        tensor([0.6931, 1.0986])
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    shift = _highest(scores, group, groups)
    total = torch.zeros_like(shift).index_add(0, group, (scores - shift[group]).exp())
    return total.log() + shift


def group_shares(scores: Tensor, group: Tensor, *, groups: int | None = None) -> Tensor:
    """Each score's share of its group's partition function: a softmax of each group.

    Taken from differences to the group's highest score, so that the shares of a group sum to 1 as
    closely as the dtype allows, also where log Z itself is large and rounded.

    Args:
        scores: (N,), floating.
        group: (N,), int64. The group of each score, numbered 0..n-1 in order.
        groups: n, where the host knows it.

    Returns:
        (N,), the dtype of `scores` but at least float32.

    Example:
        A score ahead by log 3 has three times the share.

        >>> scores = torch.tensor([3.0, 1.0, 7.0, 7.0]).log()  # (N,)
        >>> group_shares(scores, torch.tensor([0, 0, 1, 1]))  # (N,)
        tensor([0.7500, 0.2500, 0.5000, 0.5000])
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    shift = _highest(scores, group, groups)
    weights = (scores - shift[group]).exp()
    return weights / torch.zeros_like(shift).index_add(0, group, weights)[group]


def _highest(scores: Tensor, group: Tensor, groups: int | None) -> Tensor:
    """The highest score of each group, (n,), no graph; 0 where none is finite."""
    if groups is None:
        groups = int(group[-1]) + 1 if group.numel() else 0
    lowest = scores.new_full((groups,), -math.inf)
    highest = lowest.scatter_reduce(0, group, scores.detach(), "amax")
    # A group of nothing but -inf has log Z = -inf; -inf - -inf would make it nan.
    return torch.where(highest.isfinite(), highest, 0.0)


def exact_log_partition(reference_logps: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """Log Z(x) = log sum_y pi_ref(y|x) exp(r(x, y) / beta), over a space that is enumerated.

    Args:
        reference_logps: (..., responses), floating. log pi_ref of every response; -inf is allowed.
        rewards: (..., responses), floating. The reward of every response.
        beta: Above 0.

    Returns:
        (...), one value per prompt.

    Example:
        One prompt with two responses that the reference likes equally, of which one is worth
        log 3: Z = (1 + 3) / 2 and its log 0.6931.

        >>> reference = torch.tensor([[0.5, 0.5]]).log()  # (prompts, responses)
        >>> rewards = torch.tensor([[1.0, 3.0]]).log()  # (prompts, responses)
        >>> exact_log_partition(reference, rewards, beta=1.0)  # (prompts,)
        tensor([0.6931])
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

    Example:
        The same prompt: the optimum says the better response three times as often.

        >>> reference = torch.tensor([[0.5, 0.5]]).log()  # (prompts, responses)
        >>> rewards = torch.tensor([[1.0, 3.0]]).log()
        >>> optimal_logps(reference, rewards, beta=1.0).exp()  # (prompts, responses)
        tensor([[0.2500, 0.7500]])
    """
    log_z = exact_log_partition(reference_logps, rewards, beta)
    return reference_logps + rewards / beta - log_z.unsqueeze(-1)


def estimate_log_partition(rewards: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Estimates log Z(x) from the rewards of samples drawn from the reference.

    Z(x) is the reference's mean of the weight w = exp(r / beta), so the mean weight of m samples
    estimates it without bias. Its log is low on average, by about `stderr**2 / 2`.

    Trust it where the effective sample size is a fair share of m. Below that the samples rarely
    contain the responses that make up Z: the value is too low, and so is the standard error, which
    cannot exceed 1 whatever happens.

    Args:
        rewards: (..., m), finite, m at least 1. The rewards of m independent samples of the
            reference.
        beta: Finite and above 0.

    Returns:
        Three tensors (...), the dtype of `rewards` but at least float32:

        value: log((w_1 + ... + w_m) / m), differentiable.
        stderr: The standard error of `value` by the delta method, sd(w) / (mean(w) sqrt(m)), sd
            with m - 1; no graph. Infinite for m = 1: a single sample says nothing about it.
        ess: The effective sample size (sum w)^2 / sum w^2 of Kong (1992), from 1 to m; no graph.

    Raises:
        ValueError: For no samples, or a beta out of range.

    Example:
        Four samples of one prompt. The mean weight is (1 + 1 + 1 + 5) / 4 = 2, its log 0.6931.
        The sample of weight 5 makes up most of it: the effective sample size is 8^2 / 28.

        >>> rewards = torch.tensor([[1.0, 1.0, 1.0, 5.0]]).log()  # (prompts, m)
        >>> value, stderr, ess = estimate_log_partition(rewards, beta=1.0)  # (prompts,) each
        >>> value, stderr, ess
        (tensor([0.6931]), tensor([0.5000]), tensor([2.2857]))
    """
    _check_beta(beta)
    if rewards.ndim == 0 or rewards.shape[-1] == 0:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}: it is (..., m), m at least 1")
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))
    m = rewards.shape[-1]
    highest = rewards.detach().amax(-1, keepdim=True)
    # The difference first: at 1e6 a float32 is good to 1/16, but close rewards differ exactly.
    weights = ((rewards - highest) / beta).exp()
    mean = weights.mean(-1)
    value = mean.log() + highest.squeeze(-1) / beta
    with torch.no_grad():
        ess = weights.sum(-1).square() / weights.square().sum(-1)
        if m == 1:
            stderr = torch.full_like(value, math.inf)
        else:
            stderr = weights.std(-1) / (mean * math.sqrt(m))
    return value, stderr, ess


class StreamedPartition:
    """The exact quantities of the closed-form optimum over a space too large for one tensor.

    Responses come in chunks, in any order, each response once; only a few numbers per prompt are
    kept, in float64. The reference is normalised by the mass that came in: with all responses
    added that only removes rounding, and before that the results are those of the reference
    restricted to what was added. `log_z + log_mass` is the plain sum, a lower bound on log Z.

    Example:
        >>> streamed = StreamedPartition(beta=0.1)
        >>> for logps, rewards in chunks:  # doctest: +SKIP
        ...     streamed.add(logps, rewards)
        >>> streamed.log_z  # doctest: +SKIP

    Args:
        beta: Finite and above 0.

    Raises:
        ValueError: For a beta out of range.
    """

    def __init__(self, beta: float) -> None:
        _check_beta(beta)
        self.beta = beta
        self._sums: _Sums | None = None

    def add(self, reference_logps: Tensor, rewards: Tensor) -> None:
        """Takes in a chunk of responses.

        Args:
            reference_logps: (..., n), floating. log pi_ref of n responses; -inf is allowed.
            rewards: (..., n), finite. Their rewards.

        Raises:
            ValueError: For shapes that differ from each other, or in (...) from earlier chunks.
        """
        if reference_logps.ndim == 0 or reference_logps.shape != rewards.shape:
            raise ValueError(
                f"reference_logps has shape {tuple(reference_logps.shape)}, rewards "
                f"{tuple(rewards.shape)}: both are (..., n)"
            )
        reference = reference_logps.detach().double()
        rewards = rewards.detach().double()
        if not reference.shape[-1]:
            return
        if self._sums is None:
            nothing = reference.new_full(reference.shape[:-1], -math.inf)
            self._sums = _Sums(
                offset=rewards[..., 0],
                reference=_RunningMean(nothing),
                optimum=_RunningMean(nothing),
            )
        sums = self._sums
        if reference.shape[:-1] != sums.offset.shape:
            raise ValueError(
                f"this chunk is of prompts {tuple(reference.shape[:-1])}, the ones before of "
                f"{tuple(sums.offset.shape)}"
            )
        centred = rewards - sums.offset.unsqueeze(-1)
        sums.reference.add(reference, centred)
        sums.optimum.add(reference + centred / self.beta, centred)

    @property
    def log_mass(self) -> Tensor:
        """Log of the reference's probability of all that was added, (...); 0 for everything."""
        return self._added().reference.log_weight

    @property
    def log_z(self) -> Tensor:
        """Log Z(x), (...)."""
        return self._centred_log_z() + self._added().offset / self.beta

    @property
    def expected_reward(self) -> Tensor:
        """E[r] under pi*, (...)."""
        return self._added().optimum.mean + self._added().offset

    @property
    def reference_reward(self) -> Tensor:
        """E[r] under the reference, (...)."""
        return self._added().reference.mean + self._added().offset

    @property
    def kl_optimum_reference(self) -> Tensor:
        """KL(pi* || pi_ref) = E*[r] / beta - log Z in nats, (...)."""
        return self._added().optimum.mean / self.beta - self._centred_log_z()

    @property
    def kl_reference_optimum(self) -> Tensor:
        """KL(pi_ref || pi*) = log Z - E_ref[r] / beta in nats, (...)."""
        return self._centred_log_z() - self._added().reference.mean / self.beta

    def _added(self) -> _Sums:
        if self._sums is None:
            raise ValueError("nothing was added yet")
        return self._sums

    def _centred_log_z(self) -> Tensor:
        return self._added().optimum.log_weight - self._added().reference.log_weight


class _RunningMean:
    """A mean under weights that are known by their logs.

    Each chunk moves the mean by its share of the weight. A sum of weights would overflow where
    their logs do not.

    Attributes:
        log_weight: (...), float64. Log of the sum of the weights so far.
        mean: (...), float64. NaN before any weight above 0.
    """

    def __init__(self, nothing: Tensor) -> None:
        self.log_weight = nothing
        self.mean = torch.full_like(nothing, math.nan)

    def add(self, log_weights: Tensor, values: Tensor) -> None:
        """Takes in n values, (..., n) each."""
        log_chunk = torch.logsumexp(log_weights, dim=-1)
        some = log_chunk > -math.inf
        chunk_mean = (log_weights.softmax(-1) * values).sum(-1)
        log_weight = torch.logaddexp(self.log_weight, log_chunk)
        share = (log_chunk - log_weight).exp()
        mean = torch.where(self.log_weight > -math.inf, self.mean, chunk_mean)
        # A chunk of nothing but -inf has a softmax of nan.
        self.mean = torch.where(some, mean + share * (chunk_mean - mean), self.mean)
        self.log_weight = log_weight


@dataclass(frozen=True, slots=True)
class _Sums:
    """Running sums over all chunks.

    Attributes:
        offset: (...), float64. Some reward of each prompt, taken off all of them: a constant shifts
            log Z and the means and leaves the KLs, which would lose their digits next to it.
        reference: The mean of what is left under the reference.
        optimum: The same under pi*.
    """

    offset: Tensor
    reference: _RunningMean
    optimum: _RunningMean


def _check_beta(beta: float) -> None:
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta!r}: must be a finite number > 0")
