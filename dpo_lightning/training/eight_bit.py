"""Moments of 8 bits: an entry is one of 256 numbers of a fixed map, times its block's largest.

They are those of Dettmers et al. 2022 (https://arxiv.org/abs/2110.02861).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from dpo_lightning.training.rounding import noise_of, round_by_chance

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Names of the two moments in a state."""

# Entries that a step computes in float32 at a time: a CPU's caches, or enough for a GPU.
_PIECE = {"cpu": 1 << 18}
_LARGE_PIECE = 1 << 23

# Entries of a block at most and at least, and of the smallest tensor.
_LARGEST_BLOCK, _SMALLEST_BLOCK, _SMALLEST_TENSOR = 256, 32, 4096


def new_moments(parameter: Tensor) -> dict[str, Tensor]:
    """Codes and scales of a parameter; float32 where it is not quantised."""
    block, state = block_size(parameter), {}
    for name in MOMENTS:
        if block is None:
            state[name] = torch.zeros_like(parameter, dtype=torch.float32)
            continue
        # Sliced and not made anew, so that a shard's scales are sharded as it is.
        state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
        blocks = parameter.numel() // len(parameter) // block
        scale = torch.zeros_like(parameter.flatten(1)[:, :blocks], dtype=torch.float32)
        state[f"{name}_scale"] = scale
        if name == "exp_avg":  # of which 0 is in the middle of the map
            state[name].fill_(_zero_code())
    return state


def block_size(parameter: Tensor) -> int | None:
    """Number of entries of a block; None if the tensor is not quantised. The same on every rank."""
    if parameter.ndim < 2 or parameter.numel() < _SMALLEST_TENSOR:
        return None
    row = parameter.numel() // len(parameter)
    block = math.gcd(row, _LARGEST_BLOCK)
    return block if block >= _SMALLEST_BLOCK else None


def step_in_rows(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    *,
    step: int,
    key: tuple[int, int] | None,
    start: int,
) -> None:
    """One parameter's step, some rows at a time; in place.

    Args:
        weight: This process's part, with at least one dimension.
        gradient: In the same shape.
        state: Moments and scales.
        group: The optimizer's, with rates.
        step: Number of the step.
        key: Of the random bits; None rounds to the nearest.
        start: Number of the first element in the whole parameter.
    """
    size = weight.numel() // max(1, len(weight))
    for rows in _pieces(weight):
        piece, begin = _rows(weight, rows), start + (0 if rows is None else rows.start) * size
        noise = None
        if key is not None and piece.dtype == torch.bfloat16:
            noise = noise_of(piece.numel(), begin, key, piece.device).view(piece.shape)
        _step_of_rows(
            piece,
            _rows(gradient, rows),
            {name: _rows(tensor, rows) for name, tensor in state.items()},
            group,
            step,
            noise,
        )


def _step_of_rows(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    step: int,
    noise: Tensor | None,
) -> None:
    """A step of some rows, in place."""
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    wide = gradient.float()
    first, second = (_read(state, name) for name in MOMENTS)
    first.lerp_(wide, 1 - beta1)
    second.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
    scale = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    value = weight.float().mul_(1 - lr * group["weight_decay"])
    value.addcdiv_(first, scale, value=-lr / (1 - beta1**step))
    for name, moment in zip(MOMENTS, (first, second), strict=True):
        if f"{name}_scale" in state:
            codes, scales = quantise(moment, state[f"{name}_scale"], signed=name == "exp_avg")
            state[name].copy_(codes)
            state[f"{name}_scale"].copy_(scales)
    if value is not weight:
        weight.copy_(value if noise is None else round_by_chance(value, noise))


def _read(state: dict[str, Tensor], name: str) -> Tensor:
    scales = state.get(f"{name}_scale")
    if scales is None:
        return state[name]
    return dequantise(state[name], scales, signed=name == "exp_avg")


def _pieces(weight: Tensor) -> list[slice | None]:
    """Slices of the rows that are computed at a time; None for all."""
    count, size = len(weight), _PIECE.get(weight.device.type, _LARGE_PIECE)
    rows = max(1, size * count // max(1, weight.numel()))
    if count <= rows:
        return [None] if weight.numel() else []
    return [slice(start, start + rows) for start in range(0, count, rows)]


def _rows(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


# The map ----------------------------------------------------------------------------------------


def quantise(values: Tensor, scales: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """The nearest numbers of the map, block by block.

    A second moment (not signed) that is not 0 never becomes 0: its first moment would then be
    divided by epsilon alone.

    Args:
        values: Shape (rows, ...), float32.
        scales: Only its shape counts, (rows, blocks).
        signed: True if the map has negative numbers.

    Returns:
        Codes in the shape of the values, uint8, and the largest of each block, (rows, blocks).
    """
    blocks = values.reshape(*scales.shape, -1)
    largest = blocks.abs().amax(-1)
    shares = blocks / torch.where(largest > 0, largest, 1.0)[..., None]
    codes = torch.bucketize(shares, _borders(signed, values.device), out_int32=True)
    if not signed:
        codes += (codes == 0) & (shares > 0)
    return codes.to(torch.uint8).view(values.shape), largest


def dequantise(codes: Tensor, scales: Tensor, *, signed: bool) -> Tensor:
    """The values behind codes.

    Args:
        codes: Shape (rows, ...), uint8.
        scales: The largest of each block, shape (rows, blocks), float32.
        signed: True if the map has negative numbers.

    Returns:
        The same shape as the codes, float32.
    """
    shares = _numbers(signed, codes.device).index_select(0, codes.reshape(-1).int())
    return (shares.view(*scales.shape, -1) * scales[..., None]).view(codes.shape)


@functools.cache
def _numbers(signed: bool, device: torch.device) -> Tensor:
    """The dynamic map: powers of ten, each cut finer than the one below it; 256 numbers.

    Of each power down to 1e-6 the numbers stand in the middle of equal parts of [0.1, 1]: 64 at the
    top and half as many with each power below, on either side of 0; twice as many on one side.
    """
    numbers = [0.0, 1.0]
    for exponent in range(7):
        parts = 2**exponent if signed else 2 ** (exponent + 1)
        middles = [10.0 ** (exponent - 6) * (0.1 + 0.9 * (i + 0.5) / parts) for i in range(parts)]
        numbers += [*middles, *(-number for number in middles)] if signed else middles
    return torch.tensor(sorted(numbers), dtype=torch.float32, device=device)


@functools.cache
def _borders(signed: bool, device: torch.device) -> Tensor:
    numbers = _numbers(signed, device)
    return (numbers[1:] + numbers[:-1]) / 2


def _zero_code() -> int:
    return int((_numbers(True, torch.device("cpu")) == 0).nonzero().item())
