"""The attention kernel for sequences of any lengths: which calls it takes, and the call itself.

It is flash attention (https://arxiv.org/abs/2307.08691), as torch has it for CUDA: heads of
bfloat16 or float16, of one size for queries, keys and values, of at most 256 entries and a multiple
of 8. What it does not take goes to the buckets.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import varlen

from dpo_lightning.data.gathers import Sequences
from dpo_lightning.models.devices import autocast_dtype, is_cuda

log = logging.getLogger(__name__)

_HALF = (torch.bfloat16, torch.float16)
_LARGEST_HEAD = 256
_HEAD_STEP = 8


@dataclass(frozen=True, slots=True)
class HeadShape:
    """Heads of an attention layer.

    Attributes:
        heads: Query heads.
        key_heads: Key and value heads.
        size: Entries of a query, and of a key.
        value_size: Entries of a value.
    """

    heads: int
    key_heads: int
    size: int
    value_size: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> HeadShape:
        """The heads of tensors of shape (1, heads, T, d)."""
        return cls(query.shape[1], key.shape[1], query.shape[3], value.shape[3])

    def fault(self) -> str | None:
        """Why the kernel does not take such heads, on any device; None if it does."""
        if self.size != self.value_size:
            return f"heads of {self.size} entries with values of {self.value_size}"
        if self.size > _LARGEST_HEAD:
            return f"heads of {self.size} entries, more than {_LARGEST_HEAD}"
        if self.size % _HEAD_STEP:
            return f"heads of {self.size} entries, no multiple of {_HEAD_STEP}"
        if self.heads % self.key_heads:
            return f"{self.heads} query heads, no multiple of {self.key_heads} key heads"
        return None


def type_fault(dtype: torch.dtype) -> str | None:
    """Why the kernel does not compute in a type; None if it does."""
    return None if dtype in _HALF else f"{str(dtype).rpartition('.')[2]} and not half precision"


class Kernel:
    """The kernel on one device, as it was tried there.

    Args:
        tried: Heads that it was tried with, and what came of it; None: it was right.
        supposed: True for a trace: other heads are taken as right, and nothing is said.
    """

    def __init__(
        self,
        tried: Mapping[HeadShape, str | None],
        *,
        supposed: bool = False,
    ) -> None:
        self._tried = dict(tried)
        self._supposed = supposed
        # What the header of a run says of these is not said again.
        self._said = {fault for fault in self._tried.values() if fault is not None}

    def fault(self, shape: HeadShape, *dtypes: torch.dtype) -> str | None:
        """Why a call goes to the buckets; None: the kernel takes it."""
        untried = None if self._supposed else "heads that were not tried"
        of_types = (type_fault(dtype) for dtype in dtypes)
        faults = (shape.fault(), self._tried.get(shape, untried), *of_types)
        return next((fault for fault in faults if fault is not None), None)

    def takes(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """True if it computes this call; the first time that it does not, the log says why.

        Args:
            query: Shape (1, heads, T, d).
            key: Shape (1, key heads, T, d).
            value: Shape (1, key heads, T, d).
        """
        types = (query.dtype, key.dtype, value.dtype)
        fault = self.fault(HeadShape.of(query, key, value), *types)
        if fault is not None and fault not in self._said and not self._supposed:
            self._said.add(fault)
            log.warning("attention: a layer goes without the flash kernel and is slower: %s", fault)
        return fault is None


def as_computed(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values in the type that CUDA's autocast computes products in.

    The kernel is no operation that autocast knows, and rotary embeddings leave queries and keys in
    float32 where the weights are.
    """
    dtype = autocast_dtype(query.device) if is_cuda(query.device) else None
    if dtype is None:
        return query, key, value
    return query.to(dtype), key.to(dtype), value.to(dtype)


def any_lengths(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    window: int | None,
    scaling: float,
) -> Tensor:
    """Attention of all sequences in one call.

    Args:
        query: Shape (T, heads, d).
        key: Shape (T, key heads, d).
        value: Shape (T, key heads, d).
        sequences: The sequences, on the same device.
        window: Only positions less than this far back are seen; None: all.
        scaling: Factor of the scores.

    Returns:
        Shape (T, heads, d).
    """
    output = varlen.varlen_attn(
        query if query.stride(-1) == 1 else query.contiguous(),
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
    return output
