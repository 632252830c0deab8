"""Losses on pairs: a chosen and a rejected response to one prompt.

Every loss is a small function of a `PairLogps`, registered in `PAIRWISE_LOSSES` and reached through
`pairwise_loss`, which checks the call once for all of them. Losses come back per pair: how pairs
are averaged (over a group's pairs, then over groups, with weights) is the caller's matter.

All of them see responses only through their log-probabilities, so the intractable Z(x) of the
closed-form optimum never appears: it is the same for both responses and cancels in the margin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogps:
    """What a pairwise loss may look at. Tensors are (B,), floating, at least float32.

    The reference's logps are both None when there is no reference. The rejected side may be None
    for a loss that does not use it.
    """

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor | None
    reference_chosen_logps: Tensor | None
    reference_rejected_logps: Tensor | None
    chosen_lengths: Tensor
    rejected_lengths: Tensor | None

    def margin(self) -> Tensor:
        """The chosen logratio minus the rejected one, (B,); of plain logps without a reference.

        The logratios come first: policy and reference are close, so each of these differences is
        exact or nearly so, while chosen minus rejected of long responses would round.
        """
        assert self.policy_rejected_logps is not None
        if self.reference_chosen_logps is None or self.reference_rejected_logps is None:
            return self.policy_chosen_logps - self.policy_rejected_logps
        chosen_logratios = self.policy_chosen_logps - self.reference_chosen_logps
        rejected_logratios = self.policy_rejected_logps - self.reference_rejected_logps
        return chosen_logratios - rejected_logratios


@dataclass(frozen=True, slots=True, kw_only=True)
class PairwiseLoss:
    """An entry of `PAIRWISE_LOSSES`.

    Attributes:
        fn: `fn(pairs, *, beta, **options) -> Tensor (B,)`.
        uses_reference: False for a loss that never has a reference. True means that it takes one;
            whether it can do without (both logps None) is said in its docstring.
        uses_rejected: False for a loss on the chosen response alone.
        options: Every option's name and default.
        paper: Where the loss comes from.
    """

    fn: Callable[..., Tensor]
    uses_reference: bool
    uses_rejected: bool
    options: Mapping[str, float] = field(default_factory=dict)
    paper: str


def _sigmoid(pairs: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO, Eq. 7 of https://arxiv.org/abs/2305.18290: -log sigmoid(beta * margin).

    With label smoothing e it is the conservative form: each label is wrong with probability e
    (https://ericmitchell.ai/cdpo.pdf, Eq. 3). Without a reference it is -log(exp(beta * lp+) / Z)
    with Z = exp(beta * lp+) + exp(beta * lp-), the normaliser over the two responses; dividing
    both terms by the numerator's gives the same sigmoid, on the difference of the plain logps.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing is {label_smoothing!r}: it is the share of flipped labels, "
            "at least 0 and below 0.5"
        )
    reward_margin = beta * pairs.margin()
    as_labelled = -F.logsigmoid(reward_margin)
    flipped = -F.logsigmoid(-reward_margin)
    return (1 - label_smoothing) * as_labelled + label_smoothing * flipped


def _sft(pairs: PairLogps, *, beta: float) -> Tensor:
    """Negative log-likelihood per token of the chosen response: maximum likelihood, no beta."""
    del beta
    return -pairs.policy_chosen_logps / pairs.chosen_lengths


PAIRWISE_LOSSES: Mapping[str, PairwiseLoss] = {
    "sigmoid": PairwiseLoss(
        fn=_sigmoid,
        uses_reference=True,
        uses_rejected=True,
        options={"label_smoothing": 0.0},
        paper="https://arxiv.org/abs/2305.18290",
    ),
    "sft": PairwiseLoss(
        fn=_sft,
        uses_reference=False,
        uses_rejected=False,
        paper="maximum likelihood of the best response; where a reference comes from",
    ),
}


def pairwise_loss(
    name: str,
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor | None,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor | None,
    beta: float,
    **options: float,
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
        beta: How strongly the policy is held to the reference; finite and above 0.
        **options: The loss's own, as in `PAIRWISE_LOSSES[name].options`; others are refused.

    Returns:
        (B,), float32, or float64 for float64 logps.

    Raises:
        ValueError: For an unknown loss or option, a value out of range, one reference tensor
            without the other, or shapes that differ.
    """
    if name not in PAIRWISE_LOSSES:
        raise ValueError(f"unknown loss {name!r}: choose one of {', '.join(PAIRWISE_LOSSES)}")
    loss = PAIRWISE_LOSSES[name]
    for option in options:
        if option not in loss.options:
            choices = ", ".join(loss.options) or "none"
            raise ValueError(f"loss {name!r} has no option {option!r}: its options are {choices}")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta!r}: it is a finite number above 0")
    if (reference_chosen_logps is None) != (reference_rejected_logps is None):
        raise ValueError("reference logps of one side alone: give both, or None for both")
    if loss.uses_rejected and (policy_rejected_logps is None or rejected_lengths is None):
        raise ValueError(f"loss {name!r} compares two responses: the rejected one is None")

    tensors = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
    }
    # (B, 1) against (B,) would broadcast to every pairing of the batch, and train on it.
    for key, tensor in tensors.items():
        if tensor is not None and (tensor.ndim != 1 or tensor.shape != policy_chosen_logps.shape):
            raise ValueError(
                f"{key} has shape {tuple(tensor.shape)}, policy_chosen_logps "
                f"{tuple(policy_chosen_logps.shape)}: both are (B,)"
            )
    pairs = PairLogps(
        policy_chosen_logps=_at_least_float32(policy_chosen_logps),
        policy_rejected_logps=_optional(policy_rejected_logps),
        reference_chosen_logps=_optional(reference_chosen_logps),
        reference_rejected_logps=_optional(reference_rejected_logps),
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
    )
    return loss.fn(pairs, beta=beta, **{**loss.options, **options})


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _optional(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else _at_least_float32(tensor)
