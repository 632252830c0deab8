"""Attention over prompt-sharing groups, registered with transformers.

A query sees the prompt of its group and the tokens of its own response before it; never a sibling
response, never another group. The queries of a prompt, or of one response, are a small dense
problem; those of like lengths are gathered into one call with a mask. Grouped-query heads and
sliding windows are honoured.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface

from dpo_lightning.data.packing import Bucket, GroupBatch

GROUP_ATTENTION = "dpo_lightning_groups"


class AttentionPlan:
    """The gathers and masks of one micro-batch, shared by all layers and by both models.

    Attributes:
        windows: The sliding windows that layers asked for, ``None`` for full attention.
    """

    def __init__(self, batch: GroupBatch) -> None:
        self.buckets = batch.buckets
        self.inverse = batch.inverse
        self.windows: set[int | None] = set()
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    def mask(self, number: int, window: int | None) -> Tensor:
        """Which keys each query of a bucket sees, shape (B, 1, Q, K), bool."""
        if (number, window) not in self._masks:
            self._masks[number, window] = _bucket_mask(self.buckets[number], window)
        return self._masks[number, window]


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
        **kwargs: What this function does not know must not change the result.

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
    shared_heads = query.shape[1] != key.shape[1]
    # (T, heads, d): one contiguous row per token makes the gathers cheap.
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    outputs = []
    for number, bucket in enumerate(group_plan.buckets):
        output = F.scaled_dot_product_attention(
            _gather(query, bucket.queries),
            _gather(key, bucket.keys),
            _gather(value, bucket.keys),
            attn_mask=group_plan.mask(number, sliding_window),
            scale=scaling,
            enable_gqa=shared_heads,
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    joined = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return joined.index_select(0, group_plan.inverse)[None], None


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """Rows (T, heads, d) at index (B, L) -> (B, heads, L, d)."""
    # index_select has a cheaper backward pass than indexing with a tensor.
    return rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:]).transpose(1, 2)


AttentionInterface.register(GROUP_ATTENTION, group_attention)
