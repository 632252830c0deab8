"""Optimizers: torch's AdamW, and one whose weights or moments take less memory.

A bfloat16 number keeps eight bits. A step at a small learning rate is less than half of the last
one and is lost when it is rounded to the nearest; so is the decay of a second moment, a thousandth
a step. Rounded up or down by chance, with the fraction that is lost as the chance of going up, the
mean of many steps is what they were.

Moments of 8 bits are those of Dettmers et al. 2022 (https://arxiv.org/abs/2110.02861): an entry is
one of 256 numbers of a fixed map, times the largest entry of its block.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

OptimizerName = Literal["adamw", "adamw_8bit"]

# Entries that a step computes in float32 at a time: a CPU's caches, or enough for a GPU.
_PIECE = {"cpu": 1 << 18}
_LARGE_PIECE = 1 << 23

# Of 8-bit moments: entries of a block at most and at least, and of the smallest tensor.
_LARGEST_BLOCK, _SMALLEST_BLOCK, _SMALLEST_TENSOR = 256, 32, 4096

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Settings of a run's optimizer.

    Attributes:
        name: ``adamw``, or ``adamw_8bit`` for moments of 8 bits.
        lr: Peak learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, of matrices only: vectors (norms, biases) are not decayed.
        stochastic_rounding: True rounds bfloat16 weights by chance; None: yes.
        seed: Of the rounding.
    """

    name: OptimizerName = "adamw"
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    stochastic_rounding: bool | None = None
    seed: int = 0


def make_optimizer(
    parameters: Iterable[Tensor], settings: OptimizerSettings
) -> torch.optim.Optimizer:
    """Makes the optimizer of a run.

    Args:
        parameters: Weights to train, all of them on one kind of device; shards of FSDP2 too.
        settings: Name, rates and rounding.
    """
    trained = list(parameters)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    half = any(p.dtype == torch.bfloat16 for p in trained)
    by_chance = half and settings.stochastic_rounding is not False
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.eps}
    if settings.name == "adamw_8bit" or by_chance:
        return LowMemoryAdamW(
            groups,
            **common,
            eight_bit=settings.name == "adamw_8bit",
            stochastic_rounding=by_chance,
            seed=settings.seed,
        )
    fused = all(p.device.type in ("cpu", "cuda") for p in trained)
    return torch.optim.AdamW(groups, **common, fused=fused)


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW whose bfloat16 weights are rounded by chance, or whose moments have 8 bits.

    A step is computed in float32, some rows of a parameter at a time. Random bits depend on the
    seed, the number of the step and the place of a shard alone, so that a checkpoint needs no state
    of a generator. With 8 bits the moments of small tensors, and of those whose rows have no whole
    number of blocks of at least 32, are float32; without, moments have the type of their weight.

    Blocks never cross a row, and codes and scales are sharded as the rows of their weight are.

    Args:
        params: Parameters or groups of them; FSDP2's shards too.
        lr: Learning rate.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        eight_bit: True if moments have 8 bits.
        stochastic_rounding: True rounds bfloat16 weights, and moments, by chance; False to the
            nearest.
        seed: Of the random bits.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        eight_bit: bool = False,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._eight_bit = eight_bit
        self._stochastic_rounding = stochastic_rounding
        self._seed = seed

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step.

        Args:
            closure: Computes the loss anew.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        generator: torch.Generator | None = None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(self._new_state(parameter))
                state["step"] += 1
                number = int(state["step"])
                if generator is None and self._stochastic_rounding:
                    generator = torch.Generator(parameter.device)
                    generator.manual_seed(noise_seed(self._seed, number, shard_of(parameter)))
                tensors = {name: _local(state[name]) for name in state if name != "step"}
                weight, gradient = _local(parameter), _local(parameter.grad)
                for rows in _pieces(weight):
                    _step_of_rows(
                        _rows(weight, rows),
                        _rows(gradient, rows),
                        {name: _rows(tensor, rows) for name, tensor in tensors.items()},
                        group,
                        number,
                        generator,
                    )
        return loss

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = {"step": torch.zeros((), dtype=torch.float32)}
        block = _block_size(parameter) if self._eight_bit else None
        for name in _MOMENTS:
            if block is None:
                dtype = torch.float32 if self._eight_bit else parameter.dtype
                state[name] = torch.zeros_like(parameter, dtype=dtype)
                continue
            # Sliced and not made anew, so that a shard's scales are sharded as it is.
            state[name] = torch.zeros_like(parameter, dtype=torch.uint8)
            blocks = parameter.numel() // len(parameter) // block
            scale = torch.zeros_like(parameter.flatten(1)[:, :blocks], dtype=torch.float32)
            state[f"{name}_scale"] = scale
            if name == "exp_avg":  # of which 0 is in the middle of the map
                state[name].fill_(_zero_code())
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state in the types in which it was saved; torch would cast it.

        Args:
            state_dict: From :meth:`state_dict`.
        """
        super().load_state_dict({**state_dict, "state": {}})
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for parameter, number in zip(own, saved, strict=True):
            if number in state_dict["state"]:
                self.state[parameter] = {
                    name: value.clone() if name == "step" else _like(value, parameter)
                    for name, value in state_dict["state"][number].items()
                }


def _step_of_rows(
    weight: Tensor,
    gradient: Tensor,
    state: dict[str, Tensor],
    group: dict[str, Any],
    step: int,
    generator: torch.Generator | None,
) -> None:
    """A step of some rows, in place."""
    beta1, beta2 = group["betas"]
    lr = float(group["lr"])
    wide = gradient.float()
    first, second = (_read(state, name) for name in _MOMENTS)
    first.lerp_(wide, 1 - beta1)
    second.mul_(beta2).addcmul_(wide, wide, value=1 - beta2)
    scale = second.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
    value = weight.float().mul_(1 - lr * group["weight_decay"])
    value.addcdiv_(first, scale, value=-lr / (1 - beta1**step))
    for name, moment in zip(_MOMENTS, (first, second), strict=True):
        if f"{name}_scale" in state:
            codes, scales = quantise(moment, state[f"{name}_scale"], signed=name == "exp_avg")
            state[name].copy_(codes)
            state[f"{name}_scale"].copy_(scales)
        else:
            _write(state[name], moment, generator)
    _write(weight, value, generator)


def _read(state: dict[str, Tensor], name: str) -> Tensor:
    scales = state.get(f"{name}_scale")
    if scales is None:
        return state[name].float()
    return dequantise(state[name], scales, signed=name == "exp_avg")


def _write(target: Tensor, values: Tensor, generator: torch.Generator | None) -> None:
    if target.dtype == torch.bfloat16 and generator is not None:
        values = round_stochastically(values, generator)
    if values is not target:
        target.copy_(values)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """Copies a value to the parameter's device; only this process's share, if that is sharded."""
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(
            value.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )
    return value.to(parameter.device, copy=True)


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, with at least one dimension."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    tensor = tensor.detach()
    return tensor if tensor.ndim else tensor[None]


def _pieces(weight: Tensor) -> list[slice | None]:
    """Slices of the rows that are computed at a time; None for all."""
    count, size = len(weight), _PIECE.get(weight.device.type, _LARGE_PIECE)
    rows = max(1, size * count // max(1, weight.numel()))
    if count <= rows:
        return [None] if weight.numel() else []
    return [slice(start, start + rows) for start in range(0, count, rows)]


def _rows(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


# Rounding by chance ------------------------------------------------------------------------------


def round_stochastically(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Rounds to one of the two nearest bfloat16 numbers; the mean is the value.

    The chance of the one farther from zero is what the other leaves of the value, as a share of the
    distance between the two. A bfloat16 number is the upper half of a float32 one, so 16 random
    bits are added to the lower half, and that is cut off.

    Args:
        values: Any shape, float32; what is not finite stays.
        generator: Of the random bits, on the same device.

    Returns:
        The same shape, bfloat16.
    """
    bits = torch.randint(
        0, 1 << 16, values.shape, dtype=torch.int32, device=values.device, generator=generator
    )
    bits += values.view(torch.int32)
    rounded = bits.bitwise_and_(-(1 << 16)).view(torch.float32)
    # In the bits of a NaN the sum could turn over to a number.
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def noise_seed(seed: int, step: int, shard: tuple[int, ...] = ()) -> int:
    """A seed for the rounding of one step; the seeds of neighbours are unrelated."""
    digest = hashlib.blake2b(repr((seed, step, shard)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def shard_of(parameter: Tensor) -> tuple[int, ...]:
    """Shard of a parameter that this process has; replicas of one are to be rounded alike."""
    if not isinstance(parameter, DTensor):
        return ()
    place = parameter.device_mesh.get_coordinate() or ()
    return tuple(
        number
        for number, placement in zip(place, parameter.placements, strict=True)
        if placement.is_shard()
    )


# Moments of 8 bits -------------------------------------------------------------------------------


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


def _block_size(parameter: Tensor) -> int | None:
    """Number of entries of a block; None if the tensor is not quantised. The same on every rank."""
    if parameter.ndim < 2 or parameter.numel() < _SMALLEST_TENSOR:
        return None
    row = parameter.numel() // len(parameter)
    block = math.gcd(row, _LARGEST_BLOCK)
    return block if block >= _SMALLEST_BLOCK else None
