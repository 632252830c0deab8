"""The module's part of a checkpoint: its state, and which weights; and its metric rows."""

from __future__ import annotations

import logging
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from dpo_lightning.errors import DivergedError, UserError
from dpo_lightning.models.master_weights import MasterWeights
from dpo_lightning.objectives.betas import BetaPlan
from dpo_lightning.objectives.by_example import metrics_of_sums, sum_names
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.training.loss_scale import Float16Precision

log = logging.getLogger(__name__)

# What a checkpoint holds of the module beside its weights.
_STATE = "progress"
# Buffers that the settings decide about; a changed setting may need others than a checkpoint has.
_BUFFERS = ("margin_average", "logratio_average", "logratio_count")


class CheckpointedModule(pl.LightningModule):
    """A policy in training: its state, in memory and in checkpoints, and its metrics.

    Args:
        policy: A transformers causal language model.
        objective: What is minimised.
        beta_plan: Strength of the pull towards the reference, step by step.

    Attributes:
        skipped_steps: Steps that were passed over.
        last_evaluation: The step at which the evaluation groups were last seen.
        eval_accuracies: Share of each evaluation group's pairs ranked right, shape (groups,), when
            all of them were last seen; None where the last evaluation saw a sample. Zeros where
            single responses are examples.
        sample_metrics: Metrics of the sample that every evaluation sees, from the last one.
        exported_metrics: Those of weights that are exported in place of the last ones; None until
            there are such, and evaluations are logged.
    """

    def __init__(self, policy: Any, objective: ObjectiveSettings, beta_plan: BetaPlan) -> None:
        super().__init__()
        self.policy = policy
        self.objective = objective
        self.beta_plan = beta_plan
        if beta_plan.adaptive:
            # The moving average of mean margins; of a checkpoint too.
            self.margin_average: Tensor
            self.register_buffer("margin_average", torch.zeros(()))
        if objective.anchor == "running":
            # The mean log-ratio of all examples so far, and their number; of a checkpoint too.
            self.logratio_average: Tensor
            self.logratio_count: Tensor
            self.register_buffer("logratio_average", torch.zeros(()))
            self.register_buffer("logratio_count", torch.zeros((), dtype=torch.int64))
        self.skipped_steps = 0
        self.last_evaluation = -1
        self.eval_accuracies: Tensor | None = None
        self.sample_metrics: dict[str, float] = {}
        self.exported_metrics: dict[str, float] | None = None
        self._masters: MasterWeights | None = None
        # What the optimizer trains.
        self._trained: list[Tensor] = []
        # Names in a state dict that stay as they were loaded; a checkpoint has the others.
        self._frozen = _frozen_names(policy)
        if self._frozen:
            self.strict_loading = False
        self._train_sums: Tensor | None = None

    @property
    def unsaved(self) -> frozenset[str]:
        """Names of a state dict that no checkpoint has: the weights that are not trained."""
        return self._frozen

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the trained weights into a checkpoint, not their rounding, and no other weights.

        Beside them: the sums of a log interval that has begun, a row per rank, and what the last
        evaluation found where it was of these weights. On every rank.
        """
        self.require_finite()
        for name in self._frozen:
            checkpoint["state_dict"].pop(name, None)
        if self._masters is not None:
            for name, value in self._masters.state_dict():
                checkpoint["state_dict"][f"policy.{name}"] = value
        sums = self._train_sums
        if sums is not None:
            everyone: Any = self.trainer.strategy.all_gather(sums)
            sums = everyone.reshape(-1, len(sum_names(self.objective))).cpu()
        evaluated = self.last_evaluation == self.global_step
        checkpoint[_STATE] = {
            "train_sums": sums,
            "skipped_steps": self.skipped_steps,
            "last_evaluation": self.last_evaluation,
            "eval_accuracies": self.eval_accuracies if evaluated else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the rest of the state; a changed setting may need other buffers.

        Raises:
            UserError: If the policy has weights of other shapes.
        """
        scaled = Float16Precision.__qualname__
        if scaled in checkpoint and type(self.trainer.precision_plugin).__qualname__ != scaled:
            log.info("resume: the checkpoint's loss scale is left out: this run needs none")
        weights = checkpoint["state_dict"]
        for name in _BUFFERS:
            buffer = getattr(self, name, None)
            if buffer is None:
                weights.pop(name, None)
            else:
                weights.setdefault(name, buffer)
        own = {n: v for n, v in self.state_dict().items() if n not in self._frozen}
        for name in own.keys() & weights.keys():
            if weights[name].shape != own[name].shape:
                raise UserError(
                    f"resume: {name} has the shape {tuple(weights[name].shape)} in the checkpoint "
                    f"and {tuple(own[name].shape)} in this run's model; take the same model"
                )
        differing = sorted(own.keys() ^ weights.keys())
        if differing:
            raise UserError(
                f"resume: the checkpoint has other weights than this run trains ({differing[0]} "
                f"first of {len(differing)}); resume with the same model= and peft= settings"
            )
        state = checkpoint[_STATE]
        self.skipped_steps = state["skipped_steps"]
        self.last_evaluation = state["last_evaluation"]
        self.eval_accuracies = state["eval_accuracies"]
        sums = state["train_sums"]
        if sums is not None and sums.shape[1] != len(sum_names(self.objective)):
            sums = None  # of another loss, whose metrics are others
        if sums is not None and len(sums) == self.trainer.world_size:
            self._train_sums = sums[self.trainer.global_rank]
        elif sums is not None:
            self._train_sums = sums.sum(0) * self.trainer.is_global_zero

    def on_train_start(self) -> None:
        """Moves the sums of a log interval out of a checkpoint to the device of its other steps."""
        if self._train_sums is not None:
            self._train_sums = self._train_sums.to(self._no_sums())

    @torch.no_grad()
    def require_finite(self) -> None:
        """Refuses weights that a finite gradient drove out of bounds, before they are saved.

        Raises:
            DivergedError: If one of them is not finite.
        """
        # A sum is not finite where one of its terms is not; it may also overflow.
        weights = [getattr(p, "to_local", lambda p=p: p)().detach() for p in self._trained]
        sums = [weight.sum(dtype=torch.float32) for weight in weights]
        bad = 0
        if not torch.stack(sums).isfinite().all():
            bad = sum(not bool(weight.isfinite().all()) for weight in weights)
        if self.trainer.world_size > 1:
            most = torch.full((), bad, dtype=torch.int64, device=self.device)
            torch.distributed.all_reduce(most, op=torch.distributed.ReduceOp.MAX)
            bad = int(most)
        if bad:
            raise DivergedError(
                f"step {self.global_step}: after it {bad} of the weights' tensors are not finite, "
                "so nothing of it is saved: lower optimizer.lr"
            )

    @torch.no_grad()
    def take_weights(self, state: dict[str, Tensor]) -> None:
        """Puts the weights of a checkpoint in place of the last ones, to evaluate and export them.

        From here on evaluations are no longer logged: they go to ``exported_metrics``.

        Args:
            state: The checkpoint's ``state_dict``.
        """
        if self._masters is None:
            strict = self.strict_loading
            self.trainer.strategy.load_model_state_dict({"state_dict": state}, strict=strict)
        else:
            for name, master in self._masters.state_dict():
                master.copy_(state[f"policy.{name}"])
            self._masters.publish()
        self.exported_metrics = {}

    def restore_weights(self) -> bool:
        """Ends training by giving the policy its trained weights, in their own type.

        Returns:
            True where they were others in an evaluation.
        """
        if self._masters is None:
            return False
        self._masters.restore()
        self._masters = None
        return True

    # Metrics ----------------------------------------------------------------------------------

    def _no_sums(self) -> Tensor:
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(len(sum_names(self.objective)), dtype=dtype, device=self.device)

    def _reduced_metrics(self, sums: Tensor) -> dict[str, float]:
        reduced: Any = self.trainer.strategy.reduce(sums.clone(), reduce_op="sum")
        return metrics_of_sums(self.objective, reduced.tolist(), beta=self.beta_plan.start)

    def _log_metrics(self, prefix: str, metrics: dict[str, float]) -> None:
        """Sends a row to the loggers, and the values to callbacks that watch them.

        Lightning's own route rounds to float32, and repeats a row after an evaluation in between.
        """
        values = {f"{prefix}/{name}": value for name, value in metrics.items()}
        if self.exported_metrics is not None:
            self.exported_metrics |= values
            return
        self.log_dict(values, logger=False, batch_size=1)
        if prefix == "train" and "loss" in metrics:
            named = {"accuracy": "rewards/accuracies", "separation": "logratios/separation"}
            shown = {short: metrics[own] for short, own in named.items() if own in metrics}
            shown = {"loss": metrics["loss"]} | shown
            self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        epoch = round(self.global_step / datamodule.steps_per_epoch, 6)
        for logger in self.loggers:
            logger.log_metrics(values | {"epoch": epoch}, step=self.global_step)
            logger.save()


def _frozen_names(policy: Any) -> frozenset[str]:
    """Entries of the module's state dict that are not trained; none where all weights are."""
    trained = [
        f"policy.{name}"
        for name, parameter in policy.named_parameters(remove_duplicate=False)
        if parameter.requires_grad
    ]
    if all(parameter.requires_grad for parameter in policy.parameters()):
        return frozenset()
    return frozenset(f"policy.{name}" for name in policy.state_dict()).difference(trained)
