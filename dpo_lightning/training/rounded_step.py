"""A step of AdamW whose bfloat16 weights and moments are rounded by chance, in one pass.

Bytes that a step moves for each parameter, all of them operands of one kernel: weight 2 + 2,
gradient 2 (4 in float32), both moments 2 + 2 each; random bits are computed where they are used and
never stored. On CUDA the pass is compiled into such a kernel; a CPU takes it piece by piece, with
the same buffers for every piece, so that what lies between two operations stays in its caches.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dpo_lightning.training import rounding
from dpo_lightning.training.rounding import Word, round_by_chance, round_finite, scramble, signed

log = logging.getLogger(__name__)

Compiled: TypeAlias = Callable[[], Callable[..., None]]
"""Gives :func:`step_elements`, compiled."""

# Elements that a CPU takes at a time, and most that one kernel is given: their numbers are int32.
_PIECE = 1 << 15
_LARGEST_KERNEL = 1 << 30
# Without a compiler a GPU takes fewer at a time: each operation then has a result in memory.
_UNCOMPILED = 1 << 23


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter's share in a step.

    Attributes:
        weight: This process's elements, in one dimension, as the next three.
        gradient: In bfloat16 or float32.
        first: First moment.
        second: Second moment.
        numbers: From :func:`step_numbers`.
        key: Of the random bits; None rounds to the nearest.
        start: Number of the first element in the whole parameter.
    """

    weight: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    numbers: tuple[float, ...]
    key: tuple[int, int] | None
    start: int

    def pieces(self, size: int) -> Iterator[Part]:
        """The same, so many elements at a time."""
        count = self.weight.numel()
        if count <= size:
            yield self
            return
        for begin in range(0, count, size):
            own = slice(begin, begin + size)
            yield replace(
                self,
                weight=self.weight[own],
                gradient=self.gradient[own],
                first=self.first[own],
                second=self.second[own],
                start=self.start + begin,
            )


def step_numbers(group: dict[str, Any], step: int) -> tuple[float, ...]:
    """Numbers of a step that may differ from the last one's, or are a run's.

    Args:
        group: The optimizer's, with rates.
        step: From 1.

    Returns:
        What a weight keeps (1 less rate times decay), the learning rate over the first moment's
        bias, the root of the second moment's bias, the shares of a gradient in both moments, and
        what is added to the root of the second moment.
    """
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    biases = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    return (1 - lr * group["weight_decay"], *biases, 1 - beta1, 1 - beta2, group["eps"])


class Buffers:
    """Room for what a piece needs between its operations.

    Args:
        size: Most elements of a piece.
    """

    def __init__(self, size: int) -> None:
        self._numbers = torch.arange(size, dtype=torch.int32)
        self._floats = torch.empty(4, size)
        self._bits = torch.empty(2, size, dtype=torch.int32)

    def float(self, place: int, count: int) -> Tensor:
        """One of four buffers, float32."""
        return self._floats[place, :count]

    def bits(self, count: int) -> Tensor:
        """The second buffer of int32; the first has the elements' numbers."""
        return self._bits[1, :count]

    def elements(self, count: int, start: int) -> Tensor:
        """Numbers of elements, int32."""
        return torch.add(self._numbers[:count], start, out=self._bits[0, :count])


def step_elements(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    numbers: Sequence[Any],
    words: Sequence[Word] | None,
    buffers: Buffers | None = None,
) -> None:
    """One step of some elements, in place; the one definition of it.

    Args:
        weight: Shape (n,), float32 or bfloat16, as the next three.
        gradient: Not changed.
        first: First moment.
        second: Second moment.
        numbers: Those of a :class:`Part`; of a compiled step tensors ().
        words: Key of the random bits and number of the first element, as a signed 32-bit number;
            None rounds to the nearest.
        buffers: Room on a CPU; None takes new memory, or none where it is compiled.
    """
    keep, size, root, fall1, fall2, eps = numbers
    count = weight.numel()
    room = [None if buffers is None else buffers.float(place, count) for place in range(4)]
    wide = _wide(gradient, room[0])
    one = _wide(first, room[1]).lerp_(wide, fall1)
    two = _wide(second, room[2]).lerp_(torch.mul(wide, wide, out=room[3]), fall2)
    way = torch.sqrt(two, out=room[3]).div_(root).add_(eps)
    way = torch.div(one, way, out=room[3]).mul_(size)
    value = _wide(weight, room[0]).mul_(keep).sub_(way)
    if words is None or torch.bfloat16 not in (weight.dtype, first.dtype):
        for target, values in ((weight, value), (first, one), (second, two)):
            if target is not values:
                target.copy_(values)
        return
    bits, spare = _random_bits(count, words, weight.device, buffers)
    # What is not a number anywhere is none in the weight.
    finite = buffers is not None and math.isfinite(float(value.sum()))
    _store(weight, value, rounding.high_bits(bits, spare), finite)
    _store(first, one, rounding.low_bits(bits, spare), finite)
    _store(second, two, rounding.other_bits(bits, spare), finite)


def _wide(tensor: Tensor, room: Tensor | None) -> Tensor:
    """The values in float32: the tensor itself, or a copy."""
    if tensor.dtype == torch.float32:
        return tensor
    return tensor.float() if room is None else room.copy_(tensor)


def _random_bits(
    count: int, words: Sequence[Word], device: torch.device, buffers: Buffers | None
) -> tuple[Tensor, Tensor | None]:
    """32 bits of each element, and room for 16 of them."""
    one, other, start = words
    if buffers is None:
        elements = torch.arange(count, dtype=torch.int32, device=device).add_(start)
        return scramble(elements, (one, other)), None
    spare = buffers.bits(count)
    assert isinstance(start, int)
    return scramble(buffers.elements(count, start), (one, other), spare), spare


def _store(target: Tensor, values: Tensor, noise: Tensor, finite: bool) -> None:
    """Rounds values into their place; of float32 they are there already."""
    if target is not values:
        target.copy_(round_finite(values, noise) if finite else round_by_chance(values, noise))


# On a device -------------------------------------------------------------------------------------


def step_on_cpu(parts: Sequence[Part], buffers: Buffers | None) -> Buffers:
    """Takes a step piece by piece.

    Args:
        parts: Of all parameters, on the CPU.
        buffers: From the last step; None makes them.

    Returns:
        The buffers.
    """
    # Each thread has as many elements as are worth its waking.
    size = _PIECE * max(1, min(torch.get_num_threads(), 16))
    if buffers is None or buffers.float(0, size).numel() < size:
        buffers = Buffers(size)
    for part in parts:
        for piece in part.pieces(size):
            step_elements(*_tensors(piece), piece.numbers, _words(piece), buffers)
    return buffers


def step_on_gpu(parts: Sequence[Part], compiled: Compiled | None) -> Compiled | None:
    """Takes a step with one kernel for each parameter; its numbers are sent in one copy.

    Args:
        parts: Of all parameters, on one device.
        compiled: Gives the compiled step; None where compiling has failed.

    Returns:
        The same, or None from now on.
    """
    pieces = [piece for part in parts for piece in part.pieces(_LARGEST_KERNEL)]
    if not pieces:
        return compiled
    device = pieces[0].weight.device
    numbers = _sent([piece.numbers for piece in pieces], torch.float32, device)
    words = _sent([_words(piece) or (0, 0, 0) for piece in pieces], torch.int32, device)
    for place, piece in enumerate(pieces):
        own = None if piece.key is None else words[place].unbind()
        if compiled is not None:
            try:
                compiled()(*_tensors(piece), numbers[place].unbind(), own)
                continue
            except torch._dynamo.exc.TorchDynamoException as error:
                # It fails before anything is computed: this step is still to be taken.
                compiled = None
                why = " ".join(str(error).split())[:200]
                log.warning("the optimizer's step is not compiled and takes longer: %s", why)
        for small in piece.pieces(_UNCOMPILED):
            step_elements(*_tensors(small), small.numbers, _words(small))
    return compiled


def _words(piece: Part) -> tuple[int, int, int] | None:
    """Key and number of the first element; None rounds to the nearest."""
    return None if piece.key is None else (*piece.key, signed(piece.start))


def _tensors(part: Part) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return part.weight, part.gradient, part.first, part.second


def _sent(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table on the device; the host does not wait."""
    table = torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


@functools.cache
def compiled_step() -> Callable[..., None]:
    """:func:`step_elements` as one kernel for parameters of all sizes."""
    return torch.compile(step_elements, fullgraph=True, dynamic=True)
