"""AdamW whose bfloat16 weights are rounded by chance, or whose moments have 8 bits."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dpo_lightning.training.eight_bit import MOMENTS, new_moments, step_in_rows
from dpo_lightning.training.rounded_step import (
    Buffers,
    Compiled,
    Part,
    compiled_step,
    step_numbers,
    step_on_cpu,
    step_on_gpu,
)
from dpo_lightning.training.rounding import first_element, noise_key

log = logging.getLogger(__name__)

# What a state says of its random bits. States of before had bits of torch's generator, and no word.
_BITS_KEY, _BITS = "random_bits", "lowbias32"


@dataclass(frozen=True, slots=True)
class _Taken:
    """A parameter that takes part in a step.

    Attributes:
        weight: This process's elements, with at least one dimension.
        gradient: In the same shape.
        state: Moments and scales.
        group: The optimizer's, with rates.
        step: Number of its step.
        key: Of its random bits; None rounds to the nearest.
        start: Number of its first element in the whole parameter.
    """

    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    group: dict[str, Any]
    step: int
    key: tuple[int, int] | None
    start: int


class LowMemoryAdamW(torch.optim.Optimizer):
    """AdamW whose bfloat16 weights are rounded by chance, or whose moments have 8 bits.

    A step is computed in float32. Random bits depend on the seed, the number of the step, the
    parameter and the element alone (:mod:`.rounding`), so that a checkpoint needs no state of a
    generator and shards are rounded as the whole is. With 8 bits the moments of small tensors, and
    of those whose rows have no whole number of blocks of at least 32, are float32; without, moments
    have the type of their weight.

    Blocks never cross a row, and codes and scales are sharded as the rows of their weight are.

    A state that was saved before the random bits were a function of the element is loaded as it is;
    its run goes on, but not to the bit as that version would have.

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
        super().__init__(params, defaults | {_BITS_KEY: _BITS})
        self._eight_bit = eight_bit
        self._stochastic_rounding = stochastic_rounding
        self._seed = seed
        self._buffers: Buffers | None = None
        self._compiled: Compiled | None = compiled_step

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
        taken = [*self._taken()]
        if self._eight_bit:
            for own in taken:
                step_in_rows(
                    *(own.weight, own.gradient, own.state, own.group),
                    step=own.step,
                    key=own.key,
                    start=own.start,
                )
            return loss
        parts, copied = [], []
        for own in taken:
            tensors = (own.weight, own.gradient, *(own.state[name] for name in MOMENTS))
            flat = [tensor.reshape(-1) for tensor in tensors]
            numbers = step_numbers(own.group, own.step)
            weight, gradient, first, second = flat
            parts.append(Part(weight, gradient, first, second, numbers, own.key, own.start))
            # What is no row of memory was copied into one.
            copied += [(t, f) for t, f in zip(tensors, flat, strict=True) if not t.is_contiguous()]
        if taken and _is_gpu(taken[0].weight):
            self._compiled = step_on_gpu(parts, self._compiled)
        else:
            self._buffers = step_on_cpu(parts, self._buffers)
        for tensor, row in copied:
            tensor.copy_(row.view(tensor.shape))
        return loss

    def _taken(self) -> Iterator[_Taken]:
        """The parameters that have a gradient; their numbers of steps go on by one."""
        places = enumerate((g, p) for g in self.param_groups for p in g["params"])
        for place, (group, parameter) in places:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state.update(self._new_state(parameter))
            state["step"] += 1
            step = int(state["step"])
            key = noise_key(self._seed, step, place) if self._stochastic_rounding else None
            yield _Taken(
                _local(parameter),
                _local(parameter.grad),
                {name: _local(state[name]) for name in state if name != "step"},
                group,
                step,
                key,
                first_element(parameter),
            )

    def _new_state(self, parameter: Tensor) -> dict[str, Tensor]:
        step = {"step": torch.zeros((), dtype=torch.float32)}
        if self._eight_bit:
            return step | new_moments(parameter)
        return step | {name: torch.zeros_like(parameter) for name in MOMENTS}

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
        before = {group.get(_BITS_KEY) for group in self.param_groups} - {_BITS}
        for group in self.param_groups:
            group[_BITS_KEY] = _BITS
        if before and self._stochastic_rounding and state_dict["state"]:
            log.info(
                "resume: the checkpoint's weights were rounded with the random bits of an earlier "
                "version; from here on other bits are drawn, which are as good: the run goes on, "
                "and ends a rounding away from where that version would have ended"
            )


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


def _is_gpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda"


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, with at least one dimension."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    tensor = tensor.detach()
    return tensor if tensor.ndim else tensor[None]
