"""Losses on rankings: K responses to one prompt, compared all at once.

Both are made of one piece, a response against all that are strictly worse: with scores
s = beta * logratio, the better one's share of the partition function over it and them,

    -log( exp(s_i) / (exp(s_i) + sum_j exp(s_j)) ) = -log sigmoid(-logsumexp_j(s_j - s_i)).

The sigmoid is that of the pairwise loss: with a single worse response it is its very value. Written
so, on differences, scores of +-1e6 neither overflow nor lose a small margin between them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ListwiseLoss:
    """An entry of `LISTWISE_LOSSES`.

    Attributes:
        fn: `fn(against_worse, best) -> Tensor (n,)`. Both are (n, K), K the largest group:
            each response's loss against all that are strictly worse, 0 where none is and in the
            padding; and whether it is one of the best of its group, False in the padding.
        paper: Source of the loss.
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    paper: str


def _softmax(against_worse: Tensor, best: Tensor) -> Tensor:
    """The best response against all others, https://arxiv.org/abs/2406.09215.

    -log sigmoid(-log sum_j exp(s_j - s_best)), DPO with several negatives, whose own ranking does
    not matter. Of several that are tied for the best it is the mean, each normalised over itself
    and the worse ones.
    """
    return torch.where(best, against_worse, 0).sum(1) / best.sum(1)


def _plackett_luce(against_worse: Tensor, best: Tensor) -> Tensor:
    """Negative log-likelihood of the ranking, https://arxiv.org/abs/2305.18290, appendix A.3.

    The model of Plackett (1975) draws the best response by its share of the partition function,
    then the next one from what is left, and so on. Tied responses are not compared: each is drawn
    from itself and the strictly worse ones. Breslow's treatment of ties normalises each over the
    tied ones too, which would push the scores of equally good responses together and make a group
    of K ties cost K log K at the least; here it costs nothing and has no gradient, as a tie has in
    the pairwise losses. Without ties the two are the same.
    """
    del best
    return against_worse.sum(1)


LISTWISE_LOSSES: Mapping[str, ListwiseLoss] = {
    "softmax": ListwiseLoss(fn=_softmax, paper="https://arxiv.org/abs/2406.09215"),
    "plackett_luce": ListwiseLoss(
        fn=_plackett_luce, paper="https://arxiv.org/abs/2305.18290, appendix A.3"
    ),
}


def listwise_loss(
    name: str,
    *,
    scores: Tensor,
    group: Tensor,
    rank: Tensor,
    shape: tuple[int, int] | None = None,
) -> Tensor:
    """The loss of each group, unreduced and differentiable.

    Groups of any sizes go in one call. A group in which no response is worse than another has
    loss 0 and gradient 0.

    Args:
        name: A key of `LISTWISE_LOSSES`.
        scores: (N,), floating and finite. Beta * logratio of each response, one group after the
            other. Half precision is taken up to float32; float64 stays float64.
        group: (N,), int64. The group of each response, numbered 0..n-1 in order, none left out.
        rank: (N,), int64. The lower the better; equal ones are tied.
        shape: (n, K), the number of groups and the size of the largest, where the host knows them:
            then it does not wait for a device, and the numbering is not checked.

    Returns:
        (n,), float32, or float64 for float64 scores. It takes memory of (n, K, K), K the size of
        the largest group.

    Raises:
        ValueError: For an unknown loss, shapes or dtypes other than these, or groups that are not
            numbered so.

    Example:
        A pair whose scores are equal costs log 2, the first of three equal ones log 3.

        >>> scores = torch.zeros(5)  # (N,)
        >>> group = torch.tensor([0, 0, 1, 1, 1])  # (N,)
        >>> rank = torch.tensor([0, 1, 0, 1, 2])  # (N,)
        >>> listwise_loss("softmax", scores=scores, group=group, rank=rank)  # (n,)
        tensor([0.6931, 1.0986])
    """
    if name not in LISTWISE_LOSSES:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(LISTWISE_LOSSES)}")
    for key, tensor in {"scores": scores, "group": group, "rank": rank}.items():
        if tensor.ndim != 1 or tensor.shape != scores.shape:
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)}, scores {tuple(scores.shape)}: "
                "both are (N,)"
            )
    if not scores.is_floating_point():
        raise ValueError(f"scores is {scores.dtype}: it is floating")
    if group.dtype != torch.int64 or rank.dtype != torch.int64:
        raise ValueError(f"group is {group.dtype} and rank {rank.dtype}: both are int64")

    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if not len(scores):
        return scores
    against_worse, best = _stages(scores, group, rank, shape)
    return LISTWISE_LOSSES[name].fn(against_worse, best)


def _stages(
    scores: Tensor, group: Tensor, rank: Tensor, shape: tuple[int, int] | None
) -> tuple[Tensor, Tensor]:
    """The arguments of a loss, (N,) three times -> (n, K), (n, K)."""
    steps = group.diff(prepend=group.new_full((1,), -1))
    index = torch.arange(len(group), device=group.device)
    position = index - torch.where(steps == 1, index, 0).cummax(0).values
    if shape is None:
        wrong = ((steps != 0) & (steps != 1)).any() | (group[0] != 0)
        # All that the host has to know, in one wait for the device.
        misnumbered, *found = torch.stack(
            [wrong.long(), group[-1] + 1, position.max() + 1]
        ).tolist()
        if misnumbered:
            raise ValueError("group is not numbered 0..n-1 in order")
        shape = (found[0], found[1])
    n, largest = shape

    at = (group, position)
    real = torch.zeros(n, largest, dtype=torch.bool, device=scores.device).index_put(
        at, torch.ones_like(group, dtype=torch.bool)
    )
    padded = scores.new_zeros(n, largest).index_put(at, scores)
    ranks = rank.new_zeros(n, largest).index_put(at, rank)
    # worse[g, i, j]: j is strictly worse than i, and both are responses of g.
    worse = ranks.unsqueeze(1) > ranks.unsqueeze(2)
    worse &= real.unsqueeze(1) & real.unsqueeze(2)
    best = real & ~worse.any(1)

    behind = padded.unsqueeze(1) - padded.unsqueeze(2)
    # Where none is worse the sum is over nothing: log 0 = -inf, a loss of 0 and a gradient of 0.
    behind = torch.where(worse, behind, -math.inf)
    return -F.logsigmoid(-behind.logsumexp(2)), best
