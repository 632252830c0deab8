"""Exact distance of the policy from the closed-form optimum during training, where it is known."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import is_sharded


class ExactCurve(Callback):
    """Adds the exact quantities of the policy to the metrics of each evaluation.

    Args:
        task: The controlled task.
        reference_logps: Log-probabilities of its outcomes under the reference, (8, 4681).
        scorer: The scorer that prepared the policy.
        beta: Of the optimum.
        from_step: Evaluations inside a training before this step leave it out.
    """

    def __init__(
        self,
        task: ControlledTask,
        reference_logps: Tensor,
        scorer: Scorer,
        *,
        beta: float,
        from_step: int = 0,
    ) -> None:
        self._task = task
        self._reference_logps = reference_logps
        self._scorer = scorer
        self._beta = beta
        self._from = from_step
        self._last: tuple[int, dict[str, float]] | None = None

    def at(self, step: int) -> dict[str, float] | None:
        """Report of `ControlledTask` at the last evaluation, if that was after this step."""
        return dict(self._last[1]) if self._last is not None and self._last[0] == step else None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enumerates all responses; of weights that are exported alone somebody else does."""
        policy: Any = pl_module.policy
        if getattr(pl_module, "exported_metrics", None) is not None:
            self._last = None
            return
        if trainer.state.fn == TrainerFn.FITTING and trainer.global_step < self._from:
            return
        if not (trainer.is_global_zero or is_sharded(policy)):
            return
        with self._scorer.plain(policy) as plain:
            logps = self._task.outcome_logps(plain)
        exact = self._task.report(logps, self._reference_logps, beta=self._beta)
        self._last = (trainer.global_step, exact)
        names = ("expected_reward", "gain_ratio", "kl_policy_reference", "kl_optimum_policy")
        for logger in pl_module.loggers:
            logger.log_metrics(
                {f"controlled/{name}": exact[name] for name in names}, step=trainer.global_step
            )
