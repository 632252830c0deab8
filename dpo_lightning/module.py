"""The LightningModule: score, compare, step, log. The maths is in ``objectives``."""

from __future__ import annotations

import contextlib
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from transformers import get_scheduler

from dpo_lightning.data.packing import GroupBatch, StepBatch
from dpo_lightning.errors import DivergedError, UserError
from dpo_lightning.models.master_weights import MasterWeights
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.objectives.betas import BetaPlan, adapted_beta
from dpo_lightning.objectives.comparison import (
    SUMS,
    Comparison,
    Tokens,
    compare_responses,
    metrics_from_sums,
)
from dpo_lightning.objectives.registry import ObjectiveSettings
from dpo_lightning.optimizers import OptimizerName, make_optimizer
from dpo_lightning.reference import Reference

# Mean |policy - reference| per token at step 0 that rounding can explain, by the dtype computed in.
_SAME_MODEL_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class DPOModule(pl.LightningModule):
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
        lr: Peak learning rate of AdamW.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.
        weight_decay: AdamW's weight decay, on matrices only.
        max_grad_norm: Gradients are clipped to this norm; None turns clipping off.
        schedule: Name of a transformers schedule.
        warmup_steps: Steps of linear warm-up.
        total_steps: Steps of the whole run.
        log_every_n_steps: Metrics are averaged over, and logged every, so many steps.
        starts_from_reference: Whether the policy's first weights are the reference's; then the
            first batch has to show it.
        compute_dtype: What the policy's weights are rounded to while it is trained, with float32
            master weights behind them; None trains the weights themselves.
        optimizer: Name of the optimizer.
        stochastic_rounding: Whether trained bfloat16 weights are rounded by chance; None: yes.
        seed: Of that rounding.
    """

    def __init__(
        self,
        *,
        policy: Any,
        reference: Reference,
        scorer: Scorer,
        objective: ObjectiveSettings,
        beta_plan: BetaPlan,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float | None,
        schedule: str,
        warmup_steps: int,
        total_steps: int,
        log_every_n_steps: int,
        starts_from_reference: bool,
        compute_dtype: torch.dtype | None = None,
        optimizer: OptimizerName = "adamw",
        stochastic_rounding: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy
        self.reference = reference
        self.scorer = scorer
        self.objective = objective
        self.beta_plan = beta_plan
        # Beta of the last training step.
        self._beta: float | Tensor = beta_plan.start
        if beta_plan.adaptive:
            # The moving average of mean margins; of a checkpoint too.
            self.margin_average: Tensor
            self.register_buffer("margin_average", torch.zeros(()))
        self.total_steps = total_steps
        self._optimizer: dict[str, Any] = {
            **{"name": optimizer, "lr": lr, "betas": betas, "eps": eps},
            **{"weight_decay": weight_decay, "seed": seed},
            "stochastic_rounding": stochastic_rounding,
        }
        self._max_grad_norm = max_grad_norm
        self._schedule = schedule
        self._warmup_steps = warmup_steps
        self._log_every_n_steps = log_every_n_steps
        self.starts_from_reference = starts_from_reference
        self._compute_dtype = compute_dtype
        self._masters: MasterWeights | None = None
        # The step at which the evaluation groups were last seen.
        self.last_evaluation = -1
        self._train_sums: Tensor | None = None
        self._eval_sums: Tensor | None = None
        # Share of each evaluation group's pairs ranked right, when they were last seen.
        self.eval_accuracies: Tensor | None = None

    # Lightning's hooks ------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW with warm-up; vectors (norms, biases) are not decayed."""
        # By now the policy is on its device, and what a checkpoint held is in it.
        if self._compute_dtype is not None:
            self._masters = MasterWeights(self.policy, self._compute_dtype)
        optimizer = make_optimizer(self._trained(), **self._optimizer)
        scheduler = get_scheduler(
            self._schedule,
            optimizer,
            num_warmup_steps=self._warmup_steps,
            num_training_steps=self.total_steps,
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds the weights that are trained, not their rounding."""
        if self._masters is not None:
            for name, value in self._masters.state_dict():
                checkpoint["state_dict"][f"policy.{name}"] = value

    def restore_weights(self) -> None:
        """Ends training: the policy has the weights that were trained, in their own type."""
        if self._masters is not None:
            self._masters.restore()
            self._masters = None

    def on_fit_start(self) -> None:
        """The reference is no submodule, so nobody else moves it."""
        self.reference.to(self.device)
        # transformers loads models in eval mode, where gradient checkpointing is silently off.
        self.policy.train()

    def on_validation_start(self) -> None:
        """Evaluation may run without a fit."""
        self.reference.to(self.device)

    def training_step(self, batch: StepBatch, batch_idx: int) -> None:
        """One optimizer step over the groups of a step.

        Raises:
            DivergedError: If the gradient norm is not finite; the step is not taken.
        """
        optimizer: Any = self.optimizers()
        if self.global_step == 0 and self.starts_from_reference:
            self._check_same_model(batch)
        # Data-parallel strategies average gradients over ranks; the step's loss is one mean.
        scale = self.trainer.world_size / batch.total_weight
        sums = self._no_sums()
        for number, micro_batch in enumerate(batch.micro_batches, start=1):
            with self._gradient_sync(last=number == len(batch.micro_batches)):
                comparison = self._compare(micro_batch, training=True)
                self.manual_backward(comparison.loss * scale)
            sums = sums + comparison.sums
        if not batch.micro_batches:
            self.manual_backward(self._zero_loss())
        grad_norm = self._clip()
        if not torch.isfinite(grad_norm):
            raise DivergedError(
                f"step {self.global_step + 1}: the gradient norm is {grad_norm.item()}; the step "
                "was not taken: lower optimizer.lr or optimizer.max_grad_norm"
            )
        optimizer.step()
        optimizer.zero_grad()
        if self._masters is not None:
            self._masters.publish()
        scheduler: Any = self.lr_schedulers()
        learning_rate = float(scheduler.get_last_lr()[0])
        scheduler.step()

        self._train_sums = sums if self._train_sums is None else self._train_sums + sums
        step = self.global_step
        if step == 1 or step % self._log_every_n_steps == 0 or step == self.total_steps:
            metrics = self._reduced_metrics(self._train_sums)
            metrics |= {"grad_norm": float(grad_norm), "learning_rate": learning_rate}
            if self.beta_plan.changes:
                metrics["beta"] = float(self._beta)
            self._log_metrics("train", metrics)
            self._train_sums = None

    def on_validation_epoch_start(self) -> None:
        """Starts from nothing."""
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        self._eval_sums = self._no_sums()
        self.eval_accuracies = torch.zeros(len(datamodule.eval_groups), device=self.device)

    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Adds the sums of a batch; ranks meet once, at the end."""
        assert self._eval_sums is not None
        assert self.eval_accuracies is not None
        for micro_batch in batch.micro_batches:
            comparison = self._compare(micro_batch, training=False)
            self._eval_sums = self._eval_sums + comparison.sums
            rows = torch.tensor(micro_batch.rows, device=self.device)
            self.eval_accuracies[rows] = comparison.accuracies

    def on_validation_epoch_end(self) -> None:
        """Metrics over every group once, exact over ranks and ragged batches."""
        assert self._eval_sums is not None
        self._log_metrics("eval", self._reduced_metrics(self._eval_sums))
        # Each group is one rank's; the others have a zero there.
        self.eval_accuracies = self.trainer.strategy.reduce(self.eval_accuracies, reduce_op="sum")
        self._eval_sums = None
        self.last_evaluation = self.global_step

    # Parts of a step --------------------------------------------------------------------------

    def _compare(self, batch: GroupBatch, *, training: bool) -> Comparison:
        plan = self.scorer.plan(batch)
        tokens = token_logps = collisions = None
        if self.objective.needs_tokens:
            if self.objective.wpo:
                scores = self.scorer.token_scores(self.policy, batch, plan)
                token_logps, collisions = scores.logps, scores.collisions
            else:
                token_logps = self.scorer.token_logps(self.policy, batch, plan)
            policy_logps = _by_response(token_logps, batch)
        else:
            policy_logps = self.scorer.logps(self.policy, batch, plan)
        if self.objective.desensitises:
            reference_tokens = self.reference.token_logps(batch, plan)
            reference_logps = (
                None if reference_tokens is None else _by_response(reference_tokens, batch)
            )
        else:
            reference_tokens, reference_logps = None, self.reference.logps(batch, plan)
        if token_logps is not None:
            tokens = Tokens(
                policy_logps=token_logps,
                reference_logps=reference_tokens,
                collisions=collisions,
                response=batch.response,
            )
        # By now a step that was taken counts: what is evaluated had the last step's beta.
        beta: float | Tensor = self.beta_plan.at(self.global_step - (not training))
        if training and self.beta_plan.adaptive:
            beta = self._adapted(float(beta), batch, policy_logps, reference_logps)
        if training:
            self._beta = beta
        return compare_responses(
            self.objective,
            policy_logps=policy_logps,
            reference_logps=reference_logps,
            lengths=batch.lengths,
            group=batch.group,
            rank=batch.rank,
            weight=batch.weight,
            chosen=batch.chosen,
            rejected=batch.rejected,
            beta=beta,
            best=batch.best,
            largest_group=max((len(shape) - 1 for shape in batch.segments), default=0),
            pair_share=batch.pair_share,
            target_margin=batch.target_margin,
            tokens=tokens,
        )

    @torch.no_grad()
    def _adapted(
        self, beta: float, batch: GroupBatch, policy: Tensor, reference: Tensor | None
    ) -> Tensor:
        """Beta of this step by its margins, over all ranks; the step is one micro-batch a rank."""
        logratios = policy.detach() if reference is None else policy.detach() - reference
        margins = logratios[batch.chosen] - logratios[batch.rejected]
        sums = torch.stack([margins.sum(), margins.new_tensor(len(margins))])
        total, count = self.trainer.strategy.reduce(sums, reduce_op="sum")
        margin = beta * total / count.clamp(min=1)
        adapted = adapted_beta(beta, margin, self.margin_average, strength=self.beta_plan.adaptive)
        self.margin_average.lerp_(margin, 1 - self.beta_plan.momentum)
        return adapted

    def _gradient_sync(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Only a step's last backward pass synchronises gradients over ranks."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return contextlib.nullcontext() if last or block is None else block()

    def _zero_loss(self) -> Tensor:
        """Touches every trainable parameter: a rank without groups must not keep others waiting."""
        trainable = (p for p in self.policy.parameters() if p.requires_grad)
        return torch.stack([p.flatten()[:1].sum() * 0.0 for p in trainable]).sum()

    def _trained(self) -> list[Tensor]:
        """What the optimizer trains."""
        if self._masters is not None:
            return [*self._masters.parameters]
        return [p for p in self.policy.parameters() if p.requires_grad]

    def _clip(self) -> Tensor:
        parameters = [p for p in self._trained() if p.grad is not None]
        limit = float("inf") if self._max_grad_norm is None else self._max_grad_norm
        return torch.nn.utils.clip_grad_norm_(parameters, limit)

    @torch.no_grad()
    def _check_same_model(self, batch: StepBatch) -> None:
        """Refuses a reference that is not the policy's start: the loss would mean nothing."""
        sums = torch.zeros(2, device=self.device)
        for micro_batch in batch.micro_batches[:1]:
            plan = self.scorer.plan(micro_batch)
            policy = self.scorer.logps(self.policy, micro_batch, plan)
            reference = self.reference.logps(micro_batch, plan)
            assert reference is not None
            sums += torch.stack([(policy - reference).abs().sum(), micro_batch.lengths.sum()])
        total, tokens = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        dtype = self._dtype_computed_in()
        if not total / tokens <= _SAME_MODEL_TOLERANCE[dtype]:
            raise UserError(
                "reference: before the first step the policy and its own starting point differ by "
                f"{total / tokens:.2g} nats per token (rounding in {dtype} explains "
                f"{_SAME_MODEL_TOLERANCE[dtype]:g}): the two run with different kernels, dtypes, "
                "with dropout, or are different models; name the intended one with "
                "reference.pretrained="
            )

    def _dtype_computed_in(self) -> torch.dtype:
        if torch.is_autocast_enabled(self.device.type):
            return torch.get_autocast_dtype(self.device.type)
        dtype: torch.dtype = next(self.policy.parameters()).dtype
        return dtype

    # Metrics ----------------------------------------------------------------------------------

    def _no_sums(self) -> Tensor:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(len(SUMS), dtype=dtype, device=self.device)

    def _reduced_metrics(self, sums: Tensor) -> dict[str, float]:
        reduced: Any = self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        return metrics_from_sums(reduced.tolist(), beta=self.beta_plan.start)

    def _log_metrics(self, prefix: str, metrics: dict[str, float]) -> None:
        """Sends a row to the loggers, and the values to callbacks that watch them.

        Lightning's own route rounds to float32, and repeats a row after an evaluation in between.
        """
        values = {f"{prefix}/{name}": value for name, value in metrics.items()}
        self.log_dict(values, logger=False, batch_size=1)
        if prefix == "train":
            shown = {"loss": metrics["loss"], "accuracy": metrics["rewards/accuracies"]}
            self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        epoch = round(self.global_step / datamodule.steps_per_epoch, 6)
        for logger in self.loggers:
            logger.log_metrics(values | {"epoch": epoch}, step=self.global_step)
            logger.save()


def _by_response(values: Tensor, batch: GroupBatch) -> Tensor:
    """Sums over the tokens of each response, (S,) -> (N,), float32."""
    total = torch.zeros(len(batch.lengths), dtype=torch.float32, device=values.device)
    return total.index_add(0, batch.response, values)
