"""Rounding of float32 to bfloat16 by chance, with random bits that are a function of their place.

A bfloat16 number keeps eight bits. A step at a small learning rate is less than half of the last
one and is lost when it is rounded to the nearest; so is the decay of a second moment, a thousandth
a step. Rounded up or down by chance, with the fraction that is lost as the chance of going up, the
mean of many steps is what they were.

The random bits of an element come from an integer hash of seed, step, parameter and the element's
number in the whole parameter, and of nothing else: not of shards, pieces, devices or the order of
computation. So a checkpoint needs no state of a generator, and shards round as the whole does.

The hash is ``lowbias32`` of Wellons' search for 32-bit mixers (https://nullprogram.com/blog/2018/07/31/),
with a key before the first round and another before the second.
"""

from __future__ import annotations

import hashlib
import math
from typing import TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Word: TypeAlias = int | Tensor
"""A 32-bit number: a signed integer, or a tensor () of int32."""

# Odd multipliers as signed 32-bit numbers: the two of lowbias32, and one that draws 16 bits more.
_FIRST, _SECOND, _THIRD = 0x7FEB352D, 0x846CA68B - (1 << 32), 0x9E3779B1 - (1 << 32)
_LOW_HALF = 0xFFFF
_HIGH_HALF = -(1 << 16)


def noise_key(seed: int, step: int, parameter: int) -> tuple[int, int]:
    """Two words for the random bits of a parameter in a step; those of neighbours are unrelated.

    Args:
        seed: Of the run.
        step: Number of the step.
        parameter: Number of the parameter in the optimizer.
    """
    digest = hashlib.blake2b(repr((seed, step, parameter)).encode(), digest_size=8).digest()
    return (
        int.from_bytes(digest[:4], "big", signed=True),
        int.from_bytes(digest[4:], "big", signed=True),
    )


def first_element(parameter: Tensor) -> int:
    """Number of this process's first element in the whole parameter, whose rows are shared out.

    Rows are split as ``torch.chunk`` splits them, which is what DTensor says of its shards.

    Raises:
        ValueError: If it is split along another dimension.
    """
    if not isinstance(parameter, DTensor) or not parameter.ndim:
        return 0
    shape, mesh = parameter.shape, parameter.device_mesh
    rows, start = shape[0], 0
    place = mesh.get_coordinate() or [0] * mesh.ndim
    for number, size, placement in zip(place, mesh.shape, parameter.placements, strict=True):
        if placement.is_replicate():
            continue
        if not placement.is_shard(0):
            raise ValueError(f"a parameter of {tuple(shape)} is split as {placement}, not by rows")
        share = -(-rows // size)
        begin = min(number * share, rows)
        start, rows = start + begin, min(share, rows - begin)
    assert rows == parameter.to_local().shape[0]
    return start * math.prod(shape[1:])


def signed(number: int) -> int:
    """The lowest 32 bits of a number, as a signed one; elements 2^32 apart share their bits."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)


def scramble(numbers: Tensor, key: tuple[Word, Word], spare: Tensor | None = None) -> Tensor:
    """Turns the numbers of elements into 32 random bits each; in place.

    Args:
        numbers: Shape (n,), int32; overwritten.
        key: From :func:`noise_key`.
        spare: Room of the same shape and type; None takes new memory.

    Returns:
        The numbers' tensor.
    """
    x = numbers.bitwise_xor_(key[0])
    x = x.bitwise_xor_(_shifted(x, 16, spare)).mul_(_FIRST)
    x = x.bitwise_xor_(_shifted(x, 15, spare)).add_(key[1]).mul_(_SECOND)
    return x.bitwise_xor_(_shifted(x, 16, spare))


def _shifted(x: Tensor, places: int, out: Tensor | None) -> Tensor:
    """Bits moved down, zeros behind them; int32's own shift repeats the sign."""
    moved = torch.bitwise_right_shift(x, places, out=out)
    return moved.bitwise_and_((1 << (32 - places)) - 1)


def high_bits(bits: Tensor, out: Tensor | None = None) -> Tensor:
    """The upper 16 of 32 random bits, as numbers below 2^16."""
    return _shifted(bits, 16, out)


def low_bits(bits: Tensor, out: Tensor | None = None) -> Tensor:
    """The lower 16 of 32 random bits, as numbers below 2^16."""
    return torch.bitwise_and(bits, _LOW_HALF, out=out)


def other_bits(bits: Tensor, out: Tensor | None = None) -> Tensor:
    """16 bits more, each a function of all 32; these are overwritten."""
    return _shifted(bits.mul_(_THIRD), 16, out)


def noise_of(count: int, start: int, key: tuple[int, int], device: torch.device) -> Tensor:
    """16 random bits for each of some elements, shape (count,), int32.

    Args:
        count: How many.
        start: Number of the first of them in the whole parameter.
        key: From :func:`noise_key`.
        device: Where they are wanted.
    """
    numbers = torch.arange(count, dtype=torch.int32, device=device).add_(signed(start))
    return high_bits(scramble(numbers, key))


def round_by_chance(values: Tensor, noise: Tensor) -> Tensor:
    """Rounds to one of the two nearest bfloat16 numbers; the mean is the value.

    The chance of the one farther from zero is what the other leaves of the value, as a share of the
    distance between the two. A bfloat16 number is the upper half of a float32 one, so 16 random
    bits are added to the lower half, and that is cut off.

    Args:
        values: Any shape, float32; what is not finite stays.
        noise: The same shape, int32, below 2^16.

    Returns:
        The same shape, float32, each a bfloat16 number.
    """
    rounded = (values.view(torch.int32) + noise).bitwise_and_(_HIGH_HALF).view(torch.float32)
    # In the bits of a NaN the sum could turn over to a number.
    return torch.where(values.isfinite(), rounded, values)


def round_finite(values: Tensor, noise: Tensor) -> Tensor:
    """Does what :func:`round_by_chance` does to finite values; in place."""
    values.view(torch.int32).add_(noise).bitwise_and_(_HIGH_HALF)
    return values
