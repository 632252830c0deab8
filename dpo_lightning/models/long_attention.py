"""Attention over long sequences on a CPU, without a mask of all queries by all keys.

A prompt's queries see their own keys causally; those of a response see the whole prompt, and their
own keys causally. Neither needs a mask: torch's kernel computes each part by itself, and parts are
put together by their log-sum-exp, forward and backward, as ring attention does
(https://arxiv.org/abs/2310.01889). Under a sliding window queries go in blocks, each of which meets
no more keys than its window reaches. Nothing is copied but those few, and no scores are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dpo_lightning.data.gathers import Span
from dpo_lightning.models.devices import autocast_dtype

# Queries that meet their window in one call: its mask has so many rows.
_BLOCK = 512

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Biases = dict[tuple[int, int, int, int, torch.dtype], Tensor]
"""Masks of blocks as biases, by queries, keys, keys before the first query, window and type."""


def long_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spans: Sequence[Span],
    *,
    window: int | None,
    scaling: float,
    biases: Biases,
) -> Tensor:
    """Attention of each sequence over its prompt and itself.

    Args:
        query: Shape (T, heads, d), floating, on a CPU.
        key: Shape (T, key heads, d).
        value: Shape (T, key heads, e).
        spans: The sequences; each query is in one.
        window: Only positions less than this far back are seen; None: all are.
        scaling: Factor of the scores.
        biases: Kept from layer to layer; filled.

    Returns:
        Shape (T, heads, e), in the type of the products.
    """
    dtype = autocast_dtype(query.device) or query.dtype
    query, key, value = (rows.to(dtype) for rows in (query, key, value))
    size, width = query.shape[-1], value.shape[-1]
    if width != size:  # the kernel knows one size
        wide = max(size, width)
        query, key, value = (
            F.pad(rows, (0, wide - rows.shape[-1])) for rows in (query, key, value)
        )
    output: Tensor = _LongAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, spans, window, scaling, biases
    )
    return output[..., :width]


@dataclass(frozen=True, slots=True)
class _Part:
    """Keys that the queries of a call meet.

    Attributes:
        keys: Flat places, one range or two.
        causal: True if they are those of the queries themselves, and seen up to each.
        reach: For a window, keys before the first query's own; None: no mask is needed.
    """

    keys: tuple[slice, ...]
    causal: bool = False
    reach: int | None = None


def _calls(spans: Sequence[Span], window: int | None) -> Iterator[tuple[slice, tuple[_Part, ...]]]:
    """Queries of each call, and the parts of their keys."""
    for span in spans:
        end = span.start + span.length
        own = slice(span.start, end)
        if window is None or window >= span.before + span.length:
            parts = [_Part((own,), causal=True)]
            if span.before:
                parts.insert(0, _Part((slice(span.prompt, span.prompt + span.before),)))
            yield own, tuple(parts)
            continue
        for start in range(span.start, end, _BLOCK):
            queries = slice(start, min(start + _BLOCK, end))
            # Own keys that the first query of the block reaches, and what is left for the prompt's.
            back = min(window - 1, start - span.start)
            left = min(window - 1 - back, span.before)
            keys = [slice(start - back, queries.stop)]
            if left:
                last = span.prompt + span.before
                keys.insert(0, slice(last - left, last))
            yield queries, (_Part(tuple(keys), reach=back + left),)


class _LongAttention(torch.autograd.Function):
    """Calls of torch's kernel, whose outputs and log-sum-exps are put together."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: Sequence[Span],
        window: int | None,
        scaling: float,
        biases: Biases,
    ) -> Tensor:
        output = query.new_empty(query.shape)
        kind = torch.promote_types(query.dtype, torch.float32)
        normaliser = query.new_empty(query.shape[:2], dtype=kind)
        key_heads = key.shape[1]
        for queries, parts in _calls(spans, window):
            q = _of_queries(query[queries], key_heads)
            found = []
            for part in parts:
                k, v = (_of_keys(rows, part, q) for rows in (key, value))
                bias = _bias(biases, q, k, part, window)
                found.append(_forward(q, k, v, 0.0, part.causal, attn_mask=bias, scale=scaling))
            whole, total = found[0] if len(found) == 1 else _together(found)
            _of_queries(output[queries], key_heads).copy_(whole)
            _of_queries(normaliser[queries, :, None], key_heads)[..., 0].copy_(total)
        ctx.save_for_backward(query, key, value, output, normaliser)
        ctx.calls = (spans, window, scaling, biases)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        """Gradients of the three: each part's, with the output and normaliser of the whole."""
        query, key, value, output, normaliser = ctx.saved_tensors
        spans, window, scaling, biases = ctx.calls
        gradient = gradient.contiguous()
        d_query = torch.empty_like(query)
        d_key, d_value = torch.zeros_like(key), torch.zeros_like(value)
        key_heads = key.shape[1]
        for queries, parts in _calls(spans, window):
            q, out, d_out = (
                _of_queries(rows[queries], key_heads) for rows in (query, output, gradient)
            )
            total = _of_queries(normaliser[queries, :, None], key_heads)[..., 0]
            target = _of_queries(d_query[queries], key_heads)
            for number, part in enumerate(parts):
                k, v = (_of_keys(rows, part, q) for rows in (key, value))
                bias = _bias(biases, q, k, part, window)
                d_q, d_k, d_v = _backward(
                    *(d_out, q, k, v, out, total, 0.0, part.causal),
                    attn_mask=bias,
                    scale=scaling,
                )
                target.add_(d_q) if number else target.copy_(d_q)
                _add(d_key, d_k, part)
                _add(d_value, d_v, part)
        return d_query, d_key, d_value, None, None, None, None


def _of_queries(rows: Tensor, key_heads: int) -> Tensor:
    """Rows (n, heads, d) -> (key heads, heads of each, n, d), without a copy."""
    found: Tensor = rows.unflatten(1, (key_heads, -1)).permute(1, 2, 0, 3)
    return found


def _of_keys(rows: Tensor, part: _Part, query: Tensor) -> Tensor:
    """Rows (T, key heads, d) -> (key heads, heads of each, n, d); one range without a copy."""
    found = [rows[keys] for keys in part.keys]
    own = found[0] if len(found) == 1 else torch.cat(found)
    own = own.transpose(0, 1)[:, None]
    return own.expand(-1, query.shape[1], -1, -1)


def _bias(
    biases: Biases, query: Tensor, key: Tensor, part: _Part, window: int | None
) -> Tensor | None:
    """Mask of a block under a window, shape (queries, keys), -inf where nothing is seen."""
    if part.reach is None or window is None:
        return None
    queries, keys = query.shape[-2], key.shape[-2]
    name = (queries, keys, part.reach, window, query.dtype)
    if name not in biases:
        distance = torch.arange(queries, device=query.device)[:, None] + part.reach
        distance = distance - torch.arange(keys, device=query.device)
        seen = (distance >= 0) & (distance < window)
        bias = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
        biases[name] = bias.masked_fill_(~seen, -torch.inf)
    return biases[name]


def _together(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over the keys of two parts."""
    (first, one), (second, other) = parts
    total = torch.logaddexp(one, other)
    # In place: these are the largest tensors here, and nobody else's.
    shares = [(own - total).exp_()[..., None] for own in (one, other)]
    if first.dtype == total.dtype:
        first.mul_(shares[0]).add_(second.mul_(shares[1]))
        return first, total
    return first.to(total.dtype) * shares[0] + second.to(total.dtype) * shares[1], total


def _add(target: Tensor, found: Tensor, part: _Part) -> None:
    """Adds gradients (key heads, heads of each, n, d) to the rows of their keys."""
    rows: Tensor = found.sum(1) if found.shape[1] > 1 else found[:, 0]
    rows = rows.transpose(0, 1)
    for keys in part.keys:
        count = keys.stop - keys.start
        target[keys] += rows[:count]
        rows = rows[count:]
