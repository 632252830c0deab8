"""The path of betas between a run's reference and its policy: where on it a beta is."""

from __future__ import annotations

from dpo_lightning.errors import UserError
from dpo_lightning.objectives.optimum import MOST_LAMBDA, why_no_beta
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.schema import Config


def why_no_beta_of(config: Config) -> str | None:
    """A clause on why no place on the path is that of a beta; None where each is."""
    # Here, because it imports torch.
    from dpo_lightning.objectives.betas import BetaPlan

    if config.reference.sync_every is not None:
        return "the reference moved over the run (reference.sync_every)"
    loss = config.loss
    plan = BetaPlan(
        start=config.beta,
        end=loss.beta_end,
        schedule=loss.beta_schedule,
        adaptive=loss.adaptive_beta,
    )
    return why_no_beta(objective_settings(loss), changes=plan.changes)


def place_of(beta: float, config: Config, *, trained: bool, flag: str) -> float:
    """The place of a beta: 0 is the reference, 1 the policy.

    Args:
        beta: That which is asked for.
        config: The settings of the policy.
        trained: True if ``beta`` among them is that at which it was trained.
        flag: The word behind which it was typed, for errors.

    Raises:
        UserError: If there is none, or it is too far.
    """
    typed = f"{flag}{beta:g}"
    if not trained:
        raise UserError(
            f"{typed}: it is not known at which beta this model was trained; name its run, or add "
            "beta=<that beta>"
        )
    reason = why_no_beta_of(config)
    if reason is not None:
        raise UserError(
            f"{typed}: {reason}, so that no place between reference and policy is that of a beta; "
            "leave it out"
        )
    if config.beta / beta > MOST_LAMBDA:
        raise UserError(
            f"{typed}: the logits' difference would count {config.beta / beta:g} times; give at "
            f"least {config.beta / MOST_LAMBDA:g}"
        )
    return config.beta / beta
