"""Log-probabilities of chosen tokens out of hidden states, without keeping vocabulary scores.

The scores of n tokens over a vocabulary of V are the largest tensor of a step. Here they exist for
a chunk of tokens at a time. Products take the type of the states, everything behind them (scaling,
log-sum-exp, sums, the gradient of the weight) is in float32, or float64 for float64 states. On CUDA
products of half precision come out in float32, as they were added up: rounded to bfloat16, a score
of 8 is off by up to 0.03.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dpo_lightning.models.devices import autocast_dtype, is_cuda, kind_of, without_autocast


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits on the vocabulary scores that a kind of device computes at a time.

    Attributes:
        scores: Most scores at a time.
        kept: Up to so many in all are kept for the backward pass and not computed again.
    """

    scores: int
    kept: int

    @classmethod
    def of(cls, device: torch.device) -> Limits:
        """Returns the limits of a device."""
        # A CPU takes a large piece of memory anew from the system each time, page by page, which
        # costs more than what is computed in it.
        return _ON_CPU if kind_of(device) == "cpu" else _ELSEWHERE

    def pieces(self, length: int, width: int) -> list[slice]:
        """Slices of a length, each so short that times the width it has few enough scores."""
        size = max(1, self.scores // width)
        return [slice(start, min(start + size, length)) for start in range(0, length, size)]


_ON_CPU = Limits(scores=1 << 22, kept=1 << 25)
_ELSEWHERE = Limits(scores=1 << 25, kept=1 << 27)


@dataclass(frozen=True, slots=True)
class LogitsTransform:
    """Transform that a model family applies to its vocabulary scores behind the head.

    Attributes:
        scale: Factor of the scores.
        cap: The scores become ``cap * tanh(scores / cap)``; None leaves them.
    """

    scale: float = 1.0
    cap: float | None = None

    @property
    def is_identity(self) -> bool:
        """True if the transform leaves the scores unchanged."""
        return self.scale == 1.0 and self.cap is None

    @classmethod
    def of(cls, config: Any) -> LogitsTransform:
        """Reads the transform from a config (``logit_scale``, ``logits_scaling``, softcapping)."""
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = getattr(text_config, "logit_scale", None)
        divisor = getattr(text_config, "logits_scaling", None)
        return cls(
            scale=(1.0 if scale is None else scale) / (1.0 if divisor is None else divisor),
            cap=getattr(text_config, "final_logit_softcapping", None),
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """The transformed scores, at least float32 where something happened to them."""
        if not self.is_identity:
            logits = logits.to(_wide(logits))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def backward(self, gradient: Tensor, transformed: Tensor) -> Tensor:
        """Turns the gradient of transformed scores into that of the scores, in place."""
        if self.cap is not None:
            gradient.addcmul_(gradient, (transformed / self.cap).square_(), value=-1)
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient


def token_logps(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitsTransform,
) -> Tensor:
    """Log-probability of one token at each state.

    Args:
        states: Hidden states, shape (n, d), floating.
        weight: Of the head, shape (V, d).
        bias: Of the head, shape (V,), or None.
        targets: Token ids, shape (n,), int64.
        transform: Transform of the scores behind the head.

    Returns:
        Shape (n,), float32 (float64 for float64 states).
    """
    logps, _ = _apply(states, weight, bias, targets, transform, with_collisions=False)
    return logps


def token_logps_and_collisions(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitsTransform,
) -> tuple[Tensor, Tensor]:
    """Results of :func:`token_logps`, and the concentration of each token's distribution.

    Args:
        states: Hidden states, shape (n, d), floating.
        weight: Of the head, shape (V, d).
        bias: Of the head, shape (V,), or None.
        targets: Token ids, shape (n,), int64.
        transform: Transform of the scores behind the head.

    Returns:
        The log-probabilities, and as :func:`collision_logps` the collisions, which have no
        gradient; both of shape (n,), float32 (float64 for float64 states).
    """
    logps, collisions = _apply(states, weight, bias, targets, transform, with_collisions=True)
    assert collisions is not None
    return logps, collisions


@torch.no_grad()
def collision_logps(logits: Tensor) -> Tensor:
    """Log-probability that two tokens drawn from one distribution are the same.

    That is ``log sum_v p_v^2 = logsumexp(2 z) - 2 logsumexp(z)``. Here the exponential is taken
    once for both sums, and scores of any size lose nothing in a difference of large numbers.

    Args:
        logits: Transformed scores z, shape (n, V), at least float32.

    Returns:
        Shape (n,), in the type of the scores, without a gradient.
    """
    odds = (logits - logits.amax(1, keepdim=True)).exp_()
    total = odds.sum(1)
    return odds.square_().sum(1).log_().sub_(total.log_(), alpha=2)


def _apply(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitsTransform,
    *,
    with_collisions: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities and, where asked for, collisions; the products in the type of autocast."""
    dtype = autocast_dtype(states.device)
    if dtype is not None:
        states = states.to(dtype)
    with without_autocast(states.device):
        values: tuple[Tensor, Tensor | None] = _TokenLogps.apply(  # type: ignore[no-untyped-call]
            states, weight, bias, targets, transform, with_collisions
        )
    return values


class _TokenLogps(torch.autograd.Function):
    """Forward a chunk of tokens at a time, backward a block of the vocabulary at a time.

    Going back, the log-sum-exp of each token is known, so blocks of the vocabulary are independent:
    each gives its own rows of the weight's gradient, once, and adds to that of the states. With a
    frozen weight the gradient of each state is found in the forward pass already,
    ``W[y] - softmax @ W``, and only has to be scaled: nothing is computed twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: LogitsTransform,
        with_collisions: bool,
    ) -> tuple[Tensor, Tensor | None]:
        own = weight.to(states.dtype)
        limits = Limits.of(states.device)
        logps = torch.empty(len(targets), dtype=_wide(states), device=states.device)
        normaliser = torch.empty_like(logps)
        collisions = torch.empty_like(logps) if with_collisions else None
        frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        jacobian = torch.empty_like(states) if frozen and ctx.needs_input_grad[0] else None
        keeps = not frozen and len(targets) * len(weight) <= limits.kept
        kept = _products(states, own, bias) if keeps else None
        for chunk in limits.pieces(len(targets), len(weight)):
            raw = _products(states[chunk], own, bias) if kept is None else kept[chunk]
            logits = transform(raw).to(logps.dtype)
            logps[chunk] = -F.cross_entropy(logits, targets[chunk], reduction="none")
            normaliser[chunk] = logits.gather(1, targets[chunk, None])[:, 0] - logps[chunk]
            if collisions is not None:
                collisions[chunk] = collision_logps(logits)
            if jacobian is not None:
                scores = _score_gradient(
                    raw, targets[chunk], logps[chunk], normaliser[chunk], None, transform
                )
                jacobian[chunk] = _product(scores.to(own.dtype), own)
        if collisions is not None:
            ctx.mark_non_differentiable(collisions)
        ctx.transform = transform
        ctx.save_for_backward(states, weight, bias, targets, logps, normaliser, jacobian, kept)
        return logps, collisions

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> Any:
        """Gradients of the states, and of weight and bias where those are trained."""
        states, weight, bias, targets, logps, normaliser, jacobian, kept = ctx.saved_tensors
        if jacobian is not None:
            return jacobian * gradient[:, None].to(jacobian.dtype), None, None, None, None, None
        own = weight.to(states.dtype)
        d_states = torch.zeros(states.shape, dtype=logps.dtype, device=states.device)
        d_weight = torch.empty_like(weight)
        d_bias = None if bias is None else torch.empty_like(bias)
        for block in Limits.of(states.device).pieces(len(weight), len(targets)):
            if kept is None:
                raw = _products(states, own[block], None if bias is None else bias[block])
            else:
                raw = kept[:, block]
            scores = _score_gradient(
                raw, targets - block.start, logps, normaliser, gradient, ctx.transform
            ).to(own.dtype)
            d_states += _product(scores, own[block])
            d_weight[block] = _product(scores.t(), states)
            if d_bias is not None:
                d_bias[block] = scores.sum(0, dtype=logps.dtype)
        return d_states.to(states.dtype), d_weight, d_bias, None, None, None


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """A product of two matrices of one type, unrounded where the device gives it so."""
    if is_cuda(one.device) and one.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(one, other, out_dtype=torch.float32)
    return one @ other


def _products(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = _product(states, weight.t())
    return logits if bias is None else logits + bias.to(logits.dtype)


def _score_gradient(
    raw: Tensor,
    targets: Tensor,
    logps: Tensor,
    normaliser: Tensor,
    outer: Tensor | None,
    transform: LogitsTransform,
) -> Tensor:
    """Gradient of the log-probabilities in a block of the scores before the transform.

    Args:
        raw: Those scores, shape (n, v).
        targets: Place of each target in the block, outside of it where it is none; shape (n,).
        logps: Log-probability of each target, shape (n,), at least float32.
        normaliser: Log-sum-exp over all transformed scores, shape (n,), the same type.
        outer: Gradient of each log-probability, shape (n,); None for 1.
        transform: Transform of the scores.

    Returns:
        Shape (n, v), in the type of the scores.
    """
    transformed = transform(raw)
    gradient = (transformed - normaliser[:, None]).exp_().neg_()
    # 1 - p of a likely target is lost in a difference of rounded numbers; this one is exact. Which
    # rows have their target here is not asked, as a GPU would have to answer first.
    places = targets.clamp(0, raw.shape[1] - 1)[:, None]
    inside = (targets == places[:, 0])[:, None]
    own = torch.where(inside, -logps.expm1()[:, None], gradient.gather(1, places))
    gradient.scatter_(1, places, own)
    if outer is not None:
        gradient.mul_(outer[:, None])
    return transform.backward(gradient, transformed).to(raw.dtype)
