"""Links of the f-divergences: from a log-ratio to the score whose margin a loss looks at.

A policy that is regularised by D_f(pi || pi_ref) = E_ref[f(pi / pi_ref)] has the optimum
r(x, y) = beta * f'(pi(y|x) / pi_ref(y|x)) + a constant of the prompt (https://arxiv.org/abs/2309.16240,
Theorem 1), so f' of the ratio stands where the reverse KL has its log. The constant, the normaliser
of the prompt, cancels in the margin of two responses and nowhere else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from dpo_lightning.objectives.registry import DIVERGENCES

# Where exp goes on as a straight line, in nats: float32 holds the square of a margin of log-ratios
# of +-1e6, (2e6 * e^25)^2 = 2e34.
_LINEAR_FROM = 25.0


def link(name: str, alpha: float) -> Callable[[Tensor], Tensor] | None:
    """The derivative f' by the log-ratio, up to a constant; None for the reverse KL's identity.

    Args:
        name: One of `DIVERGENCES`.
        alpha: Order of the alpha divergence; 1 is the reverse KL, 0 the forward KL.

    Raises:
        ValueError: For another name.
    """
    if name not in DIVERGENCES:
        raise ValueError(f"unknown f-divergence {name!r}: choose one of {', '.join(DIVERGENCES)}")
    if name == "forward_kl":
        return functools.partial(_alpha, alpha=0.0)
    if name == "js_divergence":
        return _js
    # The limit is the logarithm, and close to it the quotient would only round.
    if name == "alpha_divergence" and abs(alpha - 1) > 1e-6:
        return functools.partial(_alpha, alpha=alpha)
    return None


def _alpha(logratios: Tensor, *, alpha: float) -> Tensor:
    """(t^(alpha - 1) - 1) / (alpha - 1); with alpha 0, 1 - 1/t, the forward KL's."""
    order = alpha - 1
    return _expm1(order * logratios) / order


def _js(logratios: Tensor) -> Tensor:
    """log(2 t / (1 + t))."""
    return math.log(2) + F.logsigmoid(logratios)


def _expm1(x: Tensor) -> Tensor:
    """exp(x) - 1, going on as a straight line where exp would overflow: the gradient stays."""
    # Of the two terms one alone has a gradient: with x - x.clamp() for the second, the slope would
    # be added and taken away again, and nothing of exp's would be left.
    slope = math.exp(_LINEAR_FROM)
    return x.clamp(max=_LINEAR_FROM).expm1() + slope * (x - _LINEAR_FROM).relu()
