"""Attention over prompt-sharing groups, registered with transformers.

A query sees the prompt of its group and the tokens of its own response before it; never a sibling
response, never another group. The queries of a prompt, or of one response, are a small dense
problem. On a GPU in half precision a kernel for sequences of any lengths takes all of them at once,
layer by layer, where it takes their heads; elsewhere those of like lengths are gathered into one
call with a mask, but for long ones on a CPU (``long_attention``). Grouped-query heads and sliding
windows are honoured.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from dpo_lightning.data.gathers import Bucket, Bucketed, Sequences, Span, spans_of
from dpo_lightning.data.packing import GroupBatch
from dpo_lightning.models.decoding import Decoding
from dpo_lightning.models.devices import kind_of
from dpo_lightning.models.kernel import HeadShape, Kernel, any_lengths, as_computed
from dpo_lightning.models.long_attention import Biases, long_attention
from dpo_lightning.models.rope import Part

GROUP_ATTENTION = "dpo_lightning_groups"

# Scores of a call up to which a CPU is faster with plain products than with torch's kernel, whose
# backward pass takes three to five times as long there.
_MOST_SCORES = 1 << 24


class AttentionPlan:
    """The gathers and masks of one micro-batch, shared by all layers and by both models.

    Args:
        batch: The micro-batch.
        kernel: The kernel for any lengths, for the layers that it takes; None: for none.
        order: Place of each scored token of the data's micro-batch in this one, where that was laid
            out anew; None: it was not.
        parts: Tokens that share the factors of rotary embeddings, where those depend on lengths.

    Attributes:
        windows: The sliding windows that layers asked for, ``None`` for full attention.
        heads: Heads that layers came with, and in how many calls.
        block_biases: Masks of blocks of long sequences under a window, shared by all layers.
    """

    def __init__(
        self,
        batch: GroupBatch,
        *,
        kernel: Kernel | None = None,
        order: Tensor | None = None,
        parts: Sequence[Part] = (),
    ) -> None:
        self.batch = batch
        self.order = order
        self.parts = parts
        self.kernel = kernel
        self._bucketed = batch.bucketed
        self.sequences = None if kernel is None else (batch.sequences or Sequences.of(batch))
        self.windows: set[int | None] = set()
        self.heads: Counter[HeadShape] = Counter()
        self.block_biases: Biases = {}
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

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """The prompts and responses, in order; only a CPU asks for them."""
        return spans_of(self.batch.segments)

    @functools.cached_property
    def _most_scores(self) -> int:
        return max((span.scores for span in self.spans), default=0)

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
    group_plan: AttentionPlan | Decoding | None = None,
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
        group_plan: The plan of the micro-batch, or the keys so far while answers are written: then
            shapes have rows in place of the 1.
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
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    if isinstance(group_plan, Decoding):
        return group_plan.attend(query, key, value, sliding_window, scaling), None
    group_plan.windows.add(sliding_window)
    group_plan.heads[HeadShape.of(query, key, value)] += 1
    query, key, value = as_computed(query, key, value)
    kernel, sequences = group_plan.kernel, group_plan.sequences
    is_taken = kernel is not None and kernel.takes(query, key, value)
    # (T, heads, d): one contiguous row per token makes the gathers cheap.
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if is_taken:
        assert sequences is not None
        return any_lengths(query, key, value, sequences, sliding_window, scaling)[None], None
    attend = _on_long if group_plan.is_long(query) else _in_buckets
    return attend(query, key, value, group_plan, sliding_window, scaling)[None], None


def _in_buckets(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    window: int | None,
    scaling: float,
) -> Tensor:
    """One call for each bucket; (T, heads, d) -> (T, heads, d)."""
    outputs = []
    for number, bucket in enumerate(plan.buckets):
        q = _gather(query, bucket.queries)
        k, v = _gather(key, bucket.keys), _gather(value, bucket.keys)
        attend = _small_attention if _is_small(q, k) else _large_attention
        output = attend(q, k, v, plan, number, window, scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, plan.inverse)


def _on_long(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    window: int | None,
    scaling: float,
) -> Tensor:
    """Sequence by sequence, without masks; (T, heads, d) -> (T, heads, d)."""
    return long_attention(
        *(query, key, value, plan.spans),
        window=window,
        scaling=scaling,
        biases=plan.block_biases,
    )


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


AttentionInterface.register(GROUP_ATTENTION, group_attention)
