"""The frontier of one policy: its points, by weights and by decoding, as plain entries of JSON.

Two ways lead to a point. *Weights*: the interpolated policy itself, estimated by importance weights
over all answers that were drawn. *Decoded*: answers drawn from the mixed logits, token by token,
which is a policy that can be used. A weighted point that rests on too few answers is not shown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.data.tokens import Ids
from dpo_lightning.evaluation.interpolated import AnswerScores, Pair
from dpo_lightning.evaluation.reweighting import (
    LEAST_ESS,
    Measured,
    PromptEstimates,
    estimate_interpolated,
    over_prompts,
    plain_estimates,
)
from dpo_lightning.objectives.interpolation import MOST_PARETO_K, interpolated_logps

MOST_PROMPTS = 64
ANSWERS = 16
"""Answers of policy and reference to a prompt."""

# Answers of a mixture to a prompt: together as many as say a mean, of many prompts a few each.
_MIXTURE_ANSWERS = 256
_FEWEST_ANSWERS = 4

LAMBDAS = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 5.0)
"""Places on the way from the reference (0) through the policy (1) where nothing else is asked."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A place on the way, and the answers that are drawn there.

    Attributes:
        lam: 0 is the reference, 1 the policy.
        count: Answers to a prompt.
        seed: Of all its draws, which no other mixture has.
    """

    lam: float
    count: int
    seed: int


def plan_mixtures(lambdas: Sequence[float], *, prompts: int, seed: int) -> list[Mixture]:
    """The mixtures that answers are drawn from: reference and policy first, then the others.

    Args:
        lambdas: The places that are asked for.
        prompts: How many there are.
        seed: The run's.
    """
    others = sorted({*lambdas} - {0.0, 1.0})
    few = min(ANSWERS, max(_FEWEST_ANSWERS, math.ceil(_MIXTURE_ANSWERS / prompts)))
    counts = [ANSWERS, ANSWERS, *([few] * len(others))]
    seeds = np.random.SeedSequence(seed).generate_state(len(counts), np.uint32).tolist()
    return [
        Mixture(lam, count, own)
        for lam, count, own in zip([0.0, 1.0, *others], counts, seeds, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Drawn:
    """Answers to all prompts, mixture by mixture, and what is known of them.

    Attributes:
        mixtures: Where they come from; the first is the reference, the second the policy.
        logps: (prompts, n, mixtures), float64; answers stand mixture by mixture.
        kl: (prompts, n), float64. Of each answer, how far its own mixture is from the reference.
        rewards: (prompts, n), float64; None where nothing judges.
        answers: Token ids of those to each prompt.
    """

    mixtures: Sequence[Mixture]
    logps: Tensor
    kl: Tensor
    rewards: Tensor | None
    answers: Sequence[Sequence[Ids]]

    @property
    def counts(self) -> list[int]:
        """Answers of each mixture to a prompt."""
        return [mixture.count for mixture in self.mixtures]

    def of(self, number: int) -> slice:
        """Places of a mixture's answers among those to a prompt."""
        start = sum(self.counts[:number])
        return slice(start, start + self.counts[number])


def gather(
    mixtures: Sequence[Mixture],
    answers: Sequence[Sequence[Ids]],
    *,
    score: Callable[[Sequence[Ids], Sequence[int]], AnswerScores],
    judge: Callable[[Sequence[Ids]], Sequence[float]] | None,
    prompts: int,
) -> Drawn:
    """Scores what was drawn, and puts it in order.

    Args:
        mixtures: Where the answers come from.
        answers: Those of each mixture, prompt by prompt, all of one prompt together.
        score: Scores answers in that order, given the mixture that drew each.
        judge: Marks them; None: nothing does.
        prompts: How many there are.
    """
    every = [ids for drawn in answers for ids in drawn]
    own = [number for number, drawn in enumerate(answers) for _ in drawn]
    scores = score(every, own)
    rewards = None if judge is None else torch.tensor(judge(every), dtype=torch.float64)

    def by_prompt(values: Tensor) -> Tensor:
        parts = values.split([len(drawn) for drawn in answers])
        return torch.cat([part.unflatten(0, (prompts, -1)) for part in parts], dim=1)

    numbers = by_prompt(torch.arange(len(every)))
    return Drawn(
        mixtures,
        logps=by_prompt(scores.logps),
        kl=by_prompt(scores.kl),
        rewards=None if rewards is None else by_prompt(rewards),
        answers=[[every[i] for i in row] for row in numbers.tolist()],
    )


@dataclass(frozen=True, slots=True)
class Axis:
    """The names of places on the way.

    Attributes:
        beta: Beta of the policy, where a place has a beta; None where it has only a lambda.
        all_prompts: True if there are no other prompts than those that were asked.
    """

    beta: float | None
    all_prompts: bool

    def place(self, lam: float) -> dict[str, Any]:
        """Entries of a place."""
        beta = None if self.beta is None or lam == 0 else self.beta / lam
        return {"lambda": lam, "beta": beta}

    def measured(self, name: str, found: Measured | None) -> dict[str, Any]:
        """Entries of a mean: the interval for prompts like these, and that for these alone."""
        if found is None:
            return dict.fromkeys((name, f"{name}_interval", f"{name}_interval_within"))
        mean, within, wide = (float(x) for x in (found.mean, found.within, found.over_prompts))
        half = within if self.all_prompts else wide
        return {
            name: mean,
            f"{name}_interval": [mean - half, mean + half],
            f"{name}_interval_within": [mean - within, mean + within],
        }


def decoded_point(drawn: Drawn, number: int, axis: Axis) -> dict[str, Any]:
    """The point of answers that a mixture drew itself.

    Args:
        drawn: All answers.
        number: The mixture.
        axis: The names of places.
    """
    mixture, own = drawn.mixtures[number], drawn.of(number)
    sizes = torch.full((len(drawn.kl),), float(mixture.count))

    def mean(values: Tensor | None) -> Measured | None:
        return None if values is None else over_prompts(*plain_estimates(values[:, own]), sizes)

    return (
        axis.place(mixture.lam)
        | {"method": "decoded"}
        | axis.measured("reward", mean(drawn.rewards))
        | axis.measured("kl", mean(drawn.kl))
        | {"ess": float(mixture.count), "pareto_k": None}
    )


def weighted_point(drawn: Drawn, lam: float, axis: Axis) -> tuple[dict[str, Any], str | None]:
    """The point of the interpolated policy itself, and why it is not to be shown, if it is not.

    Args:
        drawn: All answers.
        lam: Its place.
        axis: The names of places.

    Returns:
        The point, and a clause; a point that is not shown has no reward and no KL.
    """
    found = estimate_interpolated(
        drawn.logps, drawn.counts, lam, rewards=drawn.rewards, reference=0, policy=1
    )
    place = axis.place(lam) | {"method": "weights"}
    worth = {"ess": float(found.size), "pareto_k": float(found.pareto_k)}
    fault = _fault(found)
    if fault is not None:
        return place | worth, fault
    reward = None
    if found.reward is not None and found.reward_variance is not None:
        reward = over_prompts(found.reward, found.reward_variance, found.ess)
    kl = over_prompts(found.kl, found.kl_variance, found.ess)
    return place | axis.measured("reward", reward) | axis.measured("kl", kl) | worth, None


def _fault(found: PromptEstimates) -> str | None:
    """A clause on why an estimate is not to be relied upon."""
    if found.trusted:
        return None
    if found.size < LEAST_ESS:
        return (
            f"its effective sample is {float(found.size):.1f} answers a prompt, below {LEAST_ESS:g}"
        )
    return (
        f"the tail of its weights has Pareto k {float(found.pareto_k):.2f}, and only below "
        f"{MOST_PARETO_K:g} a mean settles"
    )


@dataclass(frozen=True, slots=True)
class ExactGains:
    """Exact gains on the controlled task, of the policies that the points stand for.

    Attributes:
        task: The task.
        pair: The two models.
        reference_logps: Of its outcomes under the reference, (8, 4681).
        policy_logps: The same under the policy.
    """

    task: ControlledTask
    pair: Pair
    reference_logps: Tensor
    policy_logps: Tensor

    @classmethod
    def of(cls, task: ControlledTask, pair: Pair) -> ExactGains:
        """Enumerates the outcomes under both models."""
        with pair.plain():
            return cls(
                task,
                pair,
                reference_logps=task.outcome_logps(pair.mixed(0.0)),
                policy_logps=task.outcome_logps(pair.mixed(1.0)),
            )

    def logps(self, lam: float, method: str) -> Tensor:
        """Log-probabilities of all outcomes at a place, (8, 4681)."""
        if method == "weights":
            return interpolated_logps(self.reference_logps, self.policy_logps, lam)
        with self.pair.plain():
            return self.task.outcome_logps(self.pair.mixed(lam))

    def gain_ratio(self, lam: float, method: str) -> float | None:
        """Share of the closed form's gain in reward at the same KL; None for the reference."""
        logps = self.logps(lam, method)
        ratio = self.task.report(logps, self.reference_logps, beta=1.0)["gain_ratio"]
        return None if math.isnan(ratio) else ratio
