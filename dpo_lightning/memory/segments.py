"""Setting of torch's allocator on a GPU, made before torch is imported. Imports no torch."""

from __future__ import annotations

from collections.abc import MutableMapping

# torch's name for it, and the one that it had before.
_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def allocate_in_segments(environment: MutableMapping[str, str]) -> None:
    """Turns expandable segments on, unless the user has set the allocator.

    The tokens of a micro-batch are another number in each, and blocks of all sizes would stay
    behind: a segment that grows is used again for any of them. Ranks and trials begin with the same
    call, or inherit it.

    Args:
        environment: The process's; changed.
    """
    if not any(name in environment for name in _VARIABLES):
        environment[_VARIABLES[0]] = "expandable_segments:True"
