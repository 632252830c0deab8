"""Results of torch's operations, seen from outside of the code that calls them."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Results(TorchDispatchMode):
    """Watches every operation while it is entered.

    Attributes:
        sizes: The sizes of all dimensions of all tensors that were given.
        entries: The most entries that one had.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()
        self.entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.sizes |= {*value.shape}
                self.entries = max(self.entries, value.numel())
        return result


class Collectives(TorchDispatchMode):
    """Counts the messages between ranks, gloo's and DTensor's, while it is entered.

    On a CPU a backward pass is in the thread that asks for it, so those of its hooks count too.

    Attributes:
        counts: How often each was sent, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.counts[function._schema.name.partition("::")[2]] += 1
        return function(*args, **(kwargs or {}))
