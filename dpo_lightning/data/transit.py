"""Batches on their way to where they are computed: one buffer, however many tensors they have.

A tensor that goes through a worker's queue costs a file descriptor on both sides until it is freed,
and one that goes to a device costs a call that the host waits for; a step of many micro-batches has
hundreds. So all of them travel in one buffer of bytes, and what is used are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor

# Bytes that each tensor begins at a multiple of, so that any kernel may load it in wide words.
_ALIGNMENT = 64

Self = TypeVar("Self", bound="Movable")


class Movable:
    """A dataclass of tensors, tuples and further such dataclasses that moves as one."""

    __slots__ = ()

    def to(self: Self, device: torch.device | str, *, non_blocking: bool | None = None) -> Self:
        """The same values on a device, as views of one buffer; itself where they are there.

        Args:
            device: The device.
            non_blocking: True if the host does not wait for the copy; None: where that is safe,
                which is out of pinned memory.
        """
        device = torch.device(device)
        if all(_is_on(tensor, device) for tensor in _tensors(self)):
            return self
        left, buffer = taken_apart(self)
        if non_blocking is None:
            non_blocking = buffer.is_pinned()
        moved: Self = put_together(left, buffer.to(device, non_blocking=non_blocking))
        return moved

    def pin_memory(self: Self) -> Self:
        """The same values in memory that a GPU copies from by itself; a data loader calls it."""
        left, buffer = taken_apart(self)
        pinned: Self = put_together(left, buffer.pin_memory())
        return pinned

    def __reduce__(self) -> tuple[Any, ...]:
        """Goes through the queue of a worker as one tensor."""
        return arrived, taken_apart(self)


@dataclass(frozen=True, slots=True)
class Extent:
    """A tensor inside a buffer.

    Attributes:
        start: Its first byte.
        dtype: Its type.
        shape: Its shape.
    """

    start: int
    dtype: torch.dtype
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


def taken_apart(value: Any) -> tuple[Any, Tensor]:
    """A dataclass, or what it is made of, without its tensors, and the buffer that holds these.

    Args:
        value: Dataclasses, tuples and contiguous tensors of one device inside each other; all else
            stays as it is.

    Returns:
        What is left, and the buffer, shape (bytes,), uint8: that of which the tensors are views
        already, or a new one.
    """
    tensors = [*_tensors(value)]
    found = _common_buffer(tensors)
    if found is None:
        found = _joined(tensors)
    buffer, starts = found
    places = iter(starts)

    def part(item: Any) -> Any:
        if isinstance(item, Tensor):
            return Extent(next(places), item.dtype, tuple(item.shape))
        if _is_nested(item):
            return tuple(map(part, item))
        if hasattr(item, "__dataclass_fields__"):
            values = tuple(part(getattr(item, field.name)) for field in fields(item))
            return Made(type(item), values)
        return item

    return part(value), buffer


def put_together(left: Any, buffer: Tensor) -> Any:
    """The value again; its tensors are views of the buffer."""
    if isinstance(left, Extent):
        size = math.prod(left.shape) * left.dtype.itemsize
        return buffer[left.start : left.start + size].view(left.dtype).view(left.shape)
    if isinstance(left, Made):
        return left.kind(*(put_together(value, buffer) for value in left.values))
    if _is_nested(left):
        return tuple(put_together(item, buffer) for item in left)
    return left


def arrived(left: Any, buffer: Tensor) -> Any:
    """The value out of a queue, in memory of its own: what two processes share is free after it."""
    return put_together(left, buffer.clone())


def _is_nested(item: Any) -> bool:
    """True for a tuple that may hold tensors; those of numbers are the longest, and hold none."""
    return isinstance(item, tuple) and bool(item) and not isinstance(item[0], int)


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    """True if a tensor is on a device; one without a number is any of its kind."""
    own = tensor.device
    return own.type == device.type and device.index in (None, own.index)


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors, in the order of the fields that hold them."""
    if isinstance(value, Tensor):
        yield value
    elif _is_nested(value):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _common_buffer(tensors: list[Tensor]) -> tuple[Tensor, list[int]] | None:
    """The one buffer of which all tensors are views, and the first byte of each; None: several."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    if len({storage._cdata for storage in storages}) != 1:
        return None
    starts = [int(tensor.storage_offset()) * tensor.element_size() for tensor in tensors]
    # A part of a step, such as one of its micro-batches, takes its own part along.
    first = min(starts)
    end = max(s + t.numel() * t.element_size() for s, t in zip(starts, tensors, strict=True))
    if first % _ALIGNMENT or not all(tensor.is_contiguous() for tensor in tensors):
        return None
    whole = torch.empty(0, dtype=torch.uint8, device=tensors[0].device).set_(storages[0])
    return whole[first:end], [start - first for start in starts]


def _joined(tensors: list[Tensor]) -> tuple[Tensor, list[int]]:
    """A buffer with all tensors end to end, and the first byte of each."""
    if not tensors:
        return torch.empty(0, dtype=torch.uint8), []
    padding = torch.zeros(_ALIGNMENT, dtype=torch.uint8, device=tensors[0].device)
    parts: list[Tensor] = []
    starts: list[int] = []
    size = 0
    for tensor in tensors:
        starts.append(size)
        data = tensor.reshape(-1).view(torch.uint8)
        left_over = -len(data) % _ALIGNMENT
        parts += [data, padding[:left_over]] if left_over else [data]
        size += len(data) + left_over
    return torch.cat(parts), starts
