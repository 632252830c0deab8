"""The controlled task: a weather language so small that everything about it can be computed.

A prompt is two words, the weather of two days; a response is the forecast, at most four words. The
vocabulary has nine tokens: `</s>` (id 0: begin, end and padding) and the eight `WORDS` (ids 1-8).

    prompt    [0, a, b]                    `</s>` in front, put there by the tokenizer
    response  up to 3 words, then </s>     1 + 8 + 64 + 512 = 585 of them (one is `</s>` alone)
              or 4 words, cut off          4096 of them, with no `</s>`

These 4681 outcomes are all that sampling up to four tokens can yield, and no two of them begin
alike to their ends. So for *any* causal model with this vocabulary the softmax probabilities of its
tokens, multiplied along each outcome, sum to exactly 1 per prompt, with no mask and nothing
renormalised: log pi(y|x) is the plain sum of the log-softmax over the outcome's tokens, given
`[0, a, b]`. Whoever holds an exported model can check every number reported about it.

The true reward of a response is the sum of its words' values, which differ by prompt
(`word_values`); the empty response and the end token are worth 0. Labels are Bradley-Terry on that
reward. With pi_ref and the reward known for every outcome, the expected reward, the KL
divergences, Z(x) and the optimum pi* are sums over 4681 terms.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpo_lightning.objectives.partition import exact_log_partition, optimal_logps

END = 0
"""Id of `</s>`."""

WORDS = ("sun", "rain", "wind", "fog", "snow", "hail", "mist", "calm")
"""The words; word i has id i + 1."""

MAX_TOKENS = 4
"""Tokens in the longest response."""

PROMPTS = (
    "sun calm",
    "sun rain",
    "rain wind",
    "rain hail",
    "wind fog",
    "fog mist",
    "snow wind",
    "snow calm",
)

REWARD_SEED = 20
REWARD_SPACING = 0.5


class LabelledPairs(NamedTuple):
    """Compared pairs: prompt, preferred and other outcome, by index. Each is (n,), int64, CPU."""

    prompt: Tensor
    chosen: Tensor
    rejected: Tensor


def word_values() -> list[list[float]]:
    """The value of word i after prompt p, as `[p][i]`.

    Every prompt has its own order of the words; in that order they are worth evenly spaced values
    around 0. Drawn with Python's generator, whose `random()` is the same in every version.
    """
    draw = random.Random(REWARD_SEED)
    values = []
    for _ in PROMPTS:
        keys = [draw.random() for _ in WORDS]
        ranks = [sorted(keys).index(key) for key in keys]
        values.append([REWARD_SPACING * (rank - (len(WORDS) - 1) / 2) for rank in ranks])
    return values


@dataclass(frozen=True)
class ControlledTask:
    """The task's prompts, outcomes and true rewards. Takes no arguments: there is one such task."""

    @cached_property
    def prompt_ids(self) -> Tensor:
        """(8, 3), int64: `</s>` and two words."""
        return torch.tensor([[END, *(WORDS.index(w) + 1 for w in p.split())] for p in PROMPTS])

    @cached_property
    def outcomes(self) -> tuple[tuple[int, ...], ...]:
        """The 4681 outcomes' token ids: by number of words, then in the order of the ids."""
        ids = range(1, len(WORDS) + 1)
        ended = [
            (*words, END) for n in range(MAX_TOKENS) for words in product(ids, repeat=n)
        ]
        return (*ended, *product(ids, repeat=MAX_TOKENS))

    @cached_property
    def rewards(self) -> Tensor:
        """(8, 4681), float64: the true reward of each outcome after each prompt."""
        values = [[0.0, *row] for row in word_values()]
        return torch.tensor(
            [[sum(row[token] for token in y) for y in self.outcomes] for row in values],
            dtype=torch.float64,
        )
