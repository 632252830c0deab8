"""The controlled task: a weather language so small that everything about it can be computed.

A prompt is two words, the weather of two days; a response is the forecast, at most four words. The
vocabulary has nine tokens: `</s>` (id 0: begin, end and padding) and the eight `WORDS` (ids 1-8).

    prompt    [0, a, b]                    `</s>` in front, put there by the tokenizer
    response  up to 3 words, then </s>     1 + 8 + 64 + 512 = 585 of them (one is `</s>` alone)
              or 4 words, cut off          4096 of them, with no `</s>`

These 4681 outcomes are all that sampling up to four tokens can yield, and none begins another. So
for *any* causal model with this vocabulary the softmax probabilities of its tokens, multiplied
along each outcome, sum to exactly 1 per prompt, with no mask and nothing renormalised: log pi(y|x)
is the plain sum of the log-softmax over the outcome's tokens, given `[0, a, b]`. Whoever holds an
exported model can check every number reported about it.

The true reward of a response is the sum of its words' values, which differ by prompt
(`word_values`); the empty response and the end token are worth 0. Labels are Bradley-Terry on that
reward. With pi_ref and the reward known for every outcome, the expected reward, the KL
divergences, Z(x) and the optimum pi* are sums over 4681 terms.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.objectives.partition import exact_log_partition, optimal_logps

END = 0
"""Id of `</s>`."""

WORDS = ("sun", "rain", "wind", "fog", "snow", "hail", "mist", "calm")
"""The words; word i has id i + 1."""

MAX_TOKENS = 4
"""Tokens in the longest response."""

MAX_LENGTH = 3 + MAX_TOKENS
"""Tokens of the longest prompt and response."""

PROMPTS = tuple(f"{first} {second}" for first in WORDS[:4] for second in ("snow", "calm"))

_REWARD_SEED = 20
# What a word is worth: in general, after the first word of the prompt, and after the second.
_REWARD_PARTS = (1.0, 0.4, 0.8)
_REWARD_SPREAD = 1.15


def word_values() -> list[list[float]]:
    """The value of word i after prompt p, as `[p][i]`; rounded to one decimal.

    Each part ranks the words anew and is worth evenly spaced values around 0. Drawn with Python's
    generator, whose `random()` is the same in every version.
    """
    draw = random.Random(_REWARD_SEED)

    def ranking() -> list[float]:
        keys = [draw.random() for _ in WORDS]
        ranks = [sorted(keys).index(key) for key in keys]
        middle = (len(WORDS) - 1) / 2
        deviation = math.sqrt(sum((rank - middle) ** 2 for rank in ranks) / len(WORDS))
        return [(rank - middle) / deviation for rank in ranks]

    general = ranking()
    by_first = {word: ranking() for word in WORDS}
    by_second = {word: ranking() for word in WORDS}
    scale = _REWARD_SPREAD / math.hypot(*_REWARD_PARTS)
    values = []
    for prompt in PROMPTS:
        first, second = prompt.split()
        parts = (general, by_first[first], by_second[second])
        columns = zip(*parts, strict=True)
        values.append(
            [
                round(scale * sum(w * v for w, v in zip(_REWARD_PARTS, column, strict=True)), 1)
                for column in columns
            ]
        )
    return values


# Tables of the one task there is, made once in a process.


@cache
def _worth() -> dict[str, tuple[float, ...]]:
    """Worth of each token, by prompt; END is worth nothing."""
    return {p: (0.0, *row) for p, row in zip(PROMPTS, word_values(), strict=True)}


@cache
def _outcomes() -> tuple[tuple[int, ...], ...]:
    ids = range(1, len(WORDS) + 1)
    ended = [(*words, END) for n in range(MAX_TOKENS) for words in product(ids, repeat=n)]
    return (*ended, *product(ids, repeat=MAX_TOKENS))


@cache
def _rewards() -> Tensor:
    values = torch.tensor([[0.0, *row] for row in word_values()], dtype=torch.float64)
    # END is worth nothing, so it serves as padding of the shorter outcomes.
    padded = [(*y, *(END,) * (MAX_TOKENS - len(y))) for y in _outcomes()]
    return values[:, torch.tensor(padded)].sum(-1)


@cache
def _lookup() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, step and token of each prediction that makes up an outcome, and which are used.

    Each but the steps (4,) has shape (4681, 4).
    """
    base = len(WORDS)
    rows, tokens, mask = [], [], []
    for outcome in _outcomes():
        # The row whose first words are the outcome's; the words behind do not matter.
        words = [*(t - 1 for t in outcome[: MAX_TOKENS - 1] if t != END), 0, 0, 0]
        rows.append([(words[0] * base + words[1]) * base + words[2]] * MAX_TOKENS)
        unused = MAX_TOKENS - len(outcome)
        tokens.append([*outcome, *(END,) * unused])
        mask.append([1.0] * len(outcome) + [0.0] * unused)
    return (
        torch.tensor(rows),
        torch.arange(MAX_TOKENS),
        torch.tensor(tokens),
        torch.tensor(mask, dtype=torch.float64),
    )


@dataclass(frozen=True)
class ControlledTask:
    """The task's prompts, outcomes and true rewards. Takes no arguments: there is one such task."""

    @cached_property
    def prompt_ids(self) -> Tensor:
        """(8, 3), int64: `</s>` and two words."""
        return torch.tensor([[END, *(WORDS.index(w) + 1 for w in p.split())] for p in PROMPTS])

    @property
    def outcomes(self) -> tuple[tuple[int, ...], ...]:
        """The 4681 outcomes' token ids: by number of words, then in the order of the ids."""
        return _outcomes()

    @property
    def rewards(self) -> Tensor:
        """(8, 4681), float64: the true reward of each outcome after each prompt."""
        return _rewards()

    def marks(self, prompt: str, answers: Sequence[Ids]) -> list[float]:
        """The true reward of answers, which is the mark that the task gives them.

        Args:
            prompt: One of ``PROMPTS``.
            answers: Token ids of each, shapes (R,).
        """
        worth = _worth()[prompt]
        return [sum(worth[token] for token in ids.tolist()) for ids in answers]

    @torch.no_grad()
    def outcome_logps(self, model: Any) -> Tensor:
        """The exact log-probability of every outcome under a model.

        Every outcome but its last token is the beginning of one of the 512 sequences of three
        words, so one batch of those per prompt has all the predictions there are.

        Args:
            model: A transformers causal language model with the task's vocabulary, in eval mode.

        Returns:
            (8, 4681), float64, on the CPU; `exp` of a row sums to 1 up to the rounding of the
            model's own dtype.
        """
        device = next(model.parameters()).device
        rows, steps, tokens, mask = _lookup()
        beginnings = torch.tensor(list(product(range(1, len(WORDS) + 1), repeat=MAX_TOKENS - 1)))
        logps = []
        for prompt in self.prompt_ids:
            ids = torch.cat([prompt.expand(len(beginnings), -1), beginnings], dim=1)
            with torch.autocast(device.type, enabled=False):
                logits = model(input_ids=ids.to(device)).logits[:, len(prompt) - 1 :]
            predictions = logits.cpu().double().log_softmax(-1)
            logps.append((predictions[rows, steps, tokens] * mask).sum(1))
        return torch.stack(logps)

    def groups(
        self, n: int, *, seed: int, reference_logps: Tensor, population: bool = False
    ) -> list[TokenGroup]:
        """Draws labelled pairs as groups of token ids.

        The prompt is uniform; two outcomes are drawn from the reference, again while they are the
        same or one is empty; the better one is chosen with probability sigma(r_1 - r_2).

        Args:
            n: Number of pairs.
            seed: Of all draws.
            reference_logps: Log-probabilities of the outcomes under the reference, (8, 4681).
            population: True draws no label: then each pair counts both ways, by that
                probability, as it would on average over all labels.
        """
        draw = np.random.default_rng(seed)
        cumulative = np.exp(reference_logps.double().numpy()).cumsum(axis=1)
        cumulative /= cumulative[:, -1:]
        prompts = draw.integers(len(PROMPTS), size=n)
        outcomes = np.zeros((n, 2), dtype=np.int64)
        open_pairs = np.arange(n)
        while len(open_pairs):
            points = draw.random((len(open_pairs), 2))
            for prompt in range(len(PROMPTS)):
                here = prompts[open_pairs] == prompt
                drawn = np.searchsorted(cumulative[prompt], points[here], side="right")
                outcomes[open_pairs[here]] = np.minimum(drawn, cumulative.shape[1] - 1)
            first, second = outcomes[open_pairs].T
            open_pairs = open_pairs[(first == second) | (first == 0) | (second == 0)]
        rewards = self.rewards.numpy()[prompts[:, None], outcomes]
        first_wins = draw.random(n) < 1 / (1 + np.exp(rewards[:, 1] - rewards[:, 0]))
        if population:
            first_wins = rewards[:, 0] >= rewards[:, 1]
        confidence = 1 / (1 + np.exp(-np.abs(rewards[:, 0] - rewards[:, 1])))
        outcomes[~first_wins] = outcomes[~first_wins][:, ::-1]
        prompt_ids = self.prompt_ids.numpy().astype(np.int32)
        ids = [np.array(outcome, dtype=np.int32) for outcome in self.outcomes]
        return [
            TokenGroup(
                prompt=prompt_ids[prompt],
                responses=(ids[chosen], ids[rejected]),
                ranks=(1, 2),
                weight=1.0,
                source=f"controlled[seed={seed}]:{number}",
                prompt_key=PROMPTS[prompt],
                confidence=sure if population else 1.0,
            )
            for number, (prompt, (chosen, rejected), sure) in enumerate(
                zip(prompts.tolist(), outcomes.tolist(), confidence.tolist(), strict=True), start=1
            )
        ]

    def labelled(self, n: int, *, seed: int, reference_logps: Tensor) -> list[TokenGroup]:
        """Draws single responses with a label as groups of token ids.

        The prompt is uniform; an outcome is drawn from the reference, again while it is empty; it
        is desirable with probability sigma(r).

        Args:
            n: Number of responses.
            seed: Of all draws.
            reference_logps: Log-probabilities of the outcomes under the reference, (8, 4681).
        """
        draw = np.random.default_rng(seed)
        cumulative = np.exp(reference_logps.double().numpy()).cumsum(axis=1)
        cumulative /= cumulative[:, -1:]
        prompts = draw.integers(len(PROMPTS), size=n)
        outcomes = np.zeros(n, dtype=np.int64)
        while len(left := np.flatnonzero(outcomes == 0)):
            points = draw.random(len(left))
            for prompt in range(len(PROMPTS)):
                here = prompts[left] == prompt
                drawn = np.searchsorted(cumulative[prompt], points[here], side="right")
                outcomes[left[here]] = np.minimum(drawn, cumulative.shape[1] - 1)
        rewards = self.rewards.numpy()[prompts, outcomes]
        desirable = draw.random(n) < 1 / (1 + np.exp(-rewards))
        prompt_ids = self.prompt_ids.numpy().astype(np.int32)
        return [
            TokenGroup(
                prompt=prompt_ids[prompt],
                responses=(np.array(self.outcomes[outcome], dtype=np.int32),),
                ranks=(1,),
                weight=1.0,
                source=f"controlled[seed={seed},unpaired]:{number}",
                prompt_key=PROMPTS[prompt],
                label=label,
            )
            for number, (prompt, outcome, label) in enumerate(
                zip(prompts.tolist(), outcomes.tolist(), desirable.tolist(), strict=True), start=1
            )
        ]

    def bayes_accuracy(self, groups: Sequence[TokenGroup]) -> float:
        """The best accuracy the labels of pairs allow: the mean of sigma(|r_1 - r_2|).

        Of single responses that of guessing their labels: the mean of sigma(|r|).
        """
        total = 0.0
        for group in groups:
            # What a single response is compared with is worth nothing.
            first, second, *_ = (*self.marks(group.prompt_key, group.responses), 0.0)
            total += 1 / (1 + math.exp(-abs(first - second)))
        return total / len(groups)

    def optimum(self, reference_logps: Tensor, *, beta: float) -> dict[str, float]:
        """A point of the frontier: no policy has more reward at the same KL divergence.

        Args:
            reference_logps: Log-probabilities of the outcomes under the reference, (8, 4681).
            beta: The optimum is pi_ref exp(r / beta) / Z.

        Returns:
            ``beta``, and ``reward`` and ``kl`` (from the reference, in nats) of the optimum,
            averaged over the prompts.
        """
        reference = reference_logps.double()
        optimum = optimal_logps(reference, self.rewards, beta)
        return {
            "beta": beta,
            "reward": _expectation(optimum, self.rewards),
            "kl": _expectation(optimum, optimum - reference),
        }

    def likeliest(self, reference_logps: Tensor, *, count: int) -> tuple[Tensor, Tensor]:
        """A smaller space: the outcomes that the reference likes best, with its share of each.

        Args:
            reference_logps: Log-probabilities of the outcomes under the reference, (8, 4681).
            count: Outcomes to keep of each prompt.

        Returns:
            Their log-probabilities among themselves and their rewards, (8, count) each, float64.
        """
        kept, places = reference_logps.double().topk(count, dim=1)
        return kept.log_softmax(1), self.rewards.gather(1, places)

    def frontier(self, reference_logps: Tensor, *, points: int = 60) -> list[dict[str, float]]:
        """Points of the frontier, from almost no gain in reward to almost all there is."""
        betas = np.geomspace(30.0, 0.03, points).tolist()
        return [self.optimum(reference_logps, beta=beta) for beta in betas]

    def optimum_at(self, kl: float, reference_logps: Tensor) -> dict[str, float]:
        """The point of the frontier with a given KL divergence, found by bisection."""
        low, high = math.log(1e-4), math.log(1e4)
        reference = reference_logps.double()
        for _ in range(60):
            middle = (low + high) / 2
            optimum = optimal_logps(reference, self.rewards, math.exp(middle))
            if _expectation(optimum, optimum - reference) > kl:
                low = middle
            else:
                high = middle
        return self.optimum(reference_logps, beta=math.exp(high))

    def expected_rewards(self, policy_logps: Tensor) -> list[float]:
        """The policy's exact expected reward at each prompt."""
        return [
            _expectation(logps, rewards)
            for logps, rewards in zip(policy_logps.double(), self.rewards, strict=True)
        ]

    def report(
        self, policy_logps: Tensor, reference_logps: Tensor, *, beta: float
    ) -> dict[str, float]:
        """Exact quantities of a policy, averaged over the eight prompts.

        Args:
            policy_logps: Log-probabilities of the outcomes under the policy, (8, 4681), float64.
            reference_logps: The same under the reference.
            beta: The optimum is pi_ref exp(r / beta) / Z.

        Returns:
            Expected rewards of policy, reference and optimum; `optimal_reward_at_kl`, the most that
            is possible at the policy's KL divergence from the reference, and `gain_ratio`, the
            share of that gain over the reference which the policy has; `kl_P_Q` = KL(P||Q) in nats,
            `log_z` and `probability_sum`, which is 1 up to rounding.
        """
        policy, reference = policy_logps.double(), reference_logps.double()
        optimum = optimal_logps(reference, self.rewards, beta)

        def divergence(p: Tensor, q: Tensor) -> float:
            return _expectation(p, p - q)

        reward = _expectation(policy, self.rewards)
        start = _expectation(reference, self.rewards)
        kl = divergence(policy, reference)
        best = self.optimum_at(kl, reference)["reward"]
        return {
            "expected_reward": reward,
            "reference_reward": start,
            "optimal_reward": _expectation(optimum, self.rewards),
            "optimal_reward_at_kl": best,
            # Of a policy that has not moved there is no gain to compare.
            "gain_ratio": (reward - start) / (best - start) if kl > 1e-6 else math.nan,
            "kl_policy_reference": kl,
            "kl_reference_policy": divergence(reference, policy),
            "kl_optimum_policy": divergence(optimum, policy),
            "kl_policy_optimum": divergence(policy, optimum),
            "kl_optimum_reference": divergence(optimum, reference),
            "log_z": exact_log_partition(reference, self.rewards, beta).mean().item(),
            "probability_sum": policy.exp().sum(-1).mean().item(),
        }


def _expectation(logps: Tensor, values: Tensor) -> float:
    """The mean of values over outcomes, averaged over prompts."""
    # Where a probability is 0 its term is 0, whatever the value.
    terms = torch.where(logps == -math.inf, 0.0, logps.exp() * values)
    return terms.sum(-1).mean().item()
