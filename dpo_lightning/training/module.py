"""The LightningModule: score, compare, step, log. The maths is in ``objectives``."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from dpo_lightning.data.packing import GroupBatch, StepBatch
from dpo_lightning.errors import DivergedError
from dpo_lightning.files import DIVERGED_FILE
from dpo_lightning.memory.exhausted import explained
from dpo_lightning.models.master_weights import MasterWeights
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import (
    gathered,
    in_shards,
    is_sharded,
    set_gradient_sync,
)
from dpo_lightning.objectives.betas import BetaPlan, adapted_beta
from dpo_lightning.objectives.by_example import anchor_sums, judge_examples
from dpo_lightning.objectives.comparison import Comparison, Logps, compare_responses
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.reference.kinds import Reference
from dpo_lightning.reference.moving import MovingReference
from dpo_lightning.reference.same_model import check_same_model
from dpo_lightning.training.anchors import follow_mean, mismatched_logratios, mismatched_mean
from dpo_lightning.training.batch_logps import batch_logps
from dpo_lightning.training.divergence import Scored, report, rows_of_step, what_happened
from dpo_lightning.training.evaluating import EvaluatingModule
from dpo_lightning.training.loss_scale import Float16Precision
from dpo_lightning.training.optimizers import OptimizerSettings, make_optimizer
from dpo_lightning.training.outcome import Outcome, agree, of_all_ranks
from dpo_lightning.training.step_settings import StepSettings

log = logging.getLogger(__name__)

# What a checkpoint holds of a reference that moves.
_MOVED = "reference"


class DPOModule(EvaluatingModule):
    """Trains a policy on preferences; one Lightning batch is one optimizer step.

    Optimization is manual: a backward pass per micro-batch, gradients synchronised on the last,
    one clip, one step. The loss is the weighted mean over the groups of the step, whatever the
    split over micro-batches and ranks.

    Args:
        policy: A transformers causal language model, prepared by ``scorer``.
        reference: Where reference log-probabilities come from.
        scorer: Scores micro-batches.
        objective: What is minimised.
        beta_plan: Strength of the pull towards the reference, step by step.
        optimizer: What the optimizer is made of.
        steps: How many steps there are, and what one may do.
        starts_from_reference: True if the policy's first weights are the reference's; then the
            first batch has to show it.
        compute_dtype: What the policy's weights are rounded to while it is trained, with float32
            master weights behind them; None trains the weights themselves.
        pending_signal: Number of the signal that is to stop this rank, 0 for none.

    Attributes:
        stop_signal: Number of the signal that is to stop all ranks after this step, 0 for none;
            the same on all of them.
        skipped_steps: Steps that were passed over.
    """

    def __init__(
        self,
        *,
        policy: Any,
        reference: Reference,
        scorer: Scorer,
        objective: ObjectiveSettings,
        beta_plan: BetaPlan,
        optimizer: OptimizerSettings,
        steps: StepSettings,
        starts_from_reference: bool,
        compute_dtype: torch.dtype | None = None,
        pending_signal: Callable[[], int] = lambda: 0,
    ) -> None:
        super().__init__(policy, objective, beta_plan, smaller=steps.smaller)
        self.automatic_optimization = False
        self.reference = reference
        self.scorer = scorer
        self.starts_from_reference = starts_from_reference
        self.stop_signal = 0
        self._optimizer = optimizer
        self._steps = steps
        self._compute_dtype = compute_dtype
        self._pending_signal = pending_signal
        # Beta of the last training step.
        self._beta: float | Tensor = beta_plan.start

    # Lightning's hooks ------------------------------------------------------------------------

    def configure_model(self) -> None:
        """The policy comes as it is to be trained: whole, or in shards."""

    def configure_optimizers(self) -> Any:
        """The optimizer with warm-up; vectors (norms, biases) are not decayed."""
        # By now the policy is on its device, and what a checkpoint held is in it.
        if self._compute_dtype is not None:
            self._masters = MasterWeights(self.policy, self._compute_dtype)
            self._trained = [*self._masters.parameters]
        else:
            in_shards(self.policy)
            self._trained = [p for p in self.policy.parameters() if p.requires_grad]
        optimizer = make_optimizer(self._trained, self._optimizer)
        # The constant one by that name would begin at its peak.
        warming_up = {"constant": "constant_with_warmup"}
        scheduler = get_scheduler(
            warming_up.get(self._steps.schedule, self._steps.schedule),
            optimizer,
            num_warmup_steps=self._steps.warmup_steps,
            num_training_steps=self._steps.total_steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_fit_start(self) -> None:
        """The reference is no submodule, so nobody else moves it."""
        self.reference.to(self.device)
        # transformers loads models in eval mode, where gradient checkpointing is silently off.
        self.policy.train()

    def on_validation_start(self) -> None:
        """Evaluation may run without a fit."""
        self.reference.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the reference where it has moved away from its start."""
        super().on_save_checkpoint(checkpoint)
        if isinstance(self.reference, MovingReference):
            checkpoint[_MOVED] = self.reference.state(keep=self.trainer.is_global_zero)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the reference as it had moved."""
        super().on_load_checkpoint(checkpoint)
        if isinstance(self.reference, MovingReference):
            self.reference.load(checkpoint.get(_MOVED))

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One optimizer step over the groups of a step.

        Raises:
            DivergedError: If the loss or the gradient norm is not finite, on all ranks; the step
                is not taken.
            OutOfMemoryError: If the device's memory is not enough.
        """
        optimizer: Any = self.optimizers()
        if self.global_step == 0 and self.starts_from_reference:
            self._check_start(batch)
        average = self.margin_average.clone() if self.beta_plan.adaptive else None
        asked = self.reference.rows, self.reference.computed
        sums, scored, grad_norm, outcome = self._try(batch, optimizer)
        while self._overflows(optimizer, outcome):
            optimizer.zero_grad()
            self.reference.rows, self.reference.computed = asked
            self._take_back(average)
            sums, scored, grad_norm, outcome = self._try(batch, optimizer)
        self.stop_signal = outcome.signal
        if outcome.finite:
            self._train_sums = sums if self._train_sums is None else self._train_sums + sums
            with explained(self._now, None, self._steps.smaller):
                optimizer.step()
            if self._masters is not None:
                self._masters.publish()
            self._follow(sums)
        else:
            self._skip_or_stop(scored, sums[0], grad_norm, total_weight=self._weight_of(batch))
            self._take_back(average)
        optimizer.zero_grad()
        if isinstance(self.reference, MovingReference):
            self.reference.follow(self._trained, step=self.global_step)
        scheduler: Any = self.lr_schedulers()
        learning_rate = float(scheduler.get_last_lr()[0])
        scheduler.step()
        self._log_step(learning_rate, grad_norm if outcome.finite else None)

    # Parts of a step --------------------------------------------------------------------------

    def _check_start(self, batch: StepBatch) -> None:
        """Refuses a reference that is not the policy as it starts."""
        check_same_model(
            batch,
            policy=self.policy,
            reference=self.reference,
            scorer=self.scorer,
            reduce=self._summed,
        )

    @property
    def _now(self) -> str:
        """The step that is taken, as errors name it."""
        return f"step {self.global_step + 1}"

    @property
    def _scaled(self) -> Float16Precision | None:
        """The plugin that scales the loss; None where it is not scaled."""
        plugin = self.trainer.precision_plugin
        return plugin if isinstance(plugin, Float16Precision) else None

    def _try(
        self, batch: StepBatch, optimizer: Any
    ) -> tuple[Tensor, list[Scored], Tensor, Outcome]:
        """Gradients of a step, clipped; sums, what was scored, the norm, and what is agreed."""
        sums, scored = self._backward(batch)
        if self._scaled is not None:
            self._scaled.unscale(optimizer.optimizer)
        grad_norm = self._clip()
        signal, ranks = self._pending_signal(), self.trainer.world_size
        return sums, scored, grad_norm, agree(sums[0], grad_norm, signal=signal, world_size=ranks)

    def _overflows(self, optimizer: Any, outcome: Outcome) -> bool:
        """True if float16 gradients overflowed, so that the step is to be tried again."""
        said = self._now if self.trainer.is_global_zero else None
        scaled = self._scaled
        return scaled is not None and scaled.tries_again(optimizer.optimizer, outcome, said=said)

    def _take_back(self, average: Tensor | None) -> None:
        """Takes the mean margin back to what it was before a step that was not taken."""
        if average is not None:
            self.margin_average.copy_(average)

    def _backward(self, batch: StepBatch) -> tuple[Tensor, list[Scored]]:
        """Backward passes of a step; its sums, and what was scored for them."""
        # Data-parallel strategies average gradients over ranks; the step's loss is one mean.
        scale = self.trainer.world_size / self._weight_of(batch)
        sums = self._no_sums()
        anchor = self._anchor(batch)
        scored: list[Scored] = []
        for number, micro_batch in enumerate(batch.micro_batches):
            counts = number < len(batch.counted)
            with (
                explained(self._now, micro_batch, self._steps.smaller),
                self._gradient_sync(last=number + 1 == len(batch.micro_batches)),
            ):
                comparison = self._compare(micro_batch, training=True, counts=counts, anchor=anchor)
                self.manual_backward(comparison.loss * (scale if counts else 0.0))
            if counts:
                sums = sums + comparison.sums
                scored.append(Scored.of(micro_batch, comparison))
        if not batch.micro_batches:
            if self.beta_plan.adaptive:
                self._adapted(
                    float(self.beta_plan.at(self.global_step)), torch.zeros(0, device=self.device)
                )
            self.manual_backward(self._zero_loss())
        if anchor is not None and self.trainer.is_global_zero:
            beta = self.beta_plan.at(self.global_step)
            sums = sums + anchor_sums(self.objective, anchor, beta=beta, like=sums)
        return sums, scored

    def _log_step(self, learning_rate: float, grad_norm: Tensor | None) -> None:
        """Logs a row where one is due; a skipped step has no norm."""
        step = self.global_step
        due = step == 1 or step % self._steps.log_every_n_steps == 0
        if not due and step != self._steps.total_steps:
            return
        metrics: dict[str, float] = {"learning_rate": learning_rate}
        if self._steps.max_skipped_steps:
            metrics["skipped_steps"] = self.skipped_steps
        if self._scaled is not None:
            metrics["overflow_skips"] = self._scaled.skipped
            metrics["loss_scale"] = self._scaled.scale()
        if self._train_sums is not None:  # None where all steps since the last row were skipped
            metrics = self._reduced_metrics(self._train_sums) | metrics
        if grad_norm is not None:
            metrics["grad_norm"] = float(grad_norm)
            if self.beta_plan.changes:
                metrics["beta"] = float(self._beta)
        self._log_metrics("train", metrics)
        self._train_sums = None

    def _compare(
        self,
        batch: GroupBatch,
        *,
        training: bool,
        counts: bool = True,
        anchor: Tensor | None = None,
    ) -> Comparison:
        logps = self._counted_logps(batch, counts=counts)
        # By now a step that was taken counts: what is evaluated had the last step's beta.
        beta: float | Tensor = self.beta_plan.at(self.global_step - (not training))
        if training and self.beta_plan.adaptive:
            logratios = replace(logps, policy=logps.policy.detach()).ratios()
            margins = logratios[batch.chosen] - logratios[batch.rejected]
            beta = self._adapted(float(beta), margins if counts else margins[:0])
        if training:
            self._beta = beta
        if anchor is not None:
            return judge_examples(self.objective, batch, logps, beta=beta, anchor=anchor)
        return compare_responses(self.objective, batch, logps, beta=beta)

    def _counted_logps(self, batch: GroupBatch, *, counts: bool) -> Logps:
        asked = self.reference.rows, self.reference.computed
        logps = self._logps(batch)
        if not counts:
            self.reference.rows, self.reference.computed = asked
        return logps

    def _mismatched(self, batch: GroupBatch) -> Tensor:
        with explained(self._now, batch, self._steps.smaller):
            return mismatched_logratios(
                batch, policy=self.policy, reference=self.reference, scorer=self.scorer
            )

    def logratios(self, batch: GroupBatch) -> Tensor:
        """Log-ratio of each response, shape (N,); nothing is counted as asked for."""
        return self._counted_logps(batch, counts=False).ratios()

    def _logps(self, batch: GroupBatch) -> Logps:
        return batch_logps(
            batch,
            policy=self.policy,
            reference=self.reference,
            scorer=self.scorer,
            objective=self.objective,
        )

    @torch.no_grad()
    def _adapted(self, beta: float, margins: Tensor) -> Tensor:
        """Beta of this step by its margins, over all ranks; the step is one micro-batch a rank."""
        sums = torch.stack([margins.sum(), margins.new_full((), len(margins))])
        total, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        margin = beta * total / count.clamp(min=1)
        adapted = adapted_beta(beta, margin, self.margin_average, strength=self.beta_plan.adaptive)
        self.margin_average.lerp_(margin, 1 - self.beta_plan.momentum)
        return adapted

    def _weight_of(self, batch: StepBatch) -> float:
        """Weights that a step's loss is a mean by: of its groups, or of its examples."""
        return batch.example_weight if self.objective.is_unpaired else batch.total_weight

    def _anchor(self, batch: StepBatch) -> Tensor | None:
        """Log-ratio that the step's examples are compared with; None where groups compare."""
        if not self.objective.is_unpaired:
            return None
        if self.objective.anchor == "mismatched":
            return mismatched_mean(batch, self._mismatched, reduce=self._summed, device=self.device)
        running = self.objective.anchor == "running"
        return self.logratio_average.clone() if running else torch.zeros((), device=self.device)

    def _follow(self, sums: Tensor) -> None:
        """Takes a step that was taken into the running mean, where the loss has one."""
        if self.objective.anchor == "running":
            follow_mean(self.logratio_average, self.logratio_count, sums, reduce=self._summed)

    def _summed(self, values: Tensor) -> Any:
        """The values added up over all ranks."""
        return self.trainer.strategy.reduce(values, reduce_op="sum")

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Only a step's last backward pass synchronises gradients over ranks."""
        if is_sharded(self.policy):
            set_gradient_sync(self.policy, last=last, every=self._steps.sync_every_micro_batch)
            return contextlib.nullcontext()
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return contextlib.nullcontext() if last or block is None else block()

    def _zero_loss(self) -> Tensor:
        """Touches every trainable parameter: a rank without groups must not keep others waiting."""
        trainable = (p for p in self.policy.parameters() if p.requires_grad)
        return torch.stack([p.flatten()[:1].sum() * 0.0 for p in trainable]).sum()

    def _clip(self) -> Tensor:
        parameters = [p for p in self._trained if p.grad is not None]
        most = self._steps.max_grad_norm
        limit = float("inf") if most is None else most
        return gathered(torch.nn.utils.clip_grad_norm_(parameters, limit))

    def _skip_or_stop(
        self, scored: Sequence[Scored], loss: Tensor, grad_norm: Tensor, *, total_weight: float
    ) -> None:
        """Says what is not finite, and whether that is the end; on all ranks alike.

        Raises:
            DivergedError: If no more steps may be passed over.
        """
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        own = (loss.item(), rows_of_step(scored, datamodule.train_groups))
        everyone = of_all_ranks(own, world_size=self.trainer.world_size)
        content = report(
            self.global_step + 1,
            loss=sum(part for part, _ in everyone) / total_weight,
            grad_norm=grad_norm.item(),
            rows=[row for _, rows in everyone for row in rows],
        )
        said = what_happened(content)
        if self.skipped_steps == self._steps.max_skipped_steps:
            allowed = f"={self.skipped_steps} are used up" if self.skipped_steps else " is 0"
            raise DivergedError(
                f"{said}: lower optimizer.lr or optimizer.max_grad_norm, look at the rows in "
                f"{DIVERGED_FILE}, or let more steps pass (trainer.max_skipped_steps{allowed})",
                content,
            )
        self.skipped_steps += 1
        # It counts as one step, so that the plan of the run stays a function of their number.
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        if self.trainer.is_global_zero:
            log.warning(
                "%s (%d of at most %d)", said, self.skipped_steps, self._steps.max_skipped_steps
            )
