"""The theorem of DPO as an experiment: its loss alone leads to the closed-form optimum.

Over labels that follow the Bradley-Terry model of a reward r, the population loss of DPO (Eq. 7 of
https://arxiv.org/abs/2305.18290) is lowest at pi*(y|x) = pi_ref(y|x) exp(r(x, y) / beta) / Z(x),
the policy with the highest E[r] - beta * KL(pi || pi_ref), and Z is never computed (Section 4 and
Theorem 1 there). The gradient says why: with m = beta * (logratio_1 - logratio_2), a pair pulls on
m by sigmoid(m) - sigmoid(r_1 - r_2), which is 0 for all pairs exactly where beta * logratio is r
plus a constant of the prompt. Normalised, that is pi*.

Here the policy is a free table over a space that is enumerated, so that nothing but the loss
decides where it ends: no model that cannot say pi*, no finite sample of labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dpo_lightning.objectives.partition import optimal_logps

# Of one step at most. Far more than a convex loss asks for; a bound, lest a nan go on for ever.
_HALVINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class TabularFit:
    """A policy found by minimising the population loss, and the way there.

    Attributes:
        policy_logps: (prompts, n), float64. The fitted policy, normalised per prompt.
        losses: (steps + 1,), float64. `population_loss` at the start and after each step taken.
        kl: (steps + 1, prompts), float64. KL(pi* || policy) in nats, likewise. It is a report:
            nothing of it goes into a step.
    """

    policy_logps: Tensor
    losses: Tensor
    kl: Tensor


def population_loss(
    policy_logps: Tensor, reference_logps: Tensor, rewards: Tensor, beta: float
) -> Tensor:
    """The DPO loss over all pairs that the reference can draw, each with its exact label.

    Two responses are drawn from the reference and the first is preferred with probability
    sigmoid(r_1 - r_2). The pair comes up in either order, so a prompt's expected loss is the sum
    over all ordered pairs of 2 pi_ref(y_1) pi_ref(y_2) sigmoid(r_1 - r_2) times
    -log sigmoid(beta * (logratio_1 - logratio_2)): log 2 at the reference, as in any DPO run. A
    response drawn twice is no comparison, and adds a constant.

    Args:
        policy_logps: (prompts, n), floating. log pi of every response. A constant on all of a
            prompt changes nothing, so it need not be normalised.
        reference_logps: (prompts, n), floating. log pi_ref of every response; where it is -inf,
            the policy's own value does not matter.
        rewards: (prompts, n), floating and finite. A constant on all of a prompt changes nothing.
        beta: Above 0.

    Returns:
        A scalar, the mean over the prompts. It takes a few times (prompts, n, n) of memory.
    """
    weights = _pair_weights(reference_logps, rewards)
    return _prompt_losses(policy_logps, reference_logps, weights, beta).mean()


def fit_tabular_policy(
    reference_logps: Tensor,
    rewards: Tensor,
    beta: float,
    *,
    steps: int = 100,
    tolerance: float = 1e-6,
) -> TabularFit:
    """Minimises the population loss over all policies, from the reference on.

    Damped Newton steps. Plain gradients hardly move a response of probability 1e-8, whose pairs
    weigh as little, though the optimum may say it often; Newton steps do not depend on such scales.
    The gradient is autograd's, of the loss itself; the Hessian only says how far to go.

    Where rewards jump by 35 or more with nothing in between, every label across the jump is 0 or 1
    in float64 and the loss no longer says how far it is. There a prompt stops.

    Args:
        reference_logps: (prompts, n), float64, normalised per prompt; -inf is allowed.
        rewards: (prompts, n), float64 and finite. The reward of every response.
        beta: Finite and above 0.
        steps: At most so many.
        tolerance: Stop after a step that moves no `beta * logratio` by more than this. Steps
            converge quadratically, so what remains is far less.

    Returns:
        The fit. Whether `steps` sufficed is seen in its `kl`.

    Raises:
        ValueError: For shapes that differ or are not (prompts, n), a dtype other than float64, a
            reference that is not normalised, rewards that are not finite, or a beta out of range.

    Example:
        From equal probabilities to those of the optimum, 1/4 and 3/4.

        >>> reference = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()  # (prompts, n)
        >>> rewards = torch.tensor([[1.0, 3.0]], dtype=torch.float64).log()  # (prompts, n)
        >>> fit = fit_tabular_policy(reference, rewards, beta=1.0)
        >>> fit.policy_logps.exp()  # (prompts, n)
        tensor([[0.2500, 0.7500]], dtype=torch.float64)
    """
    _check_table(reference_logps, rewards, beta)
    reference, rewards = reference_logps.detach(), rewards.detach()
    optimum = optimal_logps(reference, rewards, beta)
    weights = _pair_weights(reference, rewards)

    def losses_of(table: Tensor) -> Tensor:
        return _prompt_losses(table, reference, weights, beta)

    # Not normalised on the way: the constant of a prompt cancels in every margin.
    table = reference.clone()
    losses = losses_of(table)
    history = [losses.mean()]
    kl = [_divergence(optimum, reference)]
    for _ in range(steps):
        step, slope = _newton_step(table, reference, weights, beta)
        table, losses = _searched(table, losses, step, slope, losses_of)
        history.append(losses.mean())
        kl.append(_divergence(optimum, table.log_softmax(1)))
        if beta * step.abs().max() <= tolerance:
            break
    return TabularFit(
        policy_logps=table.log_softmax(1), losses=torch.stack(history), kl=torch.stack(kl)
    )


def _check_table(reference_logps: Tensor, rewards: Tensor, beta: float) -> None:
    """Raises where a fit would mean nothing."""
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta!r}: must be a finite number > 0")
    if reference_logps.ndim != 2 or reference_logps.shape != rewards.shape:
        raise ValueError(
            f"reference_logps has shape {tuple(reference_logps.shape)}, rewards "
            f"{tuple(rewards.shape)}: both are (prompts, n)"
        )
    # At a probability of 1e-8 a pair's pull is lost in float32's rounding of the others.
    if reference_logps.dtype != torch.float64 or rewards.dtype != torch.float64:
        raise ValueError(
            f"reference_logps is {reference_logps.dtype} and rewards {rewards.dtype}: "
            "both are float64"
        )
    if not rewards.isfinite().all():
        raise ValueError("rewards has values that are not finite")
    if (reference_logps.exp().sum(1) - 1).abs().amax() > 1e-6:
        raise ValueError("reference_logps is not normalised: log_softmax it over the responses")


def _searched(
    table: Tensor,
    losses: Tensor,
    step: Tensor,
    slope: Tensor,
    losses_of: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Table and losses after as much of the step as lowers the loss of each prompt."""
    length = torch.ones_like(losses)
    for _ in range(_HALVINGS):
        ahead = table + length.unsqueeze(1) * step
        ahead_losses = losses_of(ahead)
        # Near the minimum a step gains less than the loss rounds to.
        allowed = losses * (1 + 1e-14) + 1e-4 * length * slope
        if (ahead_losses <= allowed).all():
            break
        length = torch.where(ahead_losses <= allowed, length, length / 2)
    return ahead, ahead_losses


def _pair_weights(reference_logps: Tensor, rewards: Tensor) -> Tensor:
    """Probability of each (chosen, rejected), (prompts, n) -> (prompts, n, n)."""
    drawn = (reference_logps.unsqueeze(2) + reference_logps.unsqueeze(1)).exp()
    return 2 * drawn * (rewards.unsqueeze(2) - rewards.unsqueeze(1)).sigmoid()


def _margins(policy_logps: Tensor, reference_logps: Tensor, beta: float) -> Tensor:
    """Beta * (logratio_1 - logratio_2) of every pair, (prompts, n) -> (prompts, n, n)."""
    # -inf - -inf would be nan, and so would its product with the pair's weight of 0.
    possible = reference_logps > -math.inf
    logratios = torch.where(possible, policy_logps, 0) - torch.where(possible, reference_logps, 0)
    return beta * (logratios.unsqueeze(2) - logratios.unsqueeze(1))


def _prompt_losses(
    policy_logps: Tensor, reference_logps: Tensor, weights: Tensor, beta: float
) -> Tensor:
    """The population loss of each prompt, (prompts,)."""
    return -(weights * F.logsigmoid(_margins(policy_logps, reference_logps, beta))).sum((1, 2))


def _newton_step(
    policy_logps: Tensor, reference_logps: Tensor, weights: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """The Newton step of each prompt's table, (prompts, n), and the slope along it, (prompts,).

    A pair's second derivative in its margin m is sigmoid'(m) = sigmoid(m) sigmoid(-m), whatever
    its label, times 2 pi_ref(y_1) pi_ref(y_2). In the unknowns u = sqrt(pi_ref) * beta * logratio
    the Hessian has entries of order 1 for rare responses as for frequent ones. Only along a
    constant of the prompt it is flat, where the gradient is 0 too; there it is given curvature.
    """
    table = policy_logps.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(
        _prompt_losses(table, reference_logps, weights, beta).sum(), table
    )
    p = reference_logps.exp()
    root = p.sqrt()
    margins = _margins(policy_logps, reference_logps, beta)
    curvature = 2 * margins.sigmoid() * (-margins).sigmoid()
    hessian = root.unsqueeze(2) * root.unsqueeze(1) * (1 - curvature)
    hessian += torch.diag_embed((curvature * p.unsqueeze(1)).sum(2))
    scale = beta * root
    # What the reference never says has no gradient, and stays.
    inverse = torch.where(scale > 0, 1 / scale, 0)
    factor, failed = torch.linalg.cholesky_ex(hessian)
    solved = torch.cholesky_solve((inverse * gradient).unsqueeze(2), factor).squeeze(2)
    # Singular where every label across a jump of the rewards is 0 or 1 in float64.
    step = torch.where((failed == 0).unsqueeze(1), -inverse * solved, 0)
    return step, (gradient * step).sum(1)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each prompt, (prompts,); p may be -inf."""
    return torch.where(p > -math.inf, p.exp() * (p - q), 0).sum(1)
