"""Log-probabilities of a micro-batch under policy and reference, of tokens where needed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpo_lightning.data.packing import GroupBatch
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.objectives.comparison import Logps, Tokens
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.reference.kinds import Reference


def batch_logps(
    batch: GroupBatch,
    *,
    policy: Any,
    reference: Reference,
    scorer: Scorer,
    objective: ObjectiveSettings,
) -> Logps:
    """Scores a micro-batch for an objective.

    Args:
        batch: The micro-batch.
        policy: A model, prepared by ``scorer``.
        reference: Where reference log-probabilities come from; it counts what it is asked for.
        scorer: Scores both.
        objective: Says if single tokens are needed.
    """
    plan = scorer.plan(batch)
    if not objective.needs_tokens:
        own = scorer.logps(policy, batch, plan)
        return Logps(policy=own, reference=reference.logps(batch, plan))
    collisions = None
    if objective.wpo:
        scores = scorer.token_scores(policy, batch, plan)
        token_logps, collisions = scores.logps, scores.collisions
    else:
        token_logps = scorer.token_logps(policy, batch, plan)
    own = _by_response(token_logps, batch)
    if objective.desensitises:
        of_tokens = reference.token_logps(batch, plan)
        of_responses = None if of_tokens is None else _by_response(of_tokens, batch)
    else:
        of_tokens, of_responses = None, reference.logps(batch, plan)
    tokens = Tokens(
        policy_logps=token_logps,
        reference_logps=of_tokens,
        collisions=collisions,
        response=batch.response,
    )
    return Logps(policy=own, reference=of_responses, tokens=tokens)


def _by_response(values: Tensor, batch: GroupBatch) -> Tensor:
    """Sums over the tokens of each response, (S,) -> (N,), float32."""
    total = torch.zeros(len(batch.lengths), dtype=torch.float32, device=values.device)
    return total.index_add(0, batch.response, values)
