"""Losses on pairs, called with tensors and checked once for all of them.

Losses come back per pair: how pairs are averaged (over a group's pairs, then over groups, with
weights) is the caller's matter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor

from dpo_lightning.objectives.divergences import link
from dpo_lightning.objectives.losses import PairLogps
from dpo_lightning.objectives.registry import (
    PAIRWISE_LOSSES,
    PairwiseLoss,
    Value,
    check_options,
)

__all__ = ["PAIRWISE_LOSSES", "PairLogps", "PairwiseLoss", "pairwise_loss"]


def pairwise_loss(
    name: str,
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor | None,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor | None,
    beta: float | Tensor,
    target_margin: Tensor | float | None = None,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
    **options: Value,
) -> Tensor:
    """The loss of each pair, unreduced.

    Logps are sums over a response's tokens, EOS included. Half precision inputs are taken up to
    float32 first; float64 stays float64.

    Args:
        name: A key of `PAIRWISE_LOSSES`.
        policy_chosen_logps: (B,), floating. The policy's logps of the chosen responses.
        policy_rejected_logps: (B,), floating, of the rejected ones. None only for a loss with
            `uses_rejected` False.
        reference_chosen_logps: (B,), floating, or None. A loss with `uses_reference` False ignores
            it; `sigmoid` without it is the reference-free form.
        reference_rejected_logps: (B,), floating. None exactly when `reference_chosen_logps` is.
        chosen_lengths: (B,), integer or floating. Tokens in the chosen responses.
        rejected_lengths: (B,), of the rejected ones. None as `policy_rejected_logps`.
        beta: Strength of the pull towards the reference; finite and above 0. A tensor, of one
            entry, is not looked at.
        target_margin: (B,), floating, or one number for all, or None for 0. By how much the reward
            of the chosen response is to be higher; `odpo` alone uses it.
        f_divergence: Divergence from the reference, a name of `DIVERGENCES`; only for
            losses that are functions of the margin.
        f_alpha: Order of the alpha divergence.
        **options: The loss's own, as in `PAIRWISE_LOSSES[name].options`; others are refused.

    Returns:
        (B,), float32, or float64 for float64 logps.

    Raises:
        ValueError: For an unknown loss or option, a value out of range, one reference tensor
            without the other, or shapes that differ.

    Example:
        Two pairs. In the first policy and reference agree; in the second the margin is
        (-4 + 5) - (-9 + 8) = 2, and -log sigmoid(0.5 * 2) = 0.3133.

        >>> pairwise_loss(
        ...     "sigmoid",
        ...     policy_chosen_logps=torch.tensor([-5.0, -4.0]),  # (B,)
        ...     policy_rejected_logps=torch.tensor([-8.0, -9.0]),
        ...     reference_chosen_logps=torch.tensor([-5.0, -5.0]),
        ...     reference_rejected_logps=torch.tensor([-8.0, -8.0]),
        ...     chosen_lengths=torch.tensor([3, 3]),
        ...     rejected_lengths=torch.tensor([4, 4]),
        ...     beta=0.5,
        ... )  # (B,)
        tensor([0.6931, 0.3133])
    """
    loss = _known(name, options)
    if isinstance(beta, float | int) and not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta!r}: must be a finite number > 0")
    if isinstance(target_margin, float | int):
        target_margin = torch.full_like(policy_chosen_logps, float(target_margin))
    pairs = PairLogps(
        policy_chosen_logps=_at_least_float32(policy_chosen_logps),
        policy_rejected_logps=_optional(policy_rejected_logps),
        reference_chosen_logps=_optional(reference_chosen_logps),
        reference_rejected_logps=_optional(reference_rejected_logps),
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        target_margin=_optional(target_margin),
        link=link(f_divergence, f_alpha),
    )
    _check_sides(name, loss, pairs, f_divergence)
    _check_shapes(pairs)
    losses: Tensor = loss.fn(pairs, beta=beta, **{**loss.options, **options})
    return losses


def _known(name: str, options: Mapping[str, Value]) -> PairwiseLoss:
    """The loss of that name, which takes these options."""
    if name not in PAIRWISE_LOSSES:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(PAIRWISE_LOSSES)}")
    loss = PAIRWISE_LOSSES[name]
    check_options(name, loss, options)
    return loss


def _check_sides(name: str, loss: PairwiseLoss, pairs: PairLogps, f_divergence: str) -> None:
    """Raises where the loss needs what is not there."""
    reference = pairs.reference_chosen_logps
    if (reference is None) != (pairs.reference_rejected_logps is None):
        raise ValueError("reference logps of one side alone: give both, or None for both")
    if loss.needs_reference and reference is None:
        raise ValueError(
            f"loss {name!r} compares each response with the reference: its logps are None"
        )
    if pairs.link is not None and (not loss.on_margin or reference is None):
        raise ValueError(
            f"f_divergence is {f_divergence!r}: that is for losses on the margin of two log-ratios"
        )
    if loss.uses_rejected and (
        pairs.policy_rejected_logps is None or pairs.rejected_lengths is None
    ):
        raise ValueError(f"loss {name!r} compares two responses: the rejected one is None")


def _check_shapes(pairs: PairLogps) -> None:
    """(B, 1) against (B,) would broadcast to every pairing of the batch, and train on it."""
    shape = pairs.policy_chosen_logps.shape
    for item in fields(pairs):
        tensor = getattr(pairs, item.name)
        if isinstance(tensor, Tensor) and (tensor.ndim != 1 or tensor.shape != shape):
            raise ValueError(
                f"{item.name} has shape {tuple(tensor.shape)}, policy_chosen_logps "
                f"{tuple(shape)}: both are (B,)"
            )


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _at_least_float32(tensor)
