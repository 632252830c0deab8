"""Number of steps of a run, and the limits of one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """Number of steps of a module, and the limits of one of them.

    Attributes:
        total_steps: Steps of the whole run.
        warmup_steps: Steps of linear warm-up.
        schedule: Name of a transformers schedule.
        log_every_n_steps: Metrics are averaged over, and logged every, so many steps.
        max_grad_norm: Gradients are clipped to this norm; None turns clipping off.
        max_skipped_steps: Steps that may be passed over because they are not finite. Such a step
            counts as one, in the plan and in the schedules, but changes no weight.
        sync_every_micro_batch: True if a sharded policy's gradients are reduced in every backward
            pass, and not in a step's last alone.
        smaller: Settings by which a step takes less memory, for the error when it is not enough.
    """

    total_steps: int
    warmup_steps: int
    schedule: str
    log_every_n_steps: int
    max_grad_norm: float | None
    max_skipped_steps: int = 0
    sync_every_micro_batch: bool = False
    smaller: Sequence[str] = ()
