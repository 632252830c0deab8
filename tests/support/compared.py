"""Responses without a layout, as plain tensors, and what is compared of them."""

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from dpo_lightning.objectives.comparison import Comparison, Logps, Tokens, compare_responses
from dpo_lightning.objectives.objective import ObjectiveSettings

OPEN = dict.fromkeys(("best", "largest_group", "pair_share", "target_margin"))


def compare_tensors(
    objective: ObjectiveSettings,
    *,
    policy_logps: Tensor,
    reference_logps: Tensor | None,
    beta: float,
    tokens: Tokens | None = None,
    **batch: Any,
) -> Comparison:
    """The comparison of responses that only tensors tell of; what is not given is left open."""
    logps = Logps(policy=policy_logps, reference=reference_logps, tokens=tokens)
    return compare_responses(objective, SimpleNamespace(**(OPEN | batch)), logps, beta=beta)
