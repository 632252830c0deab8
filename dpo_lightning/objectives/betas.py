"""Betas that change: on a schedule over the run, or with the margins of a step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BetaPlan:
    """Plan of beta over a run.

    Attributes:
        start: Beta of the first step.
        end: Beta of the last one; not looked at by the constant schedule.
        schedule: `constant`, `linear` or `cosine`.
        total_steps: Steps of the run.
        adaptive: Strength with which a step's beta follows its margins; 0 for none.
        momentum: Share of the old mean margin in the next one.
    """

    start: float
    end: float | None = None
    schedule: str = "constant"
    total_steps: int = 1
    adaptive: float = 0.0
    momentum: float = 0.9

    @property
    def changes(self) -> bool:
        """True if beta is not the same in every step."""
        return bool(self.adaptive) or (self.end is not None and self.schedule != "constant")

    def at(self, step: int) -> float:
        """Beta of a step, counted from 0, before it follows any margins."""
        if self.end is None or self.schedule == "constant":
            return self.start
        done = min(1.0, max(0, step) / max(1, self.total_steps - 1))
        if self.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


# Smallest share of its beta that an adapted one may have: at 0 nothing would be learnt.
_LEAST_SHARE = 1e-3


def adapted_beta(beta: float, margin: Tensor, average: Tensor, *, strength: float) -> Tensor:
    """Beta of a batch by how far its margins moved from their average: beta-DPO.

    beta * (1 + strength * (M - M_0)), as in https://arxiv.org/abs/2407.08639 at batch level,
    with M the batch's mean reward margin and M_0 its moving average. A batch that is told apart
    well gets a larger beta, and so smaller steps.

    Args:
        beta: Before it is adapted.
        margin: M, scalar.
        average: M_0 before this batch, scalar.
        strength: Alpha of the paper.

    Returns:
        Scalar without a graph, at least a thousandth of beta.
    """
    share = 1 + strength * (margin - average)
    return beta * share.detach().clamp(min=_LEAST_SHARE)
