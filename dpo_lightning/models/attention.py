"""Attention over prompt-sharing groups, registered with transformers.

A query sees the prompt of its group and the tokens of its own response before it; never a sibling
response, never another group. The queries of a prompt, or of one response, are a small dense
problem. On a GPU in half precision a kernel for sequences of any lengths takes all of them at once;
elsewhere those of like lengths are gathered into one call with a mask, but for long ones on a CPU
(``long_attention``). Grouped-query heads and sliding windows are honoured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen
from transformers import AttentionInterface

from dpo_lightning.data.gathers import Bucket, Bucketed, Sequences
from dpo_lightning.data.packing import GroupBatch, collate_groups
from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.models.device_kinds import kind_of
from dpo_lightning.models.long_attention import Biases, long_attention, spans_of
from dpo_lightning.models.rope import Part

GROUP_ATTENTION = "dpo_lightning_groups"

_HALF = (torch.bfloat16, torch.float16)

# Relative difference of values and gradients that half precision explains.
_VARLEN_TOLERANCE = 2e-2

# Scores of a call up to which a CPU is faster with plain products than with torch's kernel, whose
# backward pass takes three to five times as long there.
_MOST_SCORES = 1 << 24


class AttentionPlan:
    """The gathers and masks of one micro-batch, shared by all layers and by both models.

    Args:
        batch: The micro-batch.
        varlen: True if the kernel for any lengths is used where the type allows it.
        order: Place of each scored token of the data's micro-batch in this one, where that was laid
            out anew; None: it was not.
        parts: Tokens that share the factors of rotary embeddings, where those depend on lengths.

    Attributes:
        windows: The sliding windows that layers asked for, ``None`` for full attention.
        spans: The prompts and responses, in order.
        block_biases: Masks of blocks of long sequences under a window, shared by all layers.
    """

    def __init__(
        self,
        batch: GroupBatch,
        *,
        varlen: bool = False,
        order: Tensor | None = None,
        parts: Sequence[Part] = (),
    ) -> None:
        self.batch = batch
        self.order = order
        self.parts = parts
        self._bucketed = batch.bucketed
        self.sequences = (batch.sequences or Sequences.of(batch)) if varlen else None
        self.windows: set[int | None] = set()
        self.spans = spans_of(batch.segments)
        self.block_biases: Biases = {}
        self._most_scores = max((span.scores for span in self.spans), default=0)
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._biases: dict[tuple[int, int | None, int, int, torch.dtype], Tensor] = {}

    @property
    def bucketed(self) -> Bucketed:
        """The buckets; made when a layer first asks, where the batch does not bring them."""
        if self._bucketed is None:
            self._bucketed = self.batch.in_buckets()
        return self._bucketed

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Gathers of the tokens, one for each call of attention."""
        return self.bucketed.buckets

    @property
    def inverse(self) -> Tensor:
        """Place of each flat token among the buckets' queries, laid end to end, (T,), int64."""
        return self.bucketed.inverse

    def is_long(self, query: Tensor) -> bool:
        """True on a CPU if a sequence is so long that its mask is not to be made.

        Args:
            query: Shape (T, heads, d).
        """
        on_cpu = kind_of(query.device) == "cpu"
        return on_cpu and self._most_scores * query.shape[1] > _MOST_SCORES

    def mask(self, number: int, window: int | None) -> Tensor:
        """Mask of the keys that each query of a bucket sees, shape (B, 1, Q, K), bool."""
        if (number, window) not in self._masks:
            self._masks[number, window] = _bucket_mask(self.buckets[number], window)
        return self._masks[number, window]

    def bias(
        self, number: int, window: int | None, *, heads: int, shared: int, dtype: torch.dtype
    ) -> Tensor:
        """The mask as a bias, -inf where it is False, shape (B * heads, shared * Q, K)."""
        key = (number, window, heads, shared, dtype)
        if key not in self._biases:
            mask = self.mask(number, window)
            bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
            bias.masked_fill_(~mask, -torch.inf)
            whole = bias[:, :, None].expand(-1, heads, shared, -1, -1)
            self._biases[key] = whole.reshape(len(mask) * heads, -1, mask.shape[-1])
        return self._biases[key]


def _bucket_mask(bucket: Bucket, window: int | None) -> Tensor:
    distance = bucket.query_positions[:, :, None] - bucket.key_positions[:, None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    return allowed[:, None]


def group_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    group_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a flat row of groups, with the signature that transformers calls.

    Args:
        module: The attention layer.
        query: Shape (1, heads, T, d).
        key: Shape (1, key heads, T, d).
        value: Shape (1, key heads, T, d).
        attention_mask: Always None: the plan says who sees whom.
        dropout: Must be 0: siblings share one prompt, so they would share its dropout mask.
        scaling: Factor of the scores; None is 1/sqrt(d).
        sliding_window: Only positions less than this far back are seen.
        group_plan: The plan of the micro-batch.
        **kwargs: Arguments unknown to this function must not change the result.

    Returns:
        The output, shape (1, T, heads, d), and no attention weights.

    Raises:
        NotImplementedError: If a layer asks for what is not implemented here (attention sinks,
            capped scores, biases); such a model takes the padded path.
    """
    if group_plan is None:
        raise NotImplementedError("no plan reached the attention layer")
    unknown = [
        name
        for name in ("softcap", "s_aux", "position_bias", "sinks")
        if kwargs.get(name) is not None
    ]
    if unknown or dropout:
        raise NotImplementedError(f"attention with {', '.join(unknown) or 'dropout'}")
    group_plan.windows.add(sliding_window)
    # (T, heads, d): one contiguous row per token makes the gathers cheap.
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if group_plan.sequences is not None and query.dtype in _HALF:
        return _any_lengths(query, key, value, group_plan.sequences, sliding_window, scaling), None
    if group_plan.is_long(query):
        return _on_long(query, key, value, group_plan, sliding_window, scaling), None
    outputs = []
    for number, bucket in enumerate(group_plan.buckets):
        q = _gather(query, bucket.queries)
        k, v = _gather(key, bucket.keys), _gather(value, bucket.keys)
        attend = _small_attention if _is_small(q, k) else _large_attention
        output = attend(q, k, v, group_plan, number, sliding_window, scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, group_plan.inverse)[None], None


def _any_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    window: int | None,
    scaling: float,
) -> Tensor:
    """One call for all sequences; (T, heads, d) -> (1, T, heads, d)."""
    output = varlen.varlen_attn(
        query,
        key.index_select(0, sequences.keys),
        value.index_select(0, sequences.keys),
        sequences.query_ends,
        sequences.key_ends,
        sequences.most_queries,
        sequences.most_keys,
        scale=scaling,
        # Causal from the last key backwards: a response's first query sees the whole prompt.
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor)
    return output[None]


def _on_long(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    window: int | None,
    scaling: float,
) -> Tensor:
    """Sequence by sequence, without masks; (T, heads, d) -> (1, T, heads, d)."""
    output = long_attention(
        *(query, key, value, plan.spans),
        window=window,
        scaling=scaling,
        biases=plan.block_biases,
    )
    return output[None]


def _is_small(query: Tensor, key: Tensor) -> bool:
    """True if plain products, which keep the scores for the backward pass, are the faster way."""
    batch, heads, queries, _ = query.shape
    return kind_of(query.device) == "cpu" and batch * heads * queries * key.shape[2] <= _MOST_SCORES


def _small_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    number: int,
    window: int | None,
    scaling: float,
) -> Tensor:
    """Attention by two products and a softmax; (B, heads, L, d) -> (B, heads, Q, d)."""
    batch, heads, queries, size = query.shape
    key_heads, keys = key.shape[1:3]
    # Query heads that share a key head are more queries to it: keys are not repeated.
    shared = heads // key_heads
    query = query.reshape(batch * key_heads, shared * queries, size)
    key = key.reshape(batch * key_heads, keys, size)
    value = value.reshape(batch * key_heads, keys, value.shape[-1])
    bias = plan.bias(number, window, heads=key_heads, shared=shared, dtype=query.dtype)
    scores = torch.baddbmm(bias, query, key.transpose(1, 2), alpha=scaling)
    output = torch.bmm(scores.softmax(-1), value)
    return output.view(batch, heads, queries, -1)


def _large_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    number: int,
    window: int | None,
    scaling: float,
) -> Tensor:
    """The kernel of torch, which computes the scores again in the backward pass."""
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=plan.mask(number, window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (T, heads, d) at index (B, L) -> (B, heads, L, d)."""
    # index_select has a cheaper backward pass than indexing with a tensor.
    return rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:]).transpose(1, 2)


def varlen_fault(
    device: torch.device, dtype: torch.dtype, *, heads: int, key_heads: int, size: int
) -> str | None:
    """Tries the kernel for any lengths against plain attention in float32.

    Args:
        device: Device that it will run on.
        dtype: Type of the queries.
        heads: Query heads.
        key_heads: Key heads.
        size: Entries of a head.

    Returns:
        Why it cannot be used; None if values and gradients are right, with and without a window.
    """
    batch = collate_groups(
        [_probe_group(*lengths) for lengths in ((70, 9, 33), (5, 1, 2, 80))], [0, 1]
    )
    batch = batch.to(device)
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, n, len(batch.input_ids), size) for n in (heads, key_heads, key_heads)]
    inputs = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    weights = torch.randn(1, shapes[0][2], heads, size, generator=draw).to(device)
    try:
        for window in (None, 7):
            found = [
                _with_gradients(inputs, weights, AttentionPlan(batch, varlen=True), window, dtype),
                _with_gradients(inputs, weights, AttentionPlan(batch), window, torch.float32),
            ]
            for one, other in zip(*found, strict=True):
                difference = ((one.float() - other).norm() / other.norm()).item()
                if not difference <= _VARLEN_TOLERANCE:
                    return f"it differs from plain attention by {difference:.2g}"
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError) as error:
        return f"trying it failed ({' '.join(str(error).split())[:120]})"
    return None


def _with_gradients(
    inputs: list[Tensor],
    weights: Tensor,
    plan: AttentionPlan,
    window: int | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    own = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    query, key, value = own
    output, _ = group_attention(
        torch.nn.Identity(), query, key, value, None, sliding_window=window, group_plan=plan
    )
    return [output.detach(), *torch.autograd.grad((output.float() * weights).sum(), own)]


def _probe_group(prompt: int, *responses: int) -> TokenGroup:
    def ids(length: int) -> Ids:
        return np.zeros(length, dtype=np.int32)

    ranks = tuple(range(1, len(responses) + 1))
    return TokenGroup(ids(prompt), tuple(map(ids, responses)), ranks, 1.0, "probe", "probe")


AttentionInterface.register(GROUP_ATTENTION, group_attention)
