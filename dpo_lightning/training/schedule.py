"""Schedule of a run: its number of steps, and the events at each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_lightning.data.datamodule import steps_per_epoch
from dpo_lightning.errors import UserError
from dpo_lightning.settings.schema import Config

# Peak learning rates by what is trained: the bundled model, LoRA matrices, all weights of a model.
_LEARNING_RATE_BUNDLED = 1e-3
_LEARNING_RATE_LORA = 5e-6
_LEARNING_RATE_FULL = 5e-7
# By which a few groups are learned within some hundred steps; the bundled model's does as it is.
_OVERFIT_FACTOR = 20


@dataclass(frozen=True, slots=True)
class Schedule:
    """Number of steps, warmup, interval of logging, peak learning rate.

    Attributes:
        learning_rate_of: Reason of a learning rate that nobody set; empty where somebody did.
        round_steps: Steps of each round; None where there are no rounds.
    """

    total_steps: int
    warmup_steps: int
    log_every_n_steps: int
    learning_rate: float
    learning_rate_of: str = ""
    round_steps: int | None = None


def make_schedule(config: Config, *, groups: int, bundled: bool) -> Schedule:
    """Works out the steps of a run.

    Args:
        config: The settings.
        groups: Training groups.
        bundled: True if the bundled model is trained, which decides an open learning rate.

    Raises:
        UserError: If the run has fewer steps than rounds.
    """
    trainer = config.trainer
    total = _total_steps(config, groups)
    round_steps = _round_steps(config, total)
    if round_steps is not None:
        total = config.rounds.count * round_steps
    warmup = config.optimizer.warmup
    learning_rate, reason = config.optimizer.lr, ""
    if learning_rate is None:
        learning_rate, reason = _default_learning_rate(config, bundled=bundled)
    return Schedule(
        total_steps=total,
        warmup_steps=math.ceil(warmup * total) if warmup < 1 else int(warmup),
        log_every_n_steps=trainer.log_every_n_steps or (1 if total <= 200 else 10),
        learning_rate=learning_rate,
        learning_rate_of=reason,
        round_steps=round_steps,
    )


def _total_steps(config: Config, groups: int) -> int:
    """Steps that the trainer's limits leave."""
    trainer, limits = config.trainer, []
    if trainer.max_steps is not None:
        limits.append(trainer.max_steps)
    if trainer.max_epochs is not None or not limits:
        epoch = steps_per_epoch(groups, config.data.batch_size)
        limits.append((trainer.max_epochs or 1) * epoch)
    return min(limits)


def _round_steps(config: Config, total: int) -> int | None:
    """Steps of a round: those that are set, or an equal share of all; None without rounds."""
    rounds = config.rounds
    if not rounds.count:
        return None
    steps = rounds.steps or total // rounds.count
    if not steps:
        raise UserError(
            f"rounds.count={rounds.count}: a pass over the rows has {total} steps, fewer than "
            "rounds; set rounds.steps=<steps of a round>"
        )
    return steps


def _default_learning_rate(config: Config, *, bundled: bool) -> tuple[float, str]:
    """The peak learning rate where none is set, and its reason."""
    if bundled:
        return _LEARNING_RATE_BUNDLED, "default for the bundled model"
    rate, reason = _LEARNING_RATE_FULL, "default for training all weights"
    if config.peft.kind != "none":
        rate, reason = _LEARNING_RATE_LORA, "default for LoRA"
    if config.data.overfit_groups is not None:
        return rate * _OVERFIT_FACTOR, f"{_OVERFIT_FACTOR} x the {reason}, to overfit"
    return rate, reason
