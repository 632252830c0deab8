"""Results of torch's operations, seen from outside of the code that calls them."""

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
