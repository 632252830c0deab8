"""Gathers of a micro-batch's tokens for attention: as sequences of any lengths, or in buckets.

Both are made of the lengths of its prompts and responses, on the host and before the step. A kernel
for any lengths takes the sequences; elsewhere those of like lengths are padded into rectangles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_lightning.data.transit import Movable

Gathers = Literal["buckets", "sequences", "both", "none"]
"""What a batch brings for attention: what the buckets take, what a kernel for any lengths takes,
both where layers differ, or nothing, for models that see each response as a row of its own."""

Segments = Sequence[tuple[int, ...]]
"""(|P|, |y_1|, ..., |y_K|) of each group."""

# Scores of one attention call that take about as long as starting another call.
_CALL_COST = 1 << 14
# Most scores of one attention call, and so of its mask, unless it is a single sequence.
_CALL_SCORES = 1 << 24


class Span(NamedTuple):
    """A sequence of queries, and the prompt before it.

    Attributes:
        start: Flat place of the first query.
        length: Number of the queries.
        prompt: Flat place of the first key before them.
        before: Number of those keys; 0 for the queries of a prompt.
    """

    start: int
    length: int
    prompt: int
    before: int

    @property
    def scores(self) -> int:
        """Scores of a head, were all of them computed at once."""
        return self.length * (self.before + self.length)


def spans_of(segments: Segments) -> tuple[Span, ...]:
    """The prompts and responses of a flat row, in order.

    Args:
        segments: (|P|, |y_1|, ..., |y_K|) of each group.

    Example:
        >>> [(s.start, s.length, s.before) for s in spans_of([(3, 1, 2)])]
        [(0, 3, 0), (3, 1, 3), (4, 2, 3)]
    """
    spans = []
    start = 0
    for prompt, *responses in segments:
        first = start
        spans.append(Span(first, prompt, first, 0))
        start += prompt
        for length in responses:
            spans.append(Span(start, length, first, prompt))
            start += length
    return tuple(spans)


class _Laid(Protocol):
    """A micro-batch, as far as its lengths and its place go."""

    @property
    def segments(self) -> tuple[tuple[int, ...], ...]: ...

    @property
    def input_ids(self) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Bucket(Movable):
    """Sequences of like lengths, whose attention is one call.

    The queries of a sequence are a prompt, or one response; its keys are that prompt, or the prompt
    followed by that response. A query sees the keys whose position is not behind its own.

    Attributes:
        queries: Flat place of each query, shape (B, Q), int64; an unused one holds 0.
        keys: Flat place of each key, shape (B, K), int64; an unused one holds 0.
        query_positions: Position of each query in its sequence, shape (B, Q), int64; 0 where
            unused, so that it sees one key and its softmax is finite.
        key_positions: Position of each key, shape (B, K), int64; beyond all queries where unused.
    """

    queries: Tensor
    keys: Tensor
    query_positions: Tensor
    key_positions: Tensor


@dataclass(frozen=True, slots=True)
class Bucketed(Movable):
    """A micro-batch in buckets.

    Attributes:
        buckets: The buckets.
        inverse: Place of each flat token among the buckets' queries, laid end to end, shape (T,),
            int64.
    """

    buckets: tuple[Bucket, ...]
    inverse: Tensor

    @classmethod
    def of(cls, segments: Segments) -> Bucketed:
        """Gathers sequences of like lengths into padded rectangles, as few as pay."""
        sequences = spans_of(segments)
        parts = _like_lengths(sequences)
        tokens = sum(map(sum, segments))
        inverse = np.empty(tokens, dtype=np.int64)
        buckets = []
        offset = 0
        for part in parts:
            most_queries = max(sequences[i][1] for i in part)
            most_keys = max(sequences[i][1] + sequences[i][3] for i in part)
            query_index = np.zeros((len(part), most_queries), dtype=np.int64)
            key_index = np.zeros((len(part), most_keys), dtype=np.int64)
            query_positions = np.zeros_like(query_index)
            key_positions = np.full_like(key_index, tokens)
            for row, i in enumerate(part):
                place, n, before, n_before = sequences[i]
                own = np.arange(place, place + n)
                query_index[row, :n] = own
                query_positions[row, :n] = np.arange(n_before, n_before + n)
                key_index[row, :n_before] = np.arange(before, before + n_before)
                key_index[row, n_before : n_before + n] = own
                key_positions[row, : n_before + n] = np.arange(n_before + n)
                inverse[own] = offset + row * most_queries + np.arange(n)
            offset += query_index.size
            arrays = (query_index, key_index, query_positions, key_positions)
            buckets.append(Bucket(*map(torch.from_numpy, arrays)))
        return cls(tuple(buckets), torch.from_numpy(inverse))


@dataclass(frozen=True, slots=True)
class Sequences(Movable):
    """A micro-batch as sequences of queries in their flat order, each with keys of its own.

    Attributes:
        keys: Flat place of each key, sequence after sequence, shape (K,), int64: a prompt's own
            tokens, or a prompt followed by a response.
        query_ends: End of each sequence's queries, after a 0, shape (S + 1,), int32.
        key_ends: The same of the keys.
        most_queries: Queries of the longest sequence.
        most_keys: Its keys.
    """

    keys: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, batch: _Laid) -> Sequences:
        """The sequences of a micro-batch, on its device."""
        return cls.of_segments(batch.segments).to(batch.input_ids.device)

    @classmethod
    def of_segments(cls, segments: Segments) -> Sequences:
        """Makes the sequences from the lengths of prompts and responses, on the host."""
        places = spans_of(segments)
        keys: list[npt.NDArray[np.int64]] = []
        for place, count, before, count_before in places:
            if count_before:
                keys.append(np.arange(before, before + count_before))
            keys.append(np.arange(place, place + count))
        queries = [count for _, count, _, _ in places]
        lengths = [before + count for _, count, _, before in places]

        def ends(counts: list[int]) -> Tensor:
            return torch.from_numpy(np.cumsum([0, *counts], dtype=np.int32))

        return cls(
            keys=torch.from_numpy(np.concatenate(keys)),
            query_ends=ends(queries),
            key_ends=ends(lengths),
            most_queries=max(queries),
            most_keys=max(lengths),
        )


def _like_lengths(sequences: Sequence[Span]) -> list[list[int]]:
    """Numbers of the sequences that share a call, longest first."""

    def size(i: int) -> tuple[int, int]:
        _, queries, _, before = sequences[i]
        return queries, before + queries

    def order(i: int) -> tuple[Any, ...]:
        queries, keys = size(i)
        return -keys, -queries, i

    parts: list[list[int]] = []
    widths: list[tuple[int, int]] = []
    for i in sorted(range(len(sequences)), key=order):
        queries, keys = size(i)
        if parts:
            wide = max(widths[-1][0], queries), max(widths[-1][1], keys)
            scores = (len(parts[-1]) + 1) * wide[0] * wide[1]
            apart = len(parts[-1]) * widths[-1][0] * widths[-1][1] + queries * keys + _CALL_COST
            if scores <= min(apart, _CALL_SCORES):
                parts[-1].append(i)
                widths[-1] = wide
                continue
        parts.append([i])
        widths.append((queries, keys))
    return parts
