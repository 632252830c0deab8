"""Float32 weights behind a model that computes in bfloat16.

Autocast casts activations and weights at every layer. Here the model's own weights are bfloat16, a
rounding of float32 master weights that the optimizer holds, made once per step; gradients are added
up in float32, whatever the number of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def cast_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Casts a model's floating weights in place, but for those that its family keeps in float32.

    Buffers, such as rotary frequencies, stay as they are.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not stays_wide(model, name):
            parameter.data = parameter.data.to(dtype)
    return model


def cast_frozen(model: Any, dtype: torch.dtype) -> Any:
    """Casts the weights that are not trained, in place."""
    for name, parameter in model.named_parameters():
        frozen = parameter.is_floating_point() and not parameter.requires_grad
        if frozen and not stays_wide(model, name):
            parameter.data = parameter.data.to(dtype)
    return model


def stays_wide(model: Any, name: str) -> bool:
    """True if a model's family keeps the parameter of that name in float32."""
    kept = [*(getattr(model, "_keep_in_fp32_modules", None) or ())]
    kept += getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(part in kept for part in name.split("."))


class MasterWeights:
    """The float32 weights of a model's trainable parameters, in the order of the model's.

    Args:
        model: Its parameters are float32; from here on they are ``dtype``, until :meth:`restore`.
        dtype: Type to compute in.

    Attributes:
        parameters: Weights for the optimizer; ``grad`` of each is float32 and adds up what backward
            passes found.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = model
        self._computed = [p for p in model.parameters() if p.requires_grad]
        self.parameters = [nn.Parameter(p.data) for p in self._computed]
        cast_parameters(model, dtype)
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(_adder(master))
            for parameter, master in zip(self._computed, self.parameters, strict=True)
        ]

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the master weights into the model, after an optimizer step."""
        torch._foreach_copy_(list(self._computed), list(self.parameters))

    def state_dict(self) -> Iterator[tuple[str, Tensor]]:
        """The model's names of all trained weights, and their float32 values."""
        masters = dict(zip(map(id, self._computed), self.parameters, strict=True))
        for name, parameter in self._model.named_parameters(remove_duplicate=False):
            if id(parameter) in masters:
                yield name, masters[id(parameter)].detach()

    def restore(self) -> None:
        """Gives the model its float32 weights back; gradients are no longer taken."""
        for hook in self._hooks:
            hook.remove()
        for parameter, master in zip(self._computed, self.parameters, strict=True):
            parameter.data = master.data


def _adder(master: nn.Parameter) -> Any:
    """Adds a gradient to its master's and frees it, while the backward pass goes on."""
    # Kept from step to step: memory that is new each time costs a CPU more than the sums in it.
    buffer = torch.empty_like(master)

    def add(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        if master.grad is None:
            master.grad = buffer.copy_(gradient)
        else:
            master.grad += gradient
        parameter.grad = None

    return add
