"""Tokens drawn by noise that is a hash: the same for an answer wherever and whenever it is drawn.

Noise is ``splitmix64`` (Steele et al., https://doi.org/10.1145/2660193.2660195) of a key of the
answer and a counter, as whole tensors: no generator is made, and none is touched.

A token comes from a race: the least of waiting times E/p, E exponential, falls on a token with its
probability p. Beside turning the cumulative distribution around, with one number a token, this is
robust: where probabilities round otherwise, a race has another winner with a probability of about
the sum of the differences, and the other way with that of V cumulative ones. A race among all V
tokens takes V numbers, though. Here blocks of about sqrt(V) tokens race first, and then the tokens
of the block that won, which gives the same distribution and takes 2 sqrt(V) numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dpo_lightning.data.tokens import Ids


def _signed(value: int) -> int:
    """64 bits as torch has them."""
    return value - (1 << 64) if value >> 63 else value


_STEP = _signed(0x9E3779B97F4A7C15)
_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def answer_keys(prompt: Ids, *, seed: int, round: int, occurrence: int, count: int) -> list[int]:
    """Keys of the noise of a prompt's answers, of 64 bits with a sign.

    Args:
        prompt: Token ids, (P,).
        seed: Of all draws.
        round: Number of the round.
        occurrence: How often the same prompt was there before.
        count: Answers.
    """
    base = hashlib.blake2b(np.ascontiguousarray(prompt, dtype=np.int64).tobytes(), digest_size=16)
    keys = []
    for answer in range(count):
        own = base.copy()
        own.update(f":{seed}:{round}:{occurrence}:{answer}".encode())
        keys.append(int.from_bytes(own.digest()[:8], "big", signed=True))
    return keys


def occurrences(prompts: Sequence[Ids]) -> list[int]:
    """Counts of how often each prompt was there before.

    Args:
        prompts: Token ids of each, (P,).
    """
    before: dict[bytes, int] = {}
    found = []
    for prompt in prompts:
        content = np.ascontiguousarray(prompt, dtype=np.int64).tobytes()
        found.append(before.get(content, 0))
        before[content] = found[-1] + 1
    return found


def mixed(values: Tensor) -> Tensor:
    """The finalizer of splitmix64, of any int64.

    Example:
        >>> mixed(torch.tensor([1234567 + _STEP])).tolist()
        [6457827717110365317]
    """
    values = (values ^ _right(values, 30)) * _FIRST
    values = (values ^ _right(values, 27)) * _SECOND
    return values ^ _right(values, 31)


def waits(keys: Tensor, counter: int, count: int) -> Tensor:
    """Exponential waiting times, (n, count), float64, all above 0.

    Args:
        keys: (n,), int64.
        counter: Which noise of each it is.
        count: Numbers of each.
    """
    own = mixed(keys + _signed((counter + 1) * _STEP % (1 << 64)))
    numbers = torch.arange(1, count + 1, device=keys.device) * _STEP
    # 52 bits, and a half: no number is 0 or 1, and none is rounded.
    uniform = (_right(mixed(own[:, None] + numbers), 12).double() + 0.5) * 2.0**-52
    return uniform.log_().neg_()


def draw_tokens(
    scores: Tensor, keys: Tensor, step: int, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Draws the next token of each answer.

    Args:
        scores: (n, V), float32 or wider. Of the vocabulary, not normalised.
        keys: (n,), int64. Of the answers.
        step: Place of the token in its answer.
        temperature: The scores are divided by it; above 0.

    Returns:
        The tokens, (n,), int64, and for each answer False if its scores are none to draw from.
    """
    rows, vocabulary = scores.shape
    width = 1 << -(-(vocabulary - 1).bit_length() // 2)
    blocks = -(-vocabulary // width)
    top = scores.amax(1)
    weights = scores.new_full((rows, blocks * width), -torch.inf)
    torch.sub(scores, top[:, None], out=weights[:, :vocabulary])
    if temperature != 1:
        weights.div_(temperature)
    weights = weights.exp_().view(rows, blocks, width)
    totals = weights.sum(2, dtype=torch.float64)
    block = (waits(keys, 2 * step, blocks) / totals).argmin(1)
    inside = weights[torch.arange(rows, device=keys.device), block].double()
    token = (waits(keys, 2 * step + 1, width) / inside).argmin(1)
    # Where nothing is to be drawn from, still a token of the vocabulary.
    return (block * width + token).clamp(max=vocabulary - 1), top.isfinite()


def _right(values: Tensor, bits: int) -> Tensor:
    """Shifts to the right as numbers without a sign are."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
