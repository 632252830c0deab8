"""Kinds of reference: a model in memory, log-probabilities that groups bring along, or none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dpo_lightning.data.packing import GroupBatch
from dpo_lightning.models.attention import AttentionPlan
from dpo_lightning.models.scoring import Scorer


class Reference(Protocol):
    """Interface of a reference, as the training module uses it.

    Attributes:
        rows: Groups whose log-probabilities were asked for.
        computed: Those of them that were computed, and not read.
    """

    rows: int
    computed: int

    def to(self, device: torch.device) -> None:
        """Moves whatever the reference holds to a device."""

    def logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor | None:
        """Log-probability of each response, shape (N,), float32, or None without a reference."""

    def token_logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor | None:
        """Log-probability of each scored token, shape (S,), float32, or None without a reference.

        A loss that needs both asks for these alone and adds them up.
        """


class LiveReference:
    """A frozen model, scored beside the policy on the same path and so by the same kernels.

    It is no submodule of anything: checkpoints, optimizers and gradient buckets do not see it.
    """

    def __init__(self, model: Any, scorer: Scorer) -> None:
        self.model = model.requires_grad_(False).eval()
        self._scorer = scorer
        self.rows = 0
        self.computed = 0

    def to(self, device: torch.device) -> None:
        """Moves the model to a device."""
        self.model.to(device)

    @torch.no_grad()
    def logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor:
        """Log-probability of each response, shape (N,), float32, without a graph."""
        self._count(batch)
        return self._scorer.logps(self.model, batch, plan)

    @torch.no_grad()
    def token_logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor:
        """Log-probability of each scored token, shape (S,), float32, without a graph."""
        self._count(batch)
        plan = self._scorer.plan(batch) if plan is None else plan
        return self._scorer.token_logps(self.model, batch, plan)

    def _count(self, batch: GroupBatch) -> None:
        self.rows += len(batch.rows)
        self.computed += len(batch.rows)


class CachedReference:
    """Log-probabilities that the groups bring along; see :func:`with_reference_logps`.

    Args:
        rows: Groups of the run.
        computed: Those of them that this process computed.
        read: Numbers of those of which a value was read.
        folder: Where it was read.
    """

    def __init__(
        self,
        *,
        rows: int,
        computed: int,
        read: Sequence[int] = (),
        folder: Path = Path(),
    ) -> None:
        self.rows = rows
        self.computed = computed
        self.read = read
        self.folder = folder

    def to(self, device: torch.device) -> None:
        """Holds nothing to move."""

    def logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor:
        """Log-probability of each response, shape (N,), float32."""
        assert batch.reference_logps is not None
        return batch.reference_logps

    def token_logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> Tensor:
        """Log-probability of each scored token, shape (S,), float32; the groups must have them."""
        assert batch.reference_token_logps is not None
        return batch.reference_token_logps


class NoReference:
    """No reference, for losses that compare the policy with nothing."""

    rows = 0
    computed = 0

    def to(self, device: torch.device) -> None:
        """Holds nothing to move."""

    def logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> None:
        """Returns None: there is no reference."""

    def token_logps(self, batch: GroupBatch, plan: AttentionPlan | None) -> None:
        """Returns None: there is no reference."""
