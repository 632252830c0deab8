"""Quality of held-out margins as predictions of the better response, free of beta.

A policy's margins are a score difference of its own scale: beta times the margin is the implicit
reward, and a larger beta makes smaller margins. So the scale is fitted first. What is left is the
Bradley-Terry log-loss of the best scale, which tells a wide margin from a narrow one, where the
accuracy only counts which side of zero it is on.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

_HALVINGS = 80
# Where every pair is ranked right the loss falls for ever; a margin of the mean size counts as so
# many nats at most.
_LARGEST = 50.0


def fitted_log_losses(margins: Tensor, group: Tensor, share: Tensor) -> Tensor:
    """Bradley-Terry log-loss of each group, at the scale at which their mean is least.

    Args:
        margins: Log-ratio of the better response less that of the worse one, for each pair, (M,).
        group: Group of each pair, numbered 0..G-1, (M,).
        share: Share of each pair in its group, (M,).

    Returns:
        The losses, (G,), float64. With a scale of 0, which is the least there is, each is ln 2.
    """
    margins, share = margins.double(), share.double()
    scale = _fit(margins, share)
    groups = int(group.max()) + 1 if len(group) else 0
    return margins.new_zeros(groups).index_add(0, group, softplus(-scale * margins) * share)


def _fit(margins: Tensor, share: Tensor) -> Tensor:
    """The scale of at least 0 at which the loss is least; it is convex in it."""
    size = (margins.abs() * share).sum() / share.sum()
    low, high = margins.new_zeros(()), _LARGEST / size.clamp(min=1e-12)

    def slope(scale: Tensor) -> Tensor:
        return -(share * margins * torch.sigmoid(-scale * margins)).sum()

    if slope(low) >= 0:
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if slope(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def accuracies(margins: Tensor, group: Tensor, share: Tensor) -> Tensor:
    """Share of each group's pairs that are ranked right, a tie counting one half, (G,), float64."""
    right = (margins.double().sign() + 1) / 2
    groups = int(group.max()) + 1 if len(group) else 0
    return right.new_zeros(groups).index_add(0, group, right * share.double())
