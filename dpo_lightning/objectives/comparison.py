"""From the log-probabilities of the responses of a micro-batch to its loss and metric sums.

A pairwise loss on K ranked responses uses every strictly ranked pair of a group, each response
scored once. It is averaged over the pairs of a group, then over groups by their weight,
sum(w * loss) / sum(w). Everything here is a sum, so micro-batches, steps and ranks simply add up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.objectives.pairwise import PAIRWISE_LOSSES, pairwise_loss
from dpo_lightning.objectives.partition import log_partition

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
    "best",
    "best_logps",
    "best_logratios",
    "rest",
    "rest_logps",
    "rest_logratios",
)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What a micro-batch contributes to its step.

    Attributes:
        loss: Sum over its groups of weight times loss, a scalar with a graph, float32.
        sums: The entries of ``SUMS``, shape (11,), float64 (float32 on MPS), no graph.
        accuracies: Share of each group's pairs that the policy ranks right, a tie counting one
            half, shape (G,), float32, no graph.
    """

    loss: Tensor
    sums: Tensor
    accuracies: Tensor


def compare_responses(
    loss_name: str,
    *,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    lengths: Tensor,
    group: Tensor,
    rank: Tensor,
    weight: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    beta: float,
    options: Mapping[str, Any],
) -> Comparison:
    """Compares the responses of each group of a micro-batch.

    Args:
        loss_name: A key of ``PAIRWISE_LOSSES``.
        policy_logps: Log-probability of each response under the policy, shape (N,), float32.
        reference_logps: The same under the reference, or None without one: then the log-ratio
            is the log-probability itself, as in the reference-free loss.
        lengths: Tokens of each response, shape (N,), int64.
        group: Group of each response, numbered 0..G-1 in order, shape (N,), int64.
        rank: Rank of each response, 1 is best, shape (N,), int64.
        weight: Weight of each group, shape (G,), float32.
        chosen: Better response of each strictly ranked pair, shape (M,), int64.
        rejected: Worse response of each pair, shape (M,), int64.
        beta: Strength of the pull towards the reference.
        options: The loss's own options.
    """
    uses_rejected = PAIRWISE_LOSSES[loss_name].uses_rejected
    is_best = rank == 1
    # Without a rejected side every best response of a group is one term, and not once per pair.
    first = chosen if uses_rejected else is_best.nonzero()[:, 0]
    second = rejected if uses_rejected else first
    losses = pairwise_loss(
        loss_name,
        policy_chosen_logps=policy_logps[first],
        policy_rejected_logps=policy_logps[second],
        reference_chosen_logps=None if reference_logps is None else reference_logps[first],
        reference_rejected_logps=None if reference_logps is None else reference_logps[second],
        chosen_lengths=lengths[first],
        rejected_lengths=lengths[second],
        beta=beta,
        **options,
    )
    groups = len(weight)
    loss = (losses * _share_of_group(group[first], groups) * weight[group[first]]).sum()

    with torch.no_grad():
        policy = policy_logps.detach()
        logratios = policy if reference_logps is None else policy - reference_logps
        margins = logratios[chosen] - logratios[rejected]
        # A tie counts one half: at the start, policy = reference, every pair is one.
        tied = margins.abs() <= _TIE * (policy[chosen].abs() + policy[rejected].abs())
        right = torch.where(tied, 0.5, (margins > 0).float())
        accuracies = torch.zeros(groups, device=policy.device).index_add(
            0, group[chosen], right * _share_of_group(group[chosen], groups)
        )
        log_z = log_partition(beta * logratios, group).sum()
        best = is_best.float()
        rest = 1.0 - best
        dtype = torch.float32 if policy.device.type == "mps" else torch.float64
        sums = torch.stack(
            [
                value.to(dtype)
                for value in (
                    loss.detach(),
                    weight.sum(),
                    weight.new_tensor(groups),
                    accuracies.sum(),
                    log_z,
                    best.sum(),
                    (best * policy).sum(),
                    (best * logratios).sum(),
                    rest.sum(),
                    (rest * policy).sum(),
                    (rest * logratios).sum(),
                )
            ]
        )
    return Comparison(loss=loss, sums=sums, accuracies=accuracies)


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
    }
