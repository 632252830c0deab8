"""Check before the first step that a reference is the policy's start."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.data.packing import StepBatch
from dpo_lightning.errors import UserError
from dpo_lightning.models.adapters import adapter_dropout_off
from dpo_lightning.models.devices import autocast_dtype
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import gathered_dtype
from dpo_lightning.reference.kinds import Reference

# |policy - reference| at step 0 that rounding can explain, of a response of one token, by the dtype
# computed in. Of more tokens it is the root of their number times that: their roundings are
# independent, and add up like the steps of a random walk.
_TOLERANCE = {torch.float32: 5e-4, torch.float16: 2.5e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def check_same_model(
    batch: StepBatch,
    *,
    policy: Any,
    reference: Reference,
    scorer: Scorer,
    reduce: Callable[[Tensor], Any],
) -> None:
    """Refuses a reference that is not the initial policy: the loss would mean nothing.

    Args:
        batch: The first step; its first micro-batch is scored.
        policy: The policy before its first step.
        reference: The reference, which is to be the same.
        scorer: Scores both.
        reduce: Sums a tensor over all ranks.

    Raises:
        UserError: If they differ by more than rounding explains.
    """
    device = next(policy.parameters()).device
    sums = torch.zeros(3, device=device)
    asked = reference.rows, reference.computed
    for micro_batch in batch.micro_batches[:1]:
        plan = scorer.plan(micro_batch)
        with adapter_dropout_off(policy):
            own = scorer.logps(policy, micro_batch, plan)
        other = reference.logps(micro_batch, plan)
        assert other is not None
        lengths = micro_batch.lengths.float()
        sums += torch.stack([(own - other).abs().sum(), lengths.sum(), lengths.sqrt().sum()])
    # A check is no work of the run's.
    reference.rows, reference.computed = asked
    total, tokens, roots = reduce(sums).tolist()
    dtype = autocast_dtype(device) or gathered_dtype(policy)
    allowed = _TOLERANCE[dtype] * roots
    if not total <= allowed:
        raise UserError(
            "reference: before the first step the policy and its own starting point differ by "
            f"{total / tokens:.2g} nats per token (rounding in {dtype} explains "
            f"{allowed / tokens:.2g} at these lengths): the two run with different kernels, "
            "dtypes, with dropout, or are different models; name the intended one with "
            "reference.pretrained="
        )
