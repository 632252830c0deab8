"""Meta tensors that compute as a device would: attention's kernel, and autocast.

torch takes a plain way for attention on meta tensors, which keeps all scores, and has no autocast
for them. Both are put right here while a step is traced, for the memory that they take alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from dpo_lightning.memory.live import is_meta
from dpo_lightning.models.devices import meta_stands_for

# What autocast computes in half precision: products.
_PRODUCTS = {
    *(F.linear, torch.mm, torch.bmm, torch.matmul, torch.addmm, torch.baddbmm, torch.einsum),
    *(torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.mm, torch.Tensor.bmm),
    *(F.scaled_dot_product_attention, F.conv1d, torch.chain_matmul, torch.addbmm),
}
# What it computes in float32, as far as decoders use it.
_SUMS = {
    *(F.softmax, torch.softmax, torch.Tensor.softmax, F.layer_norm, F.rms_norm, F.cross_entropy),
    *(torch.rsqrt, torch.Tensor.rsqrt, torch.pow, torch.Tensor.pow, torch.Tensor.__pow__),
    *(torch.exp, torch.Tensor.exp, torch.sum, torch.Tensor.sum, F.log_softmax, torch.cumsum),
}
_SUMS_BY_KIND = {"cuda": _SUMS, "cpu": set[Any](), "mps": set[Any]()}


Again = Callable[[], tuple[contextlib.AbstractContextManager[Any], ...]]
"""The contexts of a forward pass, and of the same in a backward pass."""


class _Autocast:
    """State of autocast for meta tensors: its type, None where it is off, and its copies."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.copies: dict[int, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def switched(self, dtype: torch.dtype | None) -> Iterator[None]:
        before, self.dtype = self.dtype, dtype
        try:
            yield
        finally:
            self.dtype = before

    def cast(self, value: Any) -> Any:
        """A floating meta tensor in the type; that of a weight is made once, as autocast does."""
        if not is_meta(value) or not value.is_floating_point() or value.dtype == self.dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(self.dtype)
        if id(value) not in self.copies:
            self.copies[id(value)] = value, value.to(self.dtype)
        return self.copies[id(value)][1]


class _AsDevice(TorchFunctionMode):
    """Calls of torch on meta tensors, as a device computes them."""

    def __init__(self, autocast: _Autocast, kind: str) -> None:
        super().__init__()
        self._autocast = autocast
        self._sums = _SUMS_BY_KIND[kind]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._autocast.dtype is not None:
            if func in _PRODUCTS:
                args, kwargs = tree_map(self._autocast.cast, (args, kwargs))
            elif func in self._sums:
                args, kwargs = tree_map(_widened, (args, kwargs))
        if func is torch.Tensor.__bool__ and is_meta(args[0]):
            return False  # asked of masks: what is padded is not all of one length
        if func is F.scaled_dot_product_attention and is_meta(args[0]):
            return _kernel(*args, **kwargs)
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    half = is_meta(value) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if half else value


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention that keeps its output and log-sum-exps, and computes the scores again."""
    if query.shape[-1] != value.shape[-1]:
        return F.scaled_dot_product_attention(
            *(query, key, value, attn_mask, dropout_p, is_causal),
            scale=scale,
            enable_gqa=enable_gqa,
        )
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        bias = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device)
        attn_mask = bias.masked_fill_(attn_mask, -torch.inf)
    found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return found


@contextlib.contextmanager
def computing_as(kind: str, autocast: torch.dtype | None) -> Iterator[Again]:
    """Context in which meta tensors compute as a device does.

    Its functions of torch are exchanged for all threads: nothing else may use autocast meanwhile.

    Args:
        kind: ``cpu``, ``cuda`` or ``mps``.
        autocast: Type of the products under autocast; None: there is none.

    Yields:
        What ``torch.utils.checkpoint`` takes as its ``context_fn``: the backward pass is a call of
        torch's, inside of which this is off, and layers that are computed again there need it.
    """
    state = _Autocast(autocast)
    is_enabled, dtype_of, context = (
        torch.is_autocast_enabled,
        torch.get_autocast_dtype,
        torch.autocast,
    )

    def is_autocast_enabled(*of: str) -> bool:
        return state.dtype is not None if of in (("meta",), (kind,)) else is_enabled(*of)

    def get_autocast_dtype(of: str) -> torch.dtype:
        return state.dtype or torch.bfloat16 if of in ("meta", kind) else dtype_of(of)

    def autocast_of(device_type: str, *args: Any, **named: Any) -> Any:
        if device_type not in ("meta", kind):
            return context(device_type, *args, **named)
        return state.switched(autocast if named.get("enabled", True) else None)

    with (
        _exchanged("is_autocast_enabled", is_autocast_enabled),
        _exchanged("get_autocast_dtype", get_autocast_dtype),
        _exchanged("autocast", autocast_of),
        meta_stands_for(kind),
        _AsDevice(state, kind),
    ):
        yield lambda: (contextlib.nullcontext(), _AsDevice(state, kind))


@contextlib.contextmanager
def _exchanged(name: str, function: Callable[..., Any]) -> Iterator[None]:
    own = getattr(torch, name)
    setattr(torch, name, function)
    try:
        yield
    finally:
        setattr(torch, name, own)
