"""Answers whose draws depend on a seed and their own prompt alone.

Each prompt has noise of its own, whatever else is answered beside it: neither the order of prompts
nor the size of a batch changes an answer, as far as rounding does not.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo_lightning.data.tokens import Ids
from dpo_lightning.evaluation.interpolated import Pair, Stream, mixed_logps
from dpo_lightning.evaluation.sampling import Precision, left_padded
from dpo_lightning.plugins import SampleRequest
from dpo_lightning.processes.phases import ShowPhase, unshown

NextLogps = Callable[[Tensor, Tensor], Tensor]
"""From all tokens so far and which of them are used, (B, T) each, to the log-probabilities of the
next one, (B, V), float32."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Settings of draws.

    Attributes:
        temperature: Of the next-token distribution; 0 takes the likeliest token.
        top_p: Share of it that is drawn from, the likeliest tokens first; 1 is all of it.
        max_new_tokens: Longest answer.
        seed: Of all draws.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int = 0


def noise_seed(seed: int, prompt: Ids) -> int:
    """The seed of one prompt's noise.

    Args:
        seed: Of all draws.
        prompt: Token ids, (P,).
    """
    content = f"{seed}:".encode() + np.ascontiguousarray(prompt, dtype=np.int64).tobytes()
    # torch takes 64 bits, of which the first is a sign.
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def seeds_of(seed: int, prompts: Sequence[Sequence[int]]) -> list[int]:
    """A seed for each prompt: of the prompt itself, and of how often it was there before.

    Args:
        seed: Of all draws.
        prompts: Token ids of each.
    """
    before: dict[tuple[int, ...], int] = {}
    found = []
    for prompt in prompts:
        key = tuple(prompt)
        count = before.get(key, 0)
        before[key] = count + 1
        marked = prompt if not count else [*prompt, -count]
        found.append(noise_seed(seed, np.asarray(marked)))
    return found


def request_seeds(request: SampleRequest) -> list[int]:
    """A seed for each prompt of a request: its own, or one of the prompt and of what was before."""
    if request.seeds is not None:
        return [*request.seeds]
    return seeds_of(request.seed, request.prompts)


def drawn_from(logps: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities of what a token is drawn from, (B, V), float64.

    Args:
        logps: (B, V). Those of the model.
        sampling: At a temperature above 0.
    """
    scaled = (logps.double() / sampling.temperature).log_softmax(-1)
    if sampling.top_p >= 1:
        return scaled
    ordered, places = scaled.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()
    # The first one is always left: nothing is before it.
    ordered = ordered.masked_fill(before >= sampling.top_p, -torch.inf)
    kept = torch.empty_like(scaled).scatter_(-1, places, ordered)
    return kept.log_softmax(-1)


def choose_tokens(
    logps: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]
) -> Tensor:
    """The next token of each answer, (B,) int64.

    The least of waiting times E/p, E exponential, falls on a token with its probability p. All of a
    row's E are of its own generator, and a p that rounds otherwise seldom changes which is least.

    Args:
        logps: (B, V), float32. Of the next token.
        sampling: How it is drawn.
        generators: The noise of each row.
    """
    if sampling.temperature == 0:
        return logps.argmax(-1)
    scores = drawn_from(logps, sampling)
    waits = torch.stack(
        [
            torch.empty(scores.shape[1], dtype=torch.float64, device=scores.device).exponential_(
                generator=generator
            )
            for generator in generators
        ]
    )
    return (scores - waits.log()).argmax(-1)


@dataclass(frozen=True, slots=True)
class DrawnFrom:
    """Models that answers are drawn from: a policy, its reference, or a place on the way between.

    Attributes:
        pair: The two models; where ``lam`` is 1 the second is not asked.
        lam: 0 is the reference, 1 the policy.
    """

    pair: Pair
    lam: float = 1.0

    def plain(self) -> contextlib.AbstractContextManager[object]:
        """The models that are asked as transformers made them, in eval mode."""
        if self.lam in (0.0, 1.0):
            return self.pair.scorer.plain(self._only)
        return self.pair.plain()

    @property
    def _only(self) -> object:
        return self.pair.policy if self.lam else self.pair.reference

    def begin(self) -> NextLogps:
        """A function that is given a batch's tokens as they come."""
        if self.lam in (0.0, 1.0):
            return Stream(self._only).next_logps
        policy, reference = Stream(self.pair.policy), Stream(self.pair.reference)
        return lambda ids, mask: mixed_logps(
            reference.next_logps(ids, mask), policy.next_logps(ids, mask), self.lam
        )


@torch.no_grad()
def draw_keyed(
    source: DrawnFrom,
    prompts: Sequence[Ids],
    sampling: Sampling,
    *,
    ends: Sequence[int],
    pad: int,
    positions: int | None,
    batch_size: int,
    precision: Precision = contextlib.nullcontext,
    show: ShowPhase = unshown,
) -> list[Ids]:
    """Draws an answer to each prompt.

    Args:
        source: What from.
        prompts: Token ids of each prompt, shapes (P,); shorter than ``positions``.
        sampling: How.
        ends: Tokens that end an answer.
        pad: Any token id, to stand where nothing is.
        positions: Those of the model, which end an answer too; None has no bound.
        batch_size: Prompts that are answered at once.
        precision: The context to compute in.
        show: Shows how far it is.

    Returns:
        Token ids of each answer, shapes (R,), with the token that ended it, if one did.
    """
    answers: list[Ids] = [np.zeros(0, dtype=np.int32)] * len(prompts)
    # Prompts of like lengths together: little padding.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    shown = show("sampling", total=len(order), unit="answers")
    with source.plain(), precision(), shown as say:
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            own = [prompts[i] for i in part]
            limits = [answer_limit(ids, sampling, positions) for ids in own]
            drawn = _batch(source, own, limits, sampling, ends=ends, pad=pad)
            for i, ids in zip(part, drawn, strict=True):
                answers[i] = ids
            say(start + len(part))
    return answers


def answer_limit(prompt: Ids, sampling: Sampling, positions: int | None) -> int:
    """Tokens of the longest answer to a prompt."""
    room = sampling.max_new_tokens
    return room if positions is None else min(room, positions - len(prompt))


def _batch(
    source: DrawnFrom,
    prompts: Sequence[Ids],
    limits: Sequence[int],
    sampling: Sampling,
    *,
    ends: Sequence[int],
    pad: int,
) -> list[Ids]:
    device = source.pair.policy.device
    generators = [
        torch.Generator(device).manual_seed(noise_seed(sampling.seed, prompt)) for prompt in prompts
    ]
    ids, mask = (x.to(device) for x in left_padded(prompts, pad))
    begun = ids.shape[1]
    stops, most = torch.tensor(ends, device=device), torch.tensor(limits, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    next_logps = source.begin()
    lengths = torch.zeros(len(prompts), dtype=torch.int64, device=device)
    while not ended.all():
        drawn = choose_tokens(next_logps(ids, mask), sampling, generators)
        # An answer that has ended takes neither tokens nor positions any more.
        drawn = torch.where(ended, pad, drawn)
        ids = torch.cat([ids, drawn.unsqueeze(1)], dim=1)
        mask = torch.cat([mask, (~ended).long().unsqueeze(1)], dim=1)
        lengths += ~ended
        ended = ended | torch.isin(drawn, stops) | (lengths >= most)
    rows = ids[:, begun:].cpu().numpy()
    return [
        row[:length].astype(np.int32) for row, length in zip(rows, lengths.tolist(), strict=True)
    ]
