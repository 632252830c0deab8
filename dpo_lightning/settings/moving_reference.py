"""Checks of the settings of a reference that moves. Imports no torch."""

from collections.abc import Iterator

from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.schema import Config, ReferenceConfig


def moving_reference_problems(config: Config) -> Iterator[str]:
    """Yields what is wrong with the updates of the reference, a clause each.

    Args:
        config: Settings of which each is valid by itself, and the loss is known.
    """
    reference = config.reference
    every, alpha = reference.sync_every, reference.sync_alpha
    if every is None:
        if alpha != ReferenceConfig().sync_alpha:
            yield (
                f"reference.sync_alpha={alpha:g}: the reference stays as it is; add "
                "reference.sync_every=<steps>, or leave it out"
            )
        return
    if not objective_settings(config.loss).uses_reference:
        yield (
            f"reference.sync_every={every}: loss={config.loss.name} uses no reference; leave it out"
        )
    elif reference.kind == "none":
        yield (
            f"reference.sync_every={every} with reference=none: there is nothing to move; use "
            "reference=auto"
        )
    elif reference.kind == "cached":
        yield (
            f"reference.sync_every={every} with reference=cached: cached log-probs are of the "
            "reference as it starts, and it moves away from there; use reference=auto"
        )
    if every == 1 and alpha == 1:
        yield (
            f"reference.sync_every={every} reference.sync_alpha=1: the reference would be the "
            "policy in each step, so that each log-ratio is 0, the loss never changes (ln 2 with "
            "loss=sigmoid), and beta only scales the gradient: nothing keeps the policy near any "
            "reference; use reference.sync_every=512 or reference.sync_alpha=0.6"
        )
    if config.peft.kind == "lora":
        for name in ("pretrained", "adapter"):
            value = getattr(reference, name)
            if value is not None:
                yield (
                    f"reference.sync_every={every} with peft=lora moves a copy of the trained "
                    f"adapter, and reference.{name}={value} is another start; leave "
                    f"reference.{name} out"
                )
