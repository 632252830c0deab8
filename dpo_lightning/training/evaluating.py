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
from dpo_lightning.objectives.by_example import measure_examples
from dpo_lightning.objectives.comparison import SUMS, Comparison, Logps, metrics_from_sums
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.training.held_out_examples import ExampleLog, examples_of
from dpo_lightning.training.module_state import CheckpointedModule

# Parts of a set's sums.
_SAMPLE, _REST = 0, 1


class EvaluatingModule(CheckpointedModule):
    """A policy in training with its evaluations; what compares responses is the subclass's.

    Args:
        policy: A transformers causal language model.
        objective: What is minimised.
        beta_plan: Strength of the pull towards the reference, step by step.
        smaller: Settings by which a batch takes less memory, for the error when it is not enough.
    """

    def __init__(
        self,
        policy: Any,
        objective: ObjectiveSettings,
        beta_plan: BetaPlan,
        *,
        smaller: Sequence[str],
    ) -> None:
        super().__init__(policy, objective, beta_plan)
        self._smaller = smaller
        # Sums of each set's sample and of its rest, shape (sets, 2, len(SUMS)).
        self._eval_sums: Tensor | None = None
        self._eval_seen: list[EvalBatch] = []
        self._accuracies: Tensor | None = None
        # Examples in place of sums, where single responses are such.
        self._examples = ExampleLog()

    def _compare(self, batch: GroupBatch, *, training: bool, counts: bool = True) -> Comparison:
        """Compares the responses of a micro-batch."""
        raise NotImplementedError

    def _counted_logps(self, batch: GroupBatch, *, counts: bool) -> Logps:
        """Log-probabilities of a micro-batch; of one that does not count nothing is counted."""
        raise NotImplementedError

    def _mismatched(self, batch: GroupBatch) -> Tensor:
        """Log-ratios of responses to other prompts, (N,)."""
        raise NotImplementedError

    @property
    def _running_anchor(self) -> float:
        """The mean log-ratio of the training so far; 0 where the loss does not follow it."""
        running = self.objective.anchor == "running"
        return float(self.logratio_average) if running else 0.0

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
        self._eval_sums = sums.new_zeros(len(held_out.sizes), 2, len(sums))
        self._examples = ExampleLog()
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
                if self.objective.is_unpaired:
                    self._see_examples(micro_batch, own, counts=counts)
                    continue
                comparison = self._compare(micro_batch, training=False, counts=counts)
            if not counts:
                continue
            self._eval_sums[own.set, _SAMPLE if own.sampled else _REST] += comparison.sums
            self._accuracies[micro_batch.places] = comparison.accuracies
        for number, micro_batch in enumerate(batch.mismatched):
            ratios = self._mismatched(micro_batch)
            if number < len(batch.counted_mismatched):
                self._examples.add_mismatched(
                    micro_batch, ratios, set=own.set, rest=not own.sampled
                )

    def _see_examples(self, batch: GroupBatch, own: EvalBatch, *, counts: bool) -> None:
        """Keeps the examples of a micro-batch until all of its set were seen."""
        logps = self._counted_logps(batch, counts=counts)
        if counts:
            self._examples.add(batch, logps, set=own.set, rest=not own.sampled)

    def on_validation_epoch_end(self) -> None:
        """Metrics over every group that was seen once, exact over ranks and ragged batches."""
        assert self._eval_sums is not None
        whole = len(self._eval_seen) == len(self._batches)
        sample, everything = self._measured()
        self.sample_metrics = {f"eval/{name}": value for name, value in sample.items()}
        self._log_metrics("eval", everything if whole else sample)
        # Each group is one rank's; the others have a zero there.
        accuracies = self.trainer.strategy.reduce(self._accuracies, reduce_op="sum")
        self.eval_accuracies = accuracies if whole else None
        self._eval_sums = self._accuracies = None
        self.last_evaluation = self.global_step

    def _measured(self) -> tuple[dict[str, float], dict[str, float]]:
        """Metrics of the samples, and of all that was seen, over all ranks."""
        if self.objective.is_unpaired:
            rows = self._examples.rows(world_size=self.trainer.world_size)
            self._examples = ExampleLog()
            return self._of_examples(rows, sampled=True), self._of_examples(rows, sampled=False)
        assert self._eval_sums is not None
        reduced: Any = self.trainer.strategy.reduce(self._eval_sums.clone(), reduce_op="sum")
        return self._by_set(reduced[:, _SAMPLE]), self._by_set(reduced.sum(1))

    def _of_examples(self, rows: Tensor, *, sampled: bool) -> dict[str, float]:
        """Metrics of each set that has examples, under its names."""
        found: dict[str, float] = {}
        for number in range(len(self._data.held_out.sizes)):
            examples = examples_of(rows, set=number, sampled=sampled)
            if examples is None:
                continue
            metrics = measure_examples(
                self.objective,
                examples,
                # By now a step that was taken counts: it had this beta.
                beta=self.beta_plan.at(self.global_step - 1),
                reward_beta=self.beta_plan.start,
                running=self._running_anchor,
            )
            for prefix in self._data.held_out.metrics_of(number):
                found |= {f"{prefix}{name}": value for name, value in metrics.items()}
        return found

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
