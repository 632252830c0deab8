"""The module's evaluations: sums of each held-out set, and of the sample that all of them see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.data.evaluations import EvalBatch, HeldOut
from dpo_lightning.data.packing import GroupBatch, StepBatch
from dpo_lightning.memory.exhausted import explained
from dpo_lightning.objectives.betas import BetaPlan
from dpo_lightning.objectives.comparison import SUMS, Comparison, metrics_from_sums
from dpo_lightning.training.module_state import CheckpointedModule

# Parts of a set's sums.
_SAMPLE, _REST = 0, 1


class EvaluatingModule(CheckpointedModule):
    """A policy in training with its evaluations; what compares responses is the subclass's.

    Args:
        policy: A transformers causal language model.
        beta_plan: Strength of the pull towards the reference, step by step.
        smaller: Settings by which a batch takes less memory, for the error when it is not enough.
    """

    def __init__(self, policy: Any, beta_plan: BetaPlan, *, smaller: Sequence[str]) -> None:
        super().__init__(policy, beta_plan)
        self._smaller = smaller
        # Sums of each set's sample and of its rest, shape (sets, 2, len(SUMS)).
        self._eval_sums: Tensor | None = None
        self._eval_seen: list[EvalBatch] = []
        self._accuracies: Tensor | None = None

    def _compare(self, batch: GroupBatch, *, training: bool, counts: bool = True) -> Comparison:
        """Compares the responses of a micro-batch."""
        raise NotImplementedError

    @property
    def _batches(self) -> Sequence[EvalBatch]:
        batches: Sequence[EvalBatch] = self._data.eval_batches
        return batches

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]

    def on_validation_epoch_start(self) -> None:
        """Starts from nothing."""
        held_out: HeldOut = self._data.held_out
        sums = self._no_sums()
        self._eval_sums = sums.new_zeros(len(held_out.sizes), 2, len(SUMS))
        self._accuracies = torch.zeros(len(self._data.eval_groups), device=self.device)
        self._eval_seen = []

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Adds the sums of a batch; ranks meet once, at the end."""
        assert self._eval_sums is not None
        assert self._accuracies is not None
        own = self._batches[batch_idx]
        self._eval_seen.append(own)
        for number, micro_batch in enumerate(batch.micro_batches):
            counts = number < len(batch.counted)
            with explained(
                f"the evaluation after step {self.global_step}", micro_batch, self._smaller
            ):
                comparison = self._compare(micro_batch, training=False, counts=counts)
            if not counts:
                continue
            self._eval_sums[own.set, _SAMPLE if own.sampled else _REST] += comparison.sums
            self._accuracies[micro_batch.places] = comparison.accuracies

    def on_validation_epoch_end(self) -> None:
        """Metrics over every group that was seen once, exact over ranks and ragged batches."""
        assert self._eval_sums is not None
        reduced: Any = self.trainer.strategy.reduce(self._eval_sums.clone(), reduce_op="sum")
        sample = self._by_set(reduced[:, _SAMPLE])
        whole = len(self._eval_seen) == len(self._batches)
        self.sample_metrics = {f"eval/{name}": value for name, value in sample.items()}
        self._log_metrics("eval", self._by_set(reduced.sum(1)) if whole else sample)
        # Each group is one rank's; the others have a zero there.
        accuracies = self.trainer.strategy.reduce(self._accuracies, reduce_op="sum")
        self.eval_accuracies = accuracies if whole else None
        self._eval_sums = self._accuracies = None
        self.last_evaluation = self.global_step

    def _by_set(self, sums: Tensor) -> dict[str, float]:
        """Metrics of each set that has groups, under its names; the first set's have no name too.

        Args:
            sums: Those of each set, shape (sets, len(SUMS)), over all ranks.
        """
        found: dict[str, float] = {}
        groups = SUMS.index("groups")
        for number, own in enumerate(sums.tolist()):
            if not own[groups]:
                continue
            metrics = metrics_from_sums(own, beta=self.beta_plan.start)
            for prefix in self._data.held_out.metrics_of(number):
                found |= {f"{prefix}{name}": value for name, value in metrics.items()}
        return found
