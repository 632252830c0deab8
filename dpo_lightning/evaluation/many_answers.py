"""Several answers to each of many prompts, drawn from a model.

All prompts are put into batches by their lengths and contents alone, and the noise of an answer is
a hash of what it is an answer to: however the batches are shared out among ranks, whatever order
the prompts come in, and wherever a run was stopped, the answers are the same.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpo_lightning.data.greedy import pack
from dpo_lightning.data.tokens import Ids
from dpo_lightning.evaluation.backends import BackendDrawer
from dpo_lightning.evaluation.noise import answer_keys, occurrences
from dpo_lightning.evaluation.rows_written import WrittenRows
from dpo_lightning.evaluation.sampling import Precision, end_ids
from dpo_lightning.evaluation.writers import open_writer, way_of
from dpo_lightning.models.loading import max_positions
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import in_shards, is_sharded
from dpo_lightning.processes.phases import ShowPhase, unshown

log = logging.getLogger(__name__)

# Prompts share a batch while it holds at most this many places a token of theirs.
_PADDING = 1.25

DrawnBatch = tuple[list[int], list[list[Ids]]]
"""Numbers of prompts, and to each of them its answers."""


@dataclass(frozen=True)
class RoundDraws:
    """Settings of draws; answers depend on all of them.

    Attributes:
        num_generations: Answers to a prompt.
        temperature: Of the next-token distribution, above 0; 1 is the model's own.
        max_new_tokens: Longest answer.
        seed: Of all draws.
        round: Number of the round, which has other draws than the others.
    """

    num_generations: int
    temperature: float
    max_new_tokens: int
    seed: int
    round: int

    def __post_init__(self) -> None:
        """Refuses what nothing can be drawn with.

        Raises:
            ValueError: If there is no answer, no token or no temperature.
        """
        if self.num_generations < 1 or self.max_new_tokens < 1:
            raise ValueError(f"needs an answer of a token at least: {self}")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature={self.temperature}: needs a number above 0")


def plan_batches(
    prompts: Sequence[Ids], draws: RoundDraws, *, batch_tokens: int
) -> list[list[int]]:
    """Puts prompts into batches, the longest first; a pure function of its arguments.

    Neither the order of different prompts nor the number of ranks changes which prompts share a
    batch, on which the rounding of its scores may depend.

    Args:
        prompts: Token ids of each prompt, shapes (P,).
        draws: How many answers, and how long.
        batch_tokens: Most tokens of a batch, prompts padded and each answer at its longest; a
            prompt that has more is alone.

    Returns:
        Numbers of the prompts of each batch; each prompt is in one.
    """
    contents = [np.ascontiguousarray(prompt, dtype=np.int64).tobytes() for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), contents[i], i))
    answers = draws.num_generations * draws.max_new_tokens

    def join(load: tuple[int, int, int], i: int) -> tuple[int, int, int] | None:
        widest, count, tokens = load[0], load[1] + 1, load[2] + len(prompts[i])
        fits = count * (widest + answers) <= batch_tokens
        return (widest, count, tokens) if fits and widest * count <= _PADDING * tokens else None

    return pack(order, start=lambda i: (len(prompts[i]), 1, len(prompts[i])), join=join)


def draw_batch(
    model: Any,
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[Ids],
    numbers: Sequence[int],
    draws: RoundDraws,
    *,
    precision: Precision = contextlib.nullcontext,
) -> list[list[Ids]]:
    """Draws the answers to the prompts of one batch.

    A sharded model is drawn from by all ranks together, with the same arguments.

    Args:
        model: A transformers causal language model.
        scorer: The scorer that prepared it.
        tokenizer: Its tokenizer.
        prompts: Token ids of all prompts, shapes (P,), not of this batch alone: a prompt that is
            there twice is drawn for anew.
        numbers: Those of the batch.
        draws: How many answers, how long, and their noise.
        precision: The context to compute in.

    Returns:
        For each of these numbers its answers' token ids, shapes (R,), int32, each with the token
        that ended it, if one did.

    Raises:
        UserError: If the model's scores are not finite.
    """
    keys = _keys(prompts, draws, numbers)
    return _drawn(model, scorer, tokenizer, prompts, numbers, draws, keys, precision)


def draw_answers(
    model: Any,
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[Ids],
    draws: RoundDraws,
    *,
    batch_tokens: int,
    batches: Sequence[Sequence[int]] | None = None,
    precision: Precision = contextlib.nullcontext,
    show: ShowPhase = unshown,
    check: Callable[[], object] | None = None,
    drawer: BackendDrawer | None = None,
    who: str = "policy",
) -> Iterator[DrawnBatch]:
    """Draws the answers to prompts, and gives those of each batch as soon as they are there.

    Args:
        model: A transformers causal language model.
        scorer: The scorer that prepared it.
        tokenizer: Its tokenizer.
        prompts: Token ids of all prompts, shapes (P,).
        draws: How many answers, how long, and their noise.
        batch_tokens: Most tokens of a batch; see :func:`plan_batches`.
        batches: The batches to draw, out of those of :func:`plan_batches`: a rank's share, or what
            is missing; None: all of them.
        precision: The context to compute in.
        show: Shows how far it is, and tokens a second.
        check: Is called before each batch; what it raises ends the drawing.
        drawer: Another backend that draws; None: the model itself does.
        who: ``policy`` or ``reference``, for such a backend.

    Yields:
        Numbers of a batch's prompts, and the answers to each.

    Raises:
        UserError: If the model's scores are not finite, or another backend fails.
    """
    planned = [
        [*batch]
        for batch in (
            plan_batches(prompts, draws, batch_tokens=batch_tokens) if batches is None else batches
        )
    ]
    asked = [number for batch in planned for number in batch]
    keys = _keys(prompts, draws, asked)
    if drawer is not None and drawer.draws(who):
        drawn: Iterator[DrawnBatch] = _by_backend(drawer, who, model, prompts, planned, draws, keys)
    else:
        _say_way(model, scorer, prompts, asked, draws)
        drawn = (
            (batch, _drawn(model, scorer, tokenizer, prompts, batch, draws, keys, precision))
            for batch in planned
        )
    yield from _shown(drawn, planned, draws, show, check)


def _shown(
    drawn: Iterator[DrawnBatch],
    planned: Sequence[Sequence[int]],
    draws: RoundDraws,
    show: ShowPhase,
    check: Callable[[], object] | None,
) -> Iterator[DrawnBatch]:
    """Batches as they are drawn, with how far that is."""
    total = draws.num_generations * sum(map(len, planned))
    done, tokens, seconds = 0, 0, 1e-9
    with show("sampling", total=total, unit="answers") as say:
        for _ in planned:
            if check is not None:
                check()
            begin = time.perf_counter()
            batch, answers = next(drawn)
            # Without the time of whoever takes the answers.
            seconds += time.perf_counter() - begin
            done += draws.num_generations * len(batch)
            tokens += sum(len(ids) for own in answers for ids in own)
            say(done, f"{tokens / seconds:,.0f} tokens/s")
            yield batch, answers


def answer_limits(
    prompts: Sequence[Ids], numbers: Sequence[int], draws: RoundDraws, positions: int | None
) -> list[int]:
    """Tokens of the longest answer to each of some prompts.

    Args:
        prompts: Token ids of all prompts.
        numbers: Those that are asked.
        draws: Whose ``max_new_tokens`` is a limit.
        positions: Those of the model, which are another one; None: it has no bound.
    """
    longest = draws.max_new_tokens
    if positions is None:
        return [longest] * len(numbers)
    return [max(1, min(longest, positions - len(prompts[i]))) for i in numbers]


def _keys(
    prompts: Sequence[Ids], draws: RoundDraws, numbers: Sequence[int]
) -> dict[int, list[int]]:
    """Keys of the noise of each prompt's answers."""
    before = occurrences(prompts)
    return {
        i: answer_keys(
            prompts[i],
            seed=draws.seed,
            round=draws.round,
            occurrence=before[i],
            count=draws.num_generations,
        )
        for i in numbers
    }


def _say_way(
    model: Any, scorer: Scorer, prompts: Sequence[Ids], asked: Sequence[int], draws: RoundDraws
) -> None:
    """Says once if answers are written in the slow way."""
    if not asked:
        return
    longest = max(len(prompts[i]) for i in asked) + draws.max_new_tokens
    way, reason = way_of(model, scorer, longest)
    if way == "whole":
        log.info("sampling computes all of an answer anew for each token: %s", reason)


@torch.no_grad()
def _drawn(
    model: Any,
    scorer: Scorer,
    tokenizer: Any,
    prompts: Sequence[Ids],
    numbers: Sequence[int],
    draws: RoundDraws,
    keys: dict[int, list[int]],
    precision: Precision,
) -> list[list[Ids]]:
    limits = answer_limits(prompts, numbers, draws, max_positions(model.config))
    longest = max(len(prompts[i]) + limit for i, limit in zip(numbers, limits, strict=True))
    # The same prompt twice is computed once: its answers are those of one prompt.
    distinct: dict[bytes, list[int]] = {}
    for place, number in enumerate(numbers):
        distinct.setdefault(prompts[number].astype(np.int64).tobytes(), []).append(place)
    places = [place for own in distinct.values() for place in own]
    count = draws.num_generations
    rows = WrittenRows(
        keys=[key for place in places for key in keys[numbers[place]]],
        limits=[limits[place] for place in places for _ in range(count)],
        ends=end_ids(model, tokenizer),
        temperature=draws.temperature,
        together=is_sharded(model),
    )
    asked = [prompts[numbers[own[0]]] for own in distinct.values()]
    owners = [n for n, own in enumerate(distinct.values()) for _ in range(count * len(own))]
    with precision():
        way, _ = way_of(model, scorer, longest)
        with open_writer(model, scorer, way, pad=tokenizer.eos_token_id or 0) as writer:
            written = rows.write(writer, asked, owners, eager=way == "whole")
    in_shards(model)
    answers: list[list[Ids]] = [[] for _ in numbers]
    for n, place in enumerate(places):
        answers[place] = written[n * count : (n + 1) * count]
    return answers


def _by_backend(
    drawer: BackendDrawer,
    who: str,
    model: Any,
    prompts: Sequence[Ids],
    batches: Sequence[list[int]],
    draws: RoundDraws,
    keys: dict[int, list[int]],
) -> Iterator[DrawnBatch]:
    """Answers of another backend.

    A request for each batch, so that none depends on the rank that makes it; a backend that is
    started for each request has one for all.
    """
    requests = [[*batches]] if drawer.starts_each_time else [[batch] for batch in batches]
    count = draws.num_generations
    positions = max_positions(model.config)
    for part in requests:
        numbers = [number for batch in part for number in batch]
        limits = answer_limits(prompts, numbers, draws, positions)
        seeds = [key & (1 << 63) - 1 for number in numbers for key in keys[number]]
        found = drawer.asked(
            who,
            model,
            [prompts[number] for number in numbers for _ in range(count)],
            ends=end_ids(model, drawer.tokenizer),
            limits=[limit for limit in limits for _ in range(count)],
            temperature=draws.temperature,
            seed=seeds[0] & 0x7FFFFFFF,
            seeds=seeds,
        )
        answers = iter(found)
        for batch in part:
            yield batch, [[next(answers) for _ in range(count)] for _ in batch]
