"""Losses on single responses, each of them desirable or undesirable: no partner is needed.

Every loss compares the reward of a response, beta times its log-ratio, with a point that is the
same for all responses of a step. Nothing here imports torch at the top: settings are checked
against the signatures below before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from dpo_lightning.objectives.losses import log_sigmoid
from dpo_lightning.objectives.registry import (
    UNPAIRED_ENTRIES,
    UNPAIRED_LOSSES,
    UnpairedLoss,
    Value,
    check_options,
    register_unpaired,
)

if TYPE_CHECKING:
    from torch import Tensor

Desirable = Annotated[float, {"least": 0, "help": "Weight of desirable responses in the loss."}]
"""A weight of desirable responses."""

Undesirable = Annotated[float, {"least": 0, "help": "Weight of undesirable responses in the loss."}]
"""A weight of undesirable responses."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleLogps:
    """Inputs of a loss on single responses.

    Attributes:
        logratios: Policy less reference log-probability of each response, (B,), floating.
        desirable: True for the desirable ones, (B,), bool.
        anchor: Log-ratio that theirs are compared with, in nats: a number or a scalar tensor.
    """

    logratios: Tensor
    desirable: Tensor
    anchor: Tensor | float = 0.0

    def leads(self, beta: float | Tensor) -> Tensor:
        """Reward less that of the anchor; of undesirable responses the other way round, (B,)."""
        above = beta * (self.logratios - self.anchor)
        return above.where(self.desirable, -above)

    def weighted(self, losses: Tensor, desirable: float, undesirable: float) -> Tensor:
        """The losses times the weight of their kind, (B,)."""
        weight = losses.new_full((), desirable).where(
            self.desirable, losses.new_full((), undesirable)
        )
        return losses * weight


@register_unpaired("kto", paper="https://arxiv.org/abs/2402.01306", anchor="mismatched")
def _kto(
    examples: ExampleLogps,
    *,
    beta: float | Tensor,
    desirable_weight: Desirable = 1.0,
    undesirable_weight: Undesirable = 1.0,
) -> Tensor:
    """KTO, Eq. 7: weight * (1 - sigmoid(beta * (s - z0))), undesirable with z0 - s.

    z0 = max(0, mean log-ratio of responses behind prompts that are not theirs), without a gradient.
    """
    losses = (-examples.leads(beta)).sigmoid()
    return examples.weighted(losses, desirable_weight, undesirable_weight)


@register_unpaired("bco", paper="https://arxiv.org/abs/2404.04656", anchor="running")
def _bco(
    examples: ExampleLogps,
    *,
    beta: float | Tensor,
    desirable_weight: Desirable = 1.0,
    undesirable_weight: Undesirable = 1.0,
) -> Tensor:
    """BCO: weight * -log sigmoid(beta * s - delta), undesirable with the other sign.

    A classifier of desirable against undesirable whose logit is the reward less delta, the mean
    reward of the steps before.
    """
    losses = -log_sigmoid(examples.leads(beta))
    return examples.weighted(losses, desirable_weight, undesirable_weight)


@register_unpaired("apo_zero_unpaired", paper="https://arxiv.org/abs/2408.06266")
def _apo_zero_unpaired(
    examples: ExampleLogps,
    *,
    beta: float | Tensor,
    desirable_weight: Desirable = 1.0,
    undesirable_weight: Undesirable = 1.0,
) -> Tensor:
    """APO-zero, Eq. 7, response by response: KTO with the point at 0.

    Desirable up and undesirable down, whatever the model wrote before.
    """
    losses = (-examples.leads(beta)).sigmoid()
    return examples.weighted(losses, desirable_weight, undesirable_weight)


def unpaired_loss(
    name: str,
    *,
    policy_logps: Tensor,
    reference_logps: Tensor,
    desirable: Tensor,
    beta: float | Tensor,
    kl: float | Tensor = 0.0,
    delta: float | Tensor = 0.0,
    **options: Value,
) -> Tensor:
    """The loss of each response, unreduced.

    Logps are sums over a response's tokens, EOS included. Half precision inputs are taken up to
    float32 first; float64 stays float64.

    Args:
        name: One of `UNPAIRED_LOSSES`.
        policy_logps: (B,), floating. Log-probabilities of the responses under the policy.
        reference_logps: (B,), floating, the same under the reference.
        desirable: (B,), bool. True for desirable responses, False for undesirable ones.
        beta: Strength of the pull towards the reference; finite and above 0, if a number.
        kl: KTO's z0 in nats, without a gradient; a negative one counts as 0. For KTO alone.
        delta: BCO's shift in units of reward, without a gradient. For BCO alone.
        **options: `desirable_weight` and `undesirable_weight`, 1 each; others are refused.

    Returns:
        (B,), float32, or float64 for float64 logps.

    Raises:
        ValueError: For an unknown loss or option, a value out of range, or shapes that differ.

    Example:
        A desirable response at z0 = 1 costs one half, an undesirable one that is 2 nats below the
        reference 1 - sigmoid(0.5 * (1 + 2)) = 0.1824.

        >>> import torch
        >>> unpaired_loss(
        ...     "kto",
        ...     policy_logps=torch.tensor([-5.0, -9.0]),  # (B,)
        ...     reference_logps=torch.tensor([-6.0, -7.0]),
        ...     desirable=torch.tensor([True, False]),
        ...     beta=0.5,
        ...     kl=1.0,
        ... )  # (B,)
        tensor([0.5000, 0.1824])
    """
    loss = _known(name, options)
    _check_numbers(name, loss, beta, {"mismatched": ("kl", kl), "running": ("delta", delta)})
    _check_tensors(policy_logps, reference_logps, desirable)
    examples = ExampleLogps(
        logratios=_at_least_float32(policy_logps) - _at_least_float32(reference_logps),
        desirable=desirable,
        anchor=_anchor(loss, kl, delta, beta),
    )
    return evaluate_unpaired(name, examples, beta=beta, options=options)


def _check_numbers(
    name: str,
    loss: UnpairedLoss,
    beta: float | Tensor,
    anchors: Mapping[str, tuple[str, float | Tensor]],
) -> None:
    """Raises where beta is no strength, or an anchor is given that the loss has not."""
    if isinstance(beta, float | int) and not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta!r}: must be a finite number > 0")
    for anchor, (key, given) in anchors.items():
        if loss.anchor != anchor and not (isinstance(given, float | int) and given == 0):
            raise ValueError(f"loss {name!r} has no {key}: leave it out")


def _check_tensors(policy_logps: Tensor, reference_logps: Tensor, desirable: Tensor) -> None:
    """Raises where shapes differ, which would broadcast, or a label is no truth value."""
    import torch

    if policy_logps.ndim != 1:
        raise ValueError(f"policy_logps has shape {tuple(policy_logps.shape)}: it is (B,)")
    for key, tensor in {"reference_logps": reference_logps, "desirable": desirable}.items():
        if tensor.shape != policy_logps.shape:
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)}, policy_logps "
                f"{tuple(policy_logps.shape)}: both are (B,)"
            )
    if desirable.dtype != torch.bool:
        raise ValueError(f"desirable is {desirable.dtype}: it is bool")


def _at_least_float32(tensor: Tensor) -> Tensor:
    import torch

    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _anchor(
    loss: UnpairedLoss, kl: float | Tensor, delta: float | Tensor, beta: float | Tensor
) -> Tensor | float:
    """The log-ratio that others are compared with, without a gradient."""
    if loss.anchor == "mismatched":
        return max(0.0, kl) if isinstance(kl, float | int) else kl.detach().clamp(min=0)
    if loss.anchor == "running":
        return (delta if isinstance(delta, float | int) else delta.detach()) / beta
    return 0.0


def evaluate_unpaired(
    name: str, examples: ExampleLogps, *, beta: float | Tensor, options: Mapping[str, Value]
) -> Tensor:
    """The loss of each response by known settings, (B,).

    Args:
        name: One of `UNPAIRED_LOSSES`.
        examples: The responses, with the anchor as it counts.
        beta: Strength of the pull towards the reference.
        options: Those of the loss.
    """
    loss = UNPAIRED_ENTRIES[name]
    losses: Tensor = loss.fn(examples, beta=beta, **{**loss.options, **options})
    return losses


def _known(name: str, options: Mapping[str, Value]) -> UnpairedLoss:
    """The loss of that name, which takes these options."""
    if name not in UNPAIRED_ENTRIES:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(UNPAIRED_LOSSES)}")
    loss = UNPAIRED_ENTRIES[name]
    check_options(name, loss, options)
    return loss
