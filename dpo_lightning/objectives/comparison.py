"""From the log-probabilities of the responses of a micro-batch to its loss and metric sums.

A pairwise loss on K ranked responses uses every strictly ranked pair of a group, each response
scored once, and is averaged over the pairs of a group; a listwise loss has one value per group. An
objective is a weighted sum of those, averaged over groups by their weight, sum(w * loss) / sum(w).
Everything here is a sum, so micro-batches, steps and ranks simply add up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dpo_lightning.objectives.listwise import listwise_loss
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.objectives.pairwise import pairwise_loss
from dpo_lightning.objectives.partition import group_shares, log_partition
from dpo_lightning.objectives.registry import PairwiseLoss

# Margins below this share of the log-probabilities that they are made of are rounding: a tie. Only
# so are policy and reference the same at the start when the two were computed in other batches.
_TIE = 1e-6

# The entries of a vector of metric sums, in order.
SUMS = (
    "loss",
    "weight",
    "groups",
    "accuracy",
    "log_z",
    "best_share",
    "best",
    "best_logps",
    "best_logratios",
    "rest",
    "rest_logps",
    "rest_logratios",
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Contribution of a micro-batch to its step.

    Attributes:
        loss: Sum over its groups of weight times loss, a scalar with a graph, float32.
        sums: The entries of ``SUMS``, shape (12,), float64 (float32 on MPS), no graph.
        accuracies: Share of each group's pairs that the policy ranks right, a tie counting one
            half, shape (G,), float32, no graph.
        losses: Loss of each group, shape (G,), no graph.
        policy_logps: What was compared, shape (N,), no graph.
        reference_logps: What it was compared with, shape (N,), or None without a reference.
    """

    loss: Tensor
    sums: Tensor
    accuracies: Tensor
    losses: Tensor
    policy_logps: Tensor
    reference_logps: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Inputs per token, for length desensitising and for weights by likelihood.

    Attributes:
        policy_logps: Log-probability of each scored token under the policy, shape (S,), float32.
        reference_logps: The same under the reference, or None without one.
        collisions: Log of the sum of squared probabilities of all tokens at each place, shape (S,),
            float32, no graph; None where nothing is weighted by likelihood.
        response: Which response each scored token belongs to, in order, shape (S,), int64.
    """

    policy_logps: Tensor
    reference_logps: Tensor | None
    collisions: Tensor | None
    response: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Logps:
    """Log-probabilities of the N responses of a micro-batch.

    Attributes:
        policy: Of each response under the policy, shape (N,), float32.
        reference: The same under the reference, or None without one: then the log-ratio is the
            log-probability itself, as in the reference-free loss.
        tokens: Needed by objectives that desensitise to lengths or weigh by likelihood.
    """

    policy: Tensor
    reference: Tensor | None = None
    tokens: Tokens | None = None

    def ratios(self) -> Tensor:
        """Log-ratio of each response, shape (N,)."""
        return self.policy if self.reference is None else self.policy - self.reference


class RankedResponses(Protocol):
    """N ranked responses in G groups with M strictly ranked pairs; a ``GroupBatch`` is such."""

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, shape (N,), int64."""

    @property
    def group(self) -> Tensor:
        """Group of each response, numbered 0..G-1 in order, shape (N,), int64."""

    @property
    def rank(self) -> Tensor:
        """Rank of each response, 1 is best, shape (N,), int64."""

    @property
    def weight(self) -> Tensor:
        """Weight of each group, shape (G,), float32."""

    @property
    def chosen(self) -> Tensor:
        """Better response of each strictly ranked pair, shape (M,), int64."""

    @property
    def rejected(self) -> Tensor:
        """Worse response of each pair, shape (M,), int64."""

    @property
    def best(self) -> Tensor | None:
        """Responses of rank 1, int64; None waits for the device to find them."""

    @property
    def largest_group(self) -> int | None:
        """Responses of the largest group; None waits for the device to count them."""

    @property
    def pair_share(self) -> Tensor | None:
        """Share of each pair in its group, shape (M,), float32; None for equal ones."""

    @property
    def target_margin(self) -> Tensor | None:
        """Margin that a group's better response is to have, shape (G,), float32; None for 0."""


def compare_responses(
    objective: ObjectiveSettings,
    batch: RankedResponses,
    logps: Logps,
    *,
    beta: float | Tensor,
) -> Comparison:
    """Compares the responses of each group of a micro-batch.

    Args:
        objective: What is minimised.
        batch: The responses, their groups and pairs.
        logps: Their log-probabilities.
        beta: Strength of the pull towards the reference.
    """
    logratios = logps.ratios()
    share = _pair_share(batch)
    of_group = _losses(objective, batch, logps, logratios, share, beta=beta)
    loss_sum = (of_group * batch.weight).sum()
    with torch.no_grad():
        policy, logratios = logps.policy.detach(), logratios.detach()
        accuracies = _accuracies(batch, policy, logratios, share)
        sums = _sums(batch, policy, logratios, beta=beta)
        dtype = torch.float32 if policy.device.type == "mps" else torch.float64
        known = {"loss": loss_sum.detach(), "accuracy": accuracies.sum()} | sums
        stacked = torch.stack([known[name].to(dtype) for name in SUMS])
    return Comparison(
        loss=loss_sum,
        sums=stacked,
        accuracies=accuracies,
        losses=of_group.detach(),
        policy_logps=policy,
        reference_logps=logps.reference,
    )


def _pair_share(batch: RankedResponses) -> Tensor:
    """Share of each pair in its group, (M,)."""
    if batch.pair_share is not None:
        return batch.pair_share
    return _share_of_group(batch.group[batch.chosen], len(batch.weight))


def _losses(
    objective: ObjectiveSettings,
    batch: RankedResponses,
    logps: Logps,
    logratios: Tensor,
    share: Tensor,
    *,
    beta: float | Tensor,
) -> Tensor:
    """Loss of each group, (G,)."""
    groups, policy_logps = len(batch.weight), logps.policy
    pairs = _Pairs.of(batch, logps, share)
    # Without a rejected side every best response of a group is one term, and not once per pair.
    best = (batch.rank == 1).nonzero()[:, 0] if batch.best is None else batch.best
    singles = replace(
        pairs,
        chosen=best,
        rejected=best,
        share=_share_of_group(batch.group[best], groups),
        target_margin=None,
    )
    if logps.tokens is not None:
        pairs = pairs.by_token(objective, logps.tokens)
    of_group = torch.zeros(groups, dtype=policy_logps.dtype, device=policy_logps.device)
    for name in objective.listwise:
        values = listwise_loss(
            name,
            scores=beta * logratios,
            group=batch.group,
            rank=batch.rank,
            shape=None if batch.largest_group is None else (groups, batch.largest_group),
        )
        of_group = of_group + objective.terms[name] * values
    for name, loss in objective.pairwise.items():
        compared = pairs if loss.uses_rejected else singles
        values = compared.mean_by_group(name, loss, objective, beta=beta)
        of_group = of_group + objective.terms[name] * values
    if objective.rpo_alpha:
        nll = -policy_logps[best] / batch.lengths[best] * singles.share
        of_group = of_group.index_add(0, batch.group[best], objective.rpo_alpha * nll)
    return of_group


def _accuracies(batch: RankedResponses, policy: Tensor, logratios: Tensor, share: Tensor) -> Tensor:
    """Share of each group's pairs that is ranked right, (G,); a tie counts one half."""
    chosen, rejected = batch.chosen, batch.rejected
    margins = logratios[chosen] - logratios[rejected]
    # At the start, policy = reference, every pair is a tie.
    tied = margins.abs() <= _TIE * (policy[chosen].abs() + policy[rejected].abs())
    right = torch.where(tied, 0.5, (margins > 0).float())
    zeros = torch.zeros(len(batch.weight), device=policy.device)
    return zeros.index_add(0, batch.group[chosen], right * share)


def _sums(
    batch: RankedResponses, policy: Tensor, logratios: Tensor, *, beta: float | Tensor
) -> dict[str, Tensor]:
    """Entries of ``SUMS`` but for the loss and the accuracy."""
    groups = len(batch.weight)
    scores = beta * logratios
    best = (batch.rank == 1).float()
    rest = 1.0 - best
    return {
        "weight": batch.weight.sum(),
        "groups": batch.weight.new_full((), groups),
        "log_z": log_partition(scores, batch.group, groups=groups).sum(),
        "best_share": (best * group_shares(scores, batch.group, groups=groups)).sum(),
        "best": best.sum(),
        "best_logps": (best * policy).sum(),
        "best_logratios": (best * logratios).sum(),
        "rest": rest.sum(),
        "rest_logps": (rest * policy).sum(),
        "rest_logratios": (rest * logratios).sum(),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pairs:
    """Pairs of responses, as places among the N responses, and what is known of those."""

    policy: Tensor
    reference: Tensor | None
    lengths: Tensor
    group: Tensor
    chosen: Tensor
    rejected: Tensor
    share: Tensor
    target_margin: Tensor | None
    groups: int
    # Of pairs whose log-probabilities are not those of the whole responses: (M,) each.
    policy_sides: tuple[Tensor, Tensor] | None = None
    reference_sides: tuple[Tensor, Tensor] | None = None
    weight: Tensor | None = None

    @classmethod
    def of(cls, batch: RankedResponses, logps: Logps, share: Tensor) -> _Pairs:
        """All strictly ranked pairs."""
        return cls(
            policy=logps.policy,
            reference=logps.reference,
            lengths=batch.lengths,
            group=batch.group,
            chosen=batch.chosen,
            rejected=batch.rejected,
            share=share,
            target_margin=batch.target_margin,
            groups=len(batch.weight),
        )

    def by_token(self, objective: ObjectiveSettings, tokens: Tokens) -> _Pairs:
        """The pairs with shortened log-probabilities, or weighted, as the objective wants it."""
        changes: dict[str, object] = {}
        if objective.desensitises:

            def sides(values: Tensor) -> tuple[Tensor, Tensor]:
                return (
                    self._shortened(values, self.chosen, self.rejected, objective.ld_alpha),
                    self._shortened(values, self.rejected, self.chosen, objective.ld_alpha),
                )

            changes["policy_sides"] = sides(tokens.policy_logps)
            if tokens.reference_logps is not None:
                changes["reference_sides"] = sides(tokens.reference_logps)
        if objective.wpo:
            assert tokens.collisions is not None
            aligned = tokens.policy_logps.detach() - tokens.collisions
            total = aligned.new_zeros(len(self.lengths)).index_add(0, tokens.response, aligned)
            likelihood = (total / self.lengths).exp()
            changes["weight"] = likelihood[self.chosen] * likelihood[self.rejected]
        return replace(self, **changes)  # type: ignore[arg-type]

    def _shortened(self, values: Tensor, mine: Tensor, other: Tensor, alpha: float) -> Tensor:
        """LD-DPO (https://arxiv.org/abs/2409.06411), (S,) -> (M,).

        What is beyond the length of the other response counts alpha.
        """
        # Differences of long running sums: float32 would lose what they are about.
        dtype = torch.float32 if values.device.type == "mps" else torch.float64
        running = torch.cat([values.new_zeros(1, dtype=dtype), values.to(dtype).cumsum(0)])
        ends = self.lengths.cumsum(0)
        starts = ends - self.lengths
        shared = torch.minimum(self.lengths[mine], self.lengths[other])
        start = running[starts[mine]]
        common = running[starts[mine] + shared] - start
        whole = running[ends[mine]] - start
        return (common + alpha * (whole - common)).to(values.dtype)

    def mean_by_group(
        self, name: str, loss: PairwiseLoss, objective: ObjectiveSettings, *, beta: float | Tensor
    ) -> Tensor:
        """The loss averaged over each group's pairs, (G,)."""
        policy = self.policy_sides or (self.policy[self.chosen], self.policy[self.rejected])
        reference: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.reference is not None:
            reference = self.reference_sides or (
                self.reference[self.chosen],
                self.reference[self.rejected],
            )
        owner = self.group[self.chosen]
        values = pairwise_loss(
            name,
            policy_chosen_logps=policy[0],
            policy_rejected_logps=policy[1],
            reference_chosen_logps=reference[0],
            reference_rejected_logps=reference[1],
            chosen_lengths=self.lengths[self.chosen],
            rejected_lengths=self.lengths[self.rejected],
            target_margin=None if self.target_margin is None else self.target_margin[owner],
            beta=beta,
            f_divergence=objective.f_divergence if loss.on_margin else "reverse_kl",
            f_alpha=objective.f_alpha,
            **objective.own_options(name),
        )
        if self.weight is not None:
            values = values * self.weight
        zeros = torch.zeros(self.groups, dtype=values.dtype, device=values.device)
        return zeros.index_add(0, owner, values * self.share)


def _share_of_group(owner: Tensor, groups: int) -> Tensor:
    """1 / (terms of the same group), for each term; (M,) -> (M,), float32."""
    ones = torch.ones(len(owner), dtype=torch.float32, device=owner.device)
    counts = torch.zeros(groups, dtype=torch.float32, device=owner.device)
    return ones / counts.index_add(0, owner, ones)[owner]


def metrics_from_sums(sums: list[float], *, beta: float) -> dict[str, float]:
    """Turns summed-up ``Comparison.sums`` into the metrics that users read.

    ``rewards/chosen`` averages over the responses that are best in their group and
    ``rewards/rejected`` over the others; ``rewards/margins`` is their difference. A mean over
    nothing is NaN.
    """
    total = dict(zip(SUMS, sums, strict=True))

    def mean(value: str, count: str) -> float:
        return total[value] / total[count] if total[count] else float("nan")

    chosen, rejected = mean("best_logratios", "best"), mean("rest_logratios", "rest")
    return {
        "loss": mean("loss", "weight"),
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": mean("accuracy", "groups"),
        "rewards/margins": beta * (chosen - rejected),
        "logps/chosen": mean("best_logps", "best"),
        "logps/rejected": mean("rest_logps", "rest"),
        "logratios/chosen": chosen,
        "logratios/rejected": rejected,
        "logratios/margins": chosen - rejected,
        "partition/log_z": mean("log_z", "groups"),
        "partition/p_chosen": mean("best_share", "best"),
    }
