"""Where the log-probabilities of the reference come from."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from dpo_lightning.data.packing import GroupBatch
from dpo_lightning.models.attention import AttentionPlan
from dpo_lightning.models.scoring import Scorer


class Reference(Protocol):
    """What the module asks of a reference."""

    @property
    def rows(self) -> int:
        """Groups that were asked for so far."""

    def to(self, device: torch.device) -> None:
        """Moves whatever the reference holds to a device."""

    def token_logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor | None:
        """Log-probability of each scored token, shape (S,), or None without a reference."""

    def logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor | None:
        """Log-probability of each response, shape (N,), float32, or None without a reference."""


class LiveReference:
    """A frozen model, scored beside the policy on the same path and so by the same kernels.

    It is no submodule of anything: checkpoints, optimizers and gradient buckets do not see it.
    """

    def __init__(self, model: Any, scorer: Scorer) -> None:
        self.model = model.requires_grad_(False).eval()
        self._scorer = scorer
        self.rows = 0

    def to(self, device: torch.device) -> None:
        """Moves the model to a device."""
        self.model.to(device)

    @torch.no_grad()
    def token_logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor:
        """Log-probability of each scored token, shape (S,), float32, without a graph."""
        return self._scorer.token_logps(self.model, batch, plan)

    @torch.no_grad()
    def logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor:
        """Log-probability of each response, shape (N,), float32, without a graph."""
        self.rows += len(batch.rows)
        return self._scorer.logps(self.model, batch, plan)


class NoReference:
    """For losses that compare the policy with nothing."""

    rows = 0

    def to(self, device: torch.device) -> None:
        """Holds nothing to move."""

    def token_logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> None:
        """There is none."""

    def logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> None:
        """There is none."""
