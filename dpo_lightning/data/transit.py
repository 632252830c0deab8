"""Batches on their way from the process that builds them: in few tensors, however many they have.

A tensor that goes through a worker's queue costs a file descriptor on both sides until it is freed,
and a step of many micro-batches has hundreds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor inside a buffer.

    Attributes:
        buffer: Number of the buffer.
        start: First entry.
        shape: Shape of the tensor.
    """

    buffer: int
    start: int
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Made:
    """A dataclass whose tensors are taken out.

    Attributes:
        kind: Its class.
        values: Its fields in their order.
    """

    kind: type
    values: tuple[Any, ...]


def taken_apart(value: Any) -> tuple[Any, tuple[Tensor, ...]]:
    """A dataclass, or what it is made of, without its tensors, and one buffer for each type.

    Args:
        value: Dataclasses, tuples and tensors inside each other; all else stays as it is.
    """
    parts: dict[torch.dtype, list[Tensor]] = {}
    sizes: dict[torch.dtype, int] = {}

    def part(item: Any) -> Any:
        if isinstance(item, Tensor):
            start = sizes.get(item.dtype, 0)
            sizes[item.dtype] = start + item.numel()
            parts.setdefault(item.dtype, []).append(item.reshape(-1))
            return Extent([*parts].index(item.dtype), start, tuple(item.shape))
        if isinstance(item, tuple) and item and not isinstance(item[0], int):
            return tuple(map(part, item))
        if hasattr(item, "__dataclass_fields__"):
            values = tuple(part(getattr(item, field.name)) for field in fields(item))
            return Made(type(item), values)
        return item

    left = part(value)
    return left, tuple(torch.cat(found) for found in parts.values())


def put_together(left: Any, buffers: Sequence[Tensor]) -> Any:
    """The value again, with tensors of their own: the buffers are free after it."""
    if isinstance(left, Extent):
        found = buffers[left.buffer][left.start : left.start + math.prod(left.shape)]
        return found.reshape(left.shape).clone()
    if isinstance(left, Made):
        return left.kind(*(put_together(value, buffers) for value in left.values))
    if isinstance(left, tuple) and left and not isinstance(left[0], int):
        return tuple(put_together(item, buffers) for item in left)
    return left
