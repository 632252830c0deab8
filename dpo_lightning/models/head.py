"""Log-probabilities of chosen tokens out of hidden states, without keeping vocabulary scores.

The scores of n tokens over a vocabulary of V are the largest tensor of a step. Here they exist for
a chunk of tokens at a time. Products are in the type of the states, everything behind them
(scaling, log-sum-exp, sums, the gradient of the weight) in float32, or float64 for float64 states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Most scores of a chunk of tokens.
_CHUNK_SCORES = 1 << 23
# Up to so many scores in all are kept for the backward pass instead of being computed again.
_KEPT_SCORES = 1 << 24
# Most entries of a piece of the weight's gradient before it is added up.
_GRADIENT_PIECE = 1 << 24


@dataclass(frozen=True, slots=True)
class LogitsTransform:
    """What a model family does to its vocabulary scores behind the head.

    Attributes:
        scale: Factor of the scores.
        cap: The scores become ``cap * tanh(scores / cap)``; None leaves them.
    """

    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitsTransform:
        """As a model's config has it (``logit_scale``, ``logits_scaling``, softcapping)."""
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = getattr(text_config, "logit_scale", None)
        divisor = getattr(text_config, "logits_scaling", None)
        return cls(
            scale=(1.0 if scale is None else scale) / (1.0 if divisor is None else divisor),
            cap=getattr(text_config, "final_logit_softcapping", None),
        )

    def __call__(self, logits: Tensor) -> Tensor:
        """The transformed scores, at least float32; what is given stays as it is."""
        logits = logits.to(_wide(logits))
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.cap is not None:
            logits = torch.tanh(logits / self.cap) * self.cap
        return logits

    def backward(self, gradient: Tensor, transformed: Tensor) -> Tensor:
        """The gradient of the scores out of that of the transformed ones, in place."""
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
        transform: What happens to the scores behind the head.

    Returns:
        Shape (n,), float32 (float64 for float64 states).
    """
    if torch.is_autocast_enabled(states.device.type):
        states = states.to(torch.get_autocast_dtype(states.device.type))
    with torch.autocast(states.device.type, enabled=False):
        logps: Tensor = _TokenLogps.apply(  # type: ignore[no-untyped-call]
            states, weight, bias, targets, transform
        )
    return logps


class _TokenLogps(torch.autograd.Function):
    """Forward: scores chunk by chunk. Backward: the same again, or out of what was kept.

    With a frozen weight the gradient of each state is found in the forward pass already,
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
    ) -> Tensor:
        own = weight.to(states.dtype)
        logps = torch.empty(len(targets), dtype=_wide(states), device=states.device)
        normaliser = torch.empty_like(logps)
        frozen = not (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        jacobian = torch.empty_like(states) if frozen and ctx.needs_input_grad[0] else None
        keeps = not frozen and len(targets) * len(weight) <= _KEPT_SCORES
        kept = []
        for chunk in _chunks(len(targets), len(weight)):
            raw = _products(states[chunk], own, bias)
            logits = transform(raw)
            normaliser[chunk] = logits.logsumexp(-1)
            logps[chunk] = logits.gather(1, targets[chunk, None])[:, 0] - normaliser[chunk]
            if keeps:
                kept.append(raw)
            if jacobian is not None:
                scores = _score_gradient(logits, normaliser[chunk], targets[chunk], transform)
                jacobian[chunk] = scores.to(own.dtype) @ own
        ctx.transform = transform
        ctx.save_for_backward(states, weight, bias, targets, normaliser, jacobian, *kept)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of the states, and of weight and bias where those are trained."""
        states, weight, bias, targets, normaliser, jacobian, *kept = ctx.saved_tensors
        if jacobian is not None:
            return jacobian * gradient[:, None].to(jacobian.dtype), None, None, None, None
        own = weight.to(states.dtype)
        d_states = torch.empty_like(states)
        d_weight = torch.zeros(weight.shape, dtype=_wide(states), device=weight.device)
        d_bias = None if bias is None else torch.zeros_like(bias, dtype=_wide(states))
        for number, chunk in enumerate(_chunks(len(targets), len(weight))):
            raw = kept[number] if kept else _products(states[chunk], own, bias)
            scores = _score_gradient(
                ctx.transform(raw), normaliser[chunk], targets[chunk], ctx.transform
            )
            scores.mul_(gradient[chunk, None])
            if d_bias is not None:
                d_bias += scores.sum(0)
            scores = scores.to(own.dtype)
            d_states[chunk] = scores @ own
            _add_products(d_weight, scores, states[chunk])
        return (
            d_states,
            d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _chunks(tokens: int, vocabulary: int) -> list[slice]:
    size = max(1, _CHUNK_SCORES // vocabulary)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _products(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = states @ weight.t()
    return logits if bias is None else logits + bias.to(logits.dtype)


def _score_gradient(
    logits: Tensor, normaliser: Tensor, targets: Tensor, transform: LogitsTransform
) -> Tensor:
    """Gradient of each token's log-probability in its scores before the transform, (n, V)."""
    gradient = (logits - normaliser[:, None]).exp_().neg_()
    rows = torch.arange(len(targets), device=targets.device)
    gradient[rows, targets] += 1
    return transform.backward(gradient, logits)


def _add_products(total: Tensor, scores: Tensor, states: Tensor) -> None:
    """``total += scores.T @ states`` in the type of the total, a piece of it at a time."""
    if scores.dtype == total.dtype:
        total.addmm_(scores.t(), states)
        return
    size = max(1, _GRADIENT_PIECE // states.shape[1])
    for start in range(0, len(total), size):
        total[start : start + size] += scores[:, start : start + size].t() @ states
