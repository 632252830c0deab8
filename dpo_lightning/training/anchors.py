"""The point that the examples of a step are compared with, known before the first backward pass.

One number for the whole step, over all its micro-batches and ranks: KTO's z0, measured on the
step's mismatched responses, or BCO's mean over the steps before. Ranks meet once a step for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.data.packing import GroupBatch, StepBatch
from dpo_lightning.models.adapters import adapter_dropout_off
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.objectives.by_example import UNPAIRED_SUMS
from dpo_lightning.reference.kinds import Reference

_RATIOS = [UNPAIRED_SUMS.index(f"{kind}_logratios") for kind in ("desirable", "undesirable")]
_COUNTS = [UNPAIRED_SUMS.index(kind) for kind in ("desirable", "undesirable")]


@torch.no_grad()
def mismatched_logratios(
    batch: GroupBatch, *, policy: Any, reference: Reference, scorer: Scorer
) -> Tensor:
    """Log-ratio of each mismatched response of a micro-batch, shape (N,), float32, no graph.

    Nothing is drawn, and the reference counts no rows for it.

    Args:
        batch: Prompts, each with a response that is not its own.
        policy: The policy.
        reference: Where reference log-probabilities come from.
        scorer: Scores both.
    """
    asked = reference.rows, reference.computed
    plan = scorer.plan(batch)
    with adapter_dropout_off(policy):
        own = scorer.logps(policy, batch, plan)
    other = reference.logps(batch, plan)
    reference.rows, reference.computed = asked
    assert other is not None
    return own - other


@torch.no_grad()
def mismatched_mean(
    batch: StepBatch,
    measure: Callable[[GroupBatch], Tensor],
    *,
    reduce: Callable[[Tensor], Any],
    device: torch.device,
) -> Tensor:
    """KTO's z0 of a step: max(0, the mean log-ratio of its mismatched responses), a scalar.

    Args:
        batch: This rank's part of the step.
        measure: Log-ratios of the responses of a micro-batch, as :func:`mismatched_logratios`.
        reduce: Sums a tensor over all ranks.
        device: Where to compute.

    Returns:
        float32, in nats, the same on all ranks; 0 where the step has no such responses.
    """
    total = torch.zeros((), dtype=_exact(device), device=device)
    counted = len(batch.counted_mismatched)
    # Ranks that share a model's weights make every forward pass together, those of fillers too.
    for number, micro_batch in enumerate(batch.mismatched):
        ratios = measure(micro_batch)
        if number < counted:
            total = total + ratios.to(total.dtype).sum()
    if not batch.mismatched_count:
        return total.float()
    mean: Tensor = reduce(total) / batch.mismatched_count
    return mean.clamp(min=0).float()


@torch.no_grad()
def follow_mean(
    average: Tensor, count: Tensor, sums: Tensor, *, reduce: Callable[[Tensor], Any]
) -> None:
    """Takes a step's examples into the running mean of log-ratios; on all ranks alike.

    Args:
        average: The mean so far, a scalar; changed.
        count: Number of examples in it, a scalar, int64; changed.
        sums: This rank's sums of the step, shape (13,).
        reduce: Sums a tensor over all ranks.
    """
    own = torch.stack([sums[_RATIOS].sum(), sums[_COUNTS].sum()])
    total, more = reduce(own)
    whole = count + more
    average.add_((total - more * average) / whole.clamp(min=1))
    count.copy_(whole)


def _exact(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
