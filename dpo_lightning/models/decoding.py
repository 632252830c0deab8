"""Attention while answers are written, several to a prompt, whose keys are there once.

A prompt is computed once, in the first forward pass, for all of its answers. In each later one a
token of every answer is added. All queries that see a prompt meet its keys in one product, so that
these are read once and never copied; an answer's own keys stand in a buffer, in which they stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dpo_lightning.models.devices import autocast_dtype, on_device

# Tokens of an answer that a buffer has room for at first; it grows to twice as much.
_ROOM = 32


class Decoding:
    """Keys and values of prompts and of the answers behind them, for all layers of a model.

    A forward pass that is given it as its plan is one of these: first the prompts, (B, P) tokens;
    behind :meth:`begin` one token of each answer, (N, 1). Layers are told apart by the order in
    which they compute.

    Args:
        lengths: Tokens of each prompt; what stands behind them in its row is not seen.
        device: Device of the model.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._lengths = [*lengths]
        self._width = max(lengths)
        self._layers: list[_Layer] = []
        self._call = 0
        self._owners: list[int] = []
        self._starts = torch.zeros(0, dtype=torch.int64)
        self._grid: _Grid | None = None
        self._step = -1
        self._biases: dict[int | None, Tensor] = {}

    @property
    def layers(self) -> int:
        """Layers that have computed the prompts."""
        return len(self._layers)

    @property
    def positions(self) -> Tensor:
        """Position of the token that each answer has now, (N,), int64."""
        return self._starts + self._step

    def begin(self, owners: Sequence[int]) -> None:
        """Goes over from prompts to answers, which have no token yet.

        Args:
            owners: The prompt of each; those of a prompt in a row.
        """
        self._owners = [*owners]
        self._place()
        for layer in self._layers:
            layer.begin(len(owners))

    def advance(self) -> None:
        """Says that the next forward pass has the next token of each answer."""
        self._step += 1
        self._call = 0
        self._biases = {name: bias for name, bias in self._biases.items() if name is None}

    def keep(self, rows: Sequence[int]) -> None:
        """Gives up all answers but some, and prompts that have none left.

        Args:
            rows: Numbers of those answers, ascending.
        """
        owners = [self._owners[row] for row in rows]
        prompts = sorted(set(owners))
        kept = on_device(torch.tensor(prompts), self._device)
        new = {prompt: place for place, prompt in enumerate(prompts)}
        own = on_device(torch.tensor([*rows]), self._device)
        for layer in self._layers:
            layer.keep(own, kept)
        self._lengths = [self._lengths[prompt] for prompt in prompts]
        self._owners = [new[prompt] for prompt in owners]
        self._biases = {}
        self._place()

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float
    ) -> Tensor:
        """Attention of one layer, which is the next one.

        Args:
            query: Shape (rows, heads, T, d).
            key: Shape (rows, key heads, T, d).
            value: Shape (rows, key heads, T, e).
            window: Only positions less than this far back are seen; None: all are.
            scaling: Factor of the scores.

        Returns:
            Shape (rows, T, heads, e).
        """
        # Rotary embeddings leave keys in float32 where autocast multiplies in another type.
        dtype = autocast_dtype(query.device) or query.dtype
        query, key, value = (rows.to(dtype) for rows in (query, key, value))
        if self._step < 0:
            self._layers.append(_Layer(key.contiguous(), value.contiguous()))
            return _causal(query, key, value, window, scaling).transpose(1, 2)
        layer = self._layers[self._call]
        self._call += 1
        layer.write(key, value, self._step)
        return self._attend_answers(layer, query, window, scaling)

    def _place(self) -> None:
        starts = torch.tensor([self._lengths[prompt] for prompt in self._owners])
        self._starts = on_device(starts, self._device)
        self._grid = _Grid.of(self._owners, self._device)

    def _attend_answers(
        self, layer: _Layer, query: Tensor, window: int | None, scaling: float
    ) -> Tensor:
        """One query of each answer over its prompt and its own tokens; -> (N, 1, heads, e)."""
        grid = self._grid
        assert grid is not None
        rows, heads, _, size = query.shape
        known = self._step + 1
        first = 0 if window is None else max(0, known - window)
        keys, values = layer.own(first, known)
        shared = heads // layer.key_heads
        # Query heads that share a key head are more queries to it: keys are not repeated.
        query = query.reshape(rows, layer.key_heads, shared, size)
        own = torch.bmm(query.flatten(0, 1), keys.transpose(1, 2)).view(rows, heads, -1)
        if window is not None and known >= window:  # no query reaches its prompt any more
            shares = _shares(own, scaling)
            found = torch.bmm(shares.view(-1, shared, known - first), values)
            return found.view(rows, 1, heads, -1)
        prompts = layer.prompt_keys.flatten(0, 1)
        before = grid.back(torch.bmm(grid.out(query), prompts.transpose(1, 2)), shared)
        scores = torch.cat([before.reshape(rows, heads, -1), own], dim=2)
        bias = self._bias(window)
        if bias is not None:
            scores[:, :, : self._width].masked_fill_(bias, -torch.inf)
        shares = _shares(scores, scaling).view(rows, layer.key_heads, shared, -1)
        here = shares[..., self._width :].flatten(0, 1)
        found = torch.bmm(here, values).view(rows, layer.key_heads, shared, -1)
        there = grid.out(shares[..., : self._width])
        found = found + grid.back(torch.bmm(there, layer.prompt_values.flatten(0, 1)), shared)
        return found.reshape(rows, 1, heads, -1)

    def _bias(self, window: int | None) -> Tensor | None:
        """Keys of its prompt that an answer does not see, (N, 1, P), bool; None: it sees all."""
        if window is None and min(self._lengths) == self._width:
            return None
        if window not in self._biases:
            places = torch.arange(self._width, device=self._device)
            hidden = places >= self._starts[:, None]
            if window is not None:
                hidden |= self._starts[:, None] + self._step - places >= window
            self._biases[window] = hidden[:, None]
        return self._biases[window]


@dataclass(frozen=True, slots=True)
class _Grid:
    """Answers in a grid of prompts by places, which is full where all prompts have as many.

    Attributes:
        prompts: Number of prompts.
        answers: The answer in each place, (prompts * places,), int64; an empty one has some answer.
            None: answers stand in the grid as they come.
        places: Place of each answer, (N,), int64, or None as well.
    """

    prompts: int
    answers: Tensor | None
    places: Tensor | None

    @classmethod
    def of(cls, owners: Sequence[int], device: torch.device) -> _Grid:
        """The grid of answers whose prompts are these, ascending."""
        counts = np.bincount(np.asarray(owners))
        widest = int(counts.max())
        if (counts == widest).all():
            return cls(len(counts), None, None)
        within = np.concatenate([np.arange(count) for count in counts])
        places = np.asarray(owners) * widest + within
        answers = np.zeros(len(counts) * widest, dtype=np.int64)
        answers[places] = np.arange(len(owners))
        found = (on_device(torch.from_numpy(x), device) for x in (answers, places))
        return cls(len(counts), *found)

    def out(self, rows: Tensor) -> Tensor:
        """Rows of answers (N, key heads, n, d) -> (prompts * key heads, places * n, d)."""
        if self.answers is not None:
            rows = rows.index_select(0, self.answers)
        _, key_heads, count, size = rows.shape
        grid = rows.reshape(self.prompts, -1, key_heads, count, size).transpose(1, 2)
        return grid.reshape(self.prompts * key_heads, -1, size)

    def back(self, grid: Tensor, count: int) -> Tensor:
        """(prompts * key heads, places * n, d) -> (N, key heads, n, d), with that n."""
        key_heads, size = len(grid) // self.prompts, grid.shape[-1]
        rows = grid.view(self.prompts, key_heads, -1, count, size).transpose(1, 2)
        rows = rows.reshape(-1, key_heads, count, size)
        return rows if self.places is None else rows.index_select(0, self.places)


class _Layer:
    """Keys and values of a layer.

    Args:
        keys: Of the prompts, (B, key heads, P, d), contiguous.
        values: Of the prompts, (B, key heads, P, e), contiguous.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.prompt_keys = keys
        self.prompt_values = values
        self._own: tuple[Tensor, Tensor] = (keys, values)

    @property
    def key_heads(self) -> int:
        """Heads of the keys."""
        return self.prompt_keys.shape[1]

    def begin(self, rows: int) -> None:
        """Makes room for the first tokens of answers."""
        keys, values = self.prompt_keys, self.prompt_values
        self._own = (
            keys.new_empty(rows, keys.shape[1], _ROOM, keys.shape[3]),
            values.new_empty(rows, values.shape[1], _ROOM, values.shape[3]),
        )

    def write(self, key: Tensor, value: Tensor, step: int) -> None:
        """Keeps keys and values (N, key heads, 1, d) of the answers' tokens of a step."""
        if step == self._own[0].shape[2]:
            self._own = (_twice(self._own[0]), _twice(self._own[1]))
        for kept, new in zip(self._own, (key, value), strict=True):
            kept[:, :, step] = new[:, :, 0]

    def own(self, first: int, known: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the answers' tokens from one to another, (N * key heads, n, d)."""
        keys, values = (kept.flatten(0, 1)[:, first:known] for kept in self._own)
        return keys, values

    def keep(self, rows: Tensor, prompts: Tensor) -> None:
        """Keeps some answers and some prompts."""
        if len(prompts) < len(self.prompt_keys):
            self.prompt_keys = self.prompt_keys.index_select(0, prompts)
            self.prompt_values = self.prompt_values.index_select(0, prompts)
        keys, values = self._own
        self._own = keys.index_select(0, rows), values.index_select(0, rows)


def _twice(buffer: Tensor) -> Tensor:
    """A buffer (N, key heads, n, d) with room for twice as many tokens."""
    rows, heads, count, size = buffer.shape
    larger = buffer.new_empty(rows, heads, 2 * count, size)
    larger[:, :, :count] = buffer
    return larger


def _shares(scores: Tensor, scaling: float) -> Tensor:
    """Shares of the keys by their scores (N, heads, keys), in the same type."""
    wide = torch.promote_types(scores.dtype, torch.float32)
    return (scores * scaling).softmax(-1, dtype=wide).to(scores.dtype)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, window: int | None, scaling: float
) -> Tensor:
    """Attention of prompts over themselves, (B, heads, P, d) -> (B, heads, P, e)."""
    width = query.shape[2]
    mask = None
    if window is not None and window < width:
        places = torch.arange(width, device=query.device)
        distance = places[:, None] - places
        mask = (distance >= 0) & (distance < window)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
