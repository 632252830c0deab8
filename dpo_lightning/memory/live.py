"""Bytes of the tensors that are alive, operation by operation, and the most of them at a time.

Each operation's results are looked at as it returns, and each storage is counted once, from then
until nothing refers to it: views take nothing, what autograd keeps is alive, what is overwritten in
place stays one. On meta tensors nothing is computed, and the bytes are those of real ones.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MOST_OPERATIONS = 30_000
"""Operations of a step of two layers; attention, and experts, take two to six thousand. A layer
that goes from token to token in Python takes more than anybody would wait for."""


class TooManyOperationsError(Exception):
    """A step takes too long to be traced."""


class LiveBytes(TorchDispatchMode):
    """Counter of the live bytes on one kind of device, while it is entered.

    Args:
        device: Kind of the tensors to count, such as ``meta``.

    Raises:
        TooManyOperationsError: After the most operations.

    Attributes:
        now: Bytes that are alive.
        peak: Most of them since :meth:`begin`.
        operations: Operations that were looked at.
        most: So many are looked at and no more; None: any number.
    """

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self.operations = 0
        self.most: int | None = MOST_OPERATIONS
        self._device = device
        self._known: dict[int, Any] = {}

    def begin(self) -> None:
        """Begins to look for a peak anew."""
        self.peak = self.now

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made before."""
        for tensor in tensors:
            self._add(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.operations += 1
        if self.most is not None and self.operations > self.most:
            raise TooManyOperationsError(
                f"more than {self.most:,} operations, as of a loop over tokens"
            )
        name = func.name()
        known = _SHAPES.get(name)
        if known is not None and args[0].is_meta:
            result = known(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        self._look(result)
        inside = _INSIDE.get(name)
        if inside is not None:
            self.peak = max(self.peak, self.now + inside(args))
        return result

    def _look(self, found: Any) -> None:
        if isinstance(found, Tensor):
            self._add(found)
        elif isinstance(found, tuple | list):
            for part in found:
                self._look(part)

    def _add(self, tensor: Tensor) -> None:
        if tensor.device.type != self._device:
            return
        storage = tensor.untyped_storage()
        name = storage._cdata
        if name in self._known:
            return
        size = storage.nbytes()

        def gone(_: Any) -> None:
            del self._known[name]
            self.now -= size

        self._known[name] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def _of_kernel_backward(args: tuple[Any, ...]) -> int:
    """Bytes that flash attention's backward pass takes for itself, by torch's ``mha_varlen_bwd``.

    Sums of the queries' gradients in float32, and keys' and values' gradients of every query head
    where heads share them.
    """
    query, key = args[1], args[2]
    inside = 4 * int(query.numel())
    if key.shape[1] != query.shape[1]:
        inside += 2 * key.shape[0] * query.shape[1] * query.shape[2] * query.element_size()
    return inside


def _grouped(
    first: Tensor, second: Tensor, offs: Tensor | None = None, *_: Any, **__: Any
) -> Tensor:
    """Result of a product for each expert; torch knows its shape for bfloat16 alone."""
    shape = [first.shape[-2], second.shape[-1]]
    if first.ndim == second.ndim == 2 and offs is not None:
        shape.insert(0, len(offs))
    elif first.ndim == second.ndim == 3:
        shape.insert(0, len(first))
    return first.new_empty(shape)


_SHAPES: dict[str, Callable[..., Tensor]] = {"aten::_grouped_mm": _grouped}
"""Kernels whose results on meta tensors are made here."""

_INSIDE: dict[str, Callable[[tuple[Any, ...]], int]] = {
    "torch_attn::_varlen_attn_backward": _of_kernel_backward,
}
"""Memory that kernels take while they run, which nothing outside of them sees."""


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of tensors, a shared one once."""
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def is_meta(tensor: Any) -> bool:
    """True for a tensor without memory."""
    return isinstance(tensor, torch.Tensor) and tensor.is_meta
