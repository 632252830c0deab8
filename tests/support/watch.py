"""A mode that sees what makes the host wait for a device: copies between them, and answers.

Tensors on ``meta`` stand for those of a GPU. What they are asked for they answer with zeros.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_BETWEEN = (str(Path(__file__).parent), str(Path(torch.__file__).parent))

# Made on the host from Python's numbers, and then copied; on ``meta`` nothing is.
_FROM_NUMBERS = {"tensor", "as_tensor", "asarray", "new_tensor", "sparse_coo_tensor"}

# Their results have as many entries as the values say.
_SIZED_BY_VALUES = {
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"),
    *("argwhere", "repeat_interleave"),
}


def _caller() -> str:
    """The innermost line outside of torch and of the tests' support that led to an event."""
    frame: Any = sys._getframe(1)
    while frame.f_code.co_filename.startswith(_BETWEEN):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


class _Factories(TorchFunctionMode):
    """Adds what is made on the host for the device to a list."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        made_here = not any(isinstance(x, Tensor) for x in args) or name == "new_tensor"
        if name in _FROM_NUMBERS and made_here and out.device.type == "meta":
            self._events.append(f"blocking copy to the device: {name} at {_caller()}")
        return out


class _Dispatch(TorchDispatchMode):
    """Adds copies and answers to a list."""

    def __init__(self, events: list[str]) -> None:
        super().__init__()
        self._events = events

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in tensors if x.device.type == "cpu"]
        there = [x for x in tensors if x.device.type == "meta"]
        if name == "_local_scalar_dense" and there:
            self._events.append(f"answer: item at {_caller()}")
            return torch.zeros((), dtype=there[0].dtype).item()
        if name in ("_to_copy", "copy_"):
            return self._copy(name, func, args, kwargs)
        if name in _SIZED_BY_VALUES and there and "output_size" not in kwargs:
            self._events.append(f"answer: {name} at {_caller()}")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and there:
            masks = [x for x in tree_leaves(args[1]) if isinstance(x, Tensor)]
            if any(x.dtype == torch.bool for x in masks):
                self._events.append(f"answer: {name} by a mask at {_caller()}")
        # Numbers of no dimension are handed over with the call.
        if there and any(x.ndim > 0 for x in here):
            self._events.append(f"blocking copy to the device: inside {name} at {_caller()}")
        return func(*args, **kwargs)

    def _copy(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        if name == "copy_":
            source, target = args[1].device.type, args[0].device.type
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            source = args[0].device.type
            wanted = kwargs.get("device")
            target = source if wanted is None else torch.device(wanted).type
            waits = not kwargs.get("non_blocking")
        if (source, target) == ("meta", "cpu"):
            # What is copied here is looked at: the host waits in any case.
            self._events.append(f"answer: a copy to the host at {_caller()}")
            if name == "copy_":
                return args[0].zero_()
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if (source, target) == ("cpu", "meta") and waits:
            self._events.append(f"blocking copy to the device: {name} at {_caller()}")
        return func(*args, **kwargs)


class Watch:
    """Events of what is computed inside of it, in order.

    Attributes:
        events: ``blocking copy to the device: …`` or ``answer: …``, each with the operation.
    """

    def __init__(self) -> None:
        self.events: list[str] = []
        self._modes: list[Any] = [_Factories(self.events), _Dispatch(self.events)]

    def __enter__(self) -> "Watch":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    @property
    def copies(self) -> list[str]:
        """Blocking copies to the device."""
        return [event for event in self.events if event.startswith("blocking")]

    @property
    def answers(self) -> list[str]:
        """Answers that the host waited for."""
        return [event for event in self.events if event.startswith("answer")]
