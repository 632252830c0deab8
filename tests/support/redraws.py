"""Answers drawn anew many times, of models of which all is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dpo_lightning.evaluation.reweighting import estimate_interpolated, over_prompts
from dpo_lightning.objectives.interpolation import interpolated_logps

# Redraws that are held in memory at once.
_AT_ONCE = 100


@dataclass(frozen=True)
class Answers:
    """Answers to all prompts, drawn many times.

    Attributes:
        logps: (draws, prompts, n, models), float64.
        rewards: (draws, prompts, n).
    """

    logps: Tensor
    rewards: Tensor


class Enumerated:
    """Models whose every response is listed.

    Args:
        models: Log-probabilities, (models, prompts, responses); the reference, the policy, others.
        counts: Answers of each to a prompt.
        rewards: (prompts, responses).
    """

    def __init__(self, models: Tensor, counts: Sequence[int], rewards: Tensor) -> None:
        self.models, self.counts, self._rewards = models, [*counts], rewards

    def draw(self, draws: int, seed: int) -> Answers:
        generator = torch.Generator().manual_seed(seed)
        prompts = self.models.shape[1]
        drawn = torch.cat(
            [
                torch.multinomial(
                    model.exp(), draws * count, replacement=True, generator=generator
                ).view(prompts, draws, count)
                for model, count in zip(self.models, self.counts, strict=True)
            ],
            dim=2,
        )  # (prompts, draws, n)
        places = drawn.flatten(1)

        def of(table: Tensor) -> Tensor:
            return table.gather(1, places).view(drawn.shape).transpose(0, 1)

        logps = torch.stack([of(model) for model in self.models], dim=-1)
        return Answers(logps, of(self._rewards))

    def truth(self, lam: float) -> tuple[float, float]:
        """Expected reward and KL of the interpolated policy."""
        reference, policy = self.models[:2]
        logps = interpolated_logps(reference, policy, lam)
        reward = (logps.exp() * self._rewards).sum(1).mean()
        return float(reward), float((logps.exp() * (logps - reference)).sum(1).mean())


class Normal:
    """Models whose log-ratios are normal, as sums over many tokens are nearly.

    With s ~ N(-K, 2K) under the reference, E[exp(lam s)] = exp((lam^2 - lam) K), so that under
    lam s ~ N((2 lam - 1) K, 2K), and KL(pi_lam || pi_ref) = lam^2 K. The reward is s in standard
    deviations, with noise. Prompts differ: K goes from half to one and a half of its mean.

    Args:
        kl: Mean KL of the policy, in nats.
        prompts: How many.
        lambdas: Place of each model; 0 and 1 first.
        counts: Answers of each to a prompt.
    """

    def __init__(
        self, kl: float, prompts: int, lambdas: Sequence[float], counts: Sequence[int]
    ) -> None:
        self.counts = [*counts]
        self._lambdas = lambdas
        self._kl = kl * torch.linspace(0.5, 1.5, prompts, dtype=torch.float64)

    def draw(self, draws: int, seed: int) -> Answers:
        generator = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        kl = self._kl[:, None]
        spread = (2 * kl).sqrt()
        parts = [
            (2 * lam - 1) * kl + spread * noise(draws, len(self._kl), count)
            for lam, count in zip(self._lambdas, self.counts, strict=True)
        ]
        s = torch.cat(parts, dim=2)
        logps = torch.stack([lam * s - (lam * lam - lam) * kl for lam in self._lambdas], dim=-1)
        return Answers(logps, s / spread + 0.7 * noise(*s.shape))

    def truth(self, lam: float) -> tuple[float, float]:
        reward = (2 * lam - 1) * self._kl / (2 * self._kl).sqrt()
        return float(reward.mean()), float((lam**2 * self._kl).mean())


@dataclass(frozen=True)
class Coverage:
    """Shares of redraws.

    Attributes:
        shown: In which the point is shown.
        reward: Of these, in which the interval of the reward has the truth.
        kl: The same of the KL.
        draws: Those in which it is shown.
    """

    shown: float
    reward: float
    kl: float
    draws: int


def coverage(models: Enumerated | Normal, lam: float, *, draws: int, seed: int = 0) -> Coverage:
    """Shares of the redraws in which intervals for these prompts have the truth."""
    reward, kl = models.truth(lam)
    found = []
    for start in range(0, draws, _AT_ONCE):
        answers = models.draw(min(_AT_ONCE, draws - start), seed + start)
        estimates = estimate_interpolated(
            answers.logps, models.counts, lam, rewards=answers.rewards, reference=0, policy=1
        )
        assert estimates.reward is not None
        assert estimates.reward_variance is not None
        own = over_prompts(estimates.reward, estimates.reward_variance, estimates.ess)
        far = over_prompts(estimates.kl, estimates.kl_variance, estimates.ess)
        hits = [(m.mean - t).abs() <= m.within for m, t in ((own, reward), (far, kl))]
        found.append(torch.stack([estimates.trusted, *hits]))
    shown, *hit = torch.cat(found, dim=1)
    count = int(shown.sum())
    own_share, far_share = (float(h[shown].double().mean()) if count else float("nan") for h in hit)
    return Coverage(count / draws, own_share, far_share, count)


def pooled(found: Sequence[Coverage]) -> Coverage:
    """Coverage over all points that are shown."""
    draws = sum(one.draws for one in found)

    def mean(name: str) -> float:
        return sum(getattr(one, name) * one.draws for one in found if one.draws) / draws

    return Coverage(sum(one.shown for one in found) / len(found), mean("reward"), mean("kl"), draws)
