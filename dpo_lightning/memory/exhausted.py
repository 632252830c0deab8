"""Says which step, which batch and which settings, where the device's memory is not enough."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from dpo_lightning.data.packing import GroupBatch
from dpo_lightning.errors import OutOfMemoryError

# What torch's allocators say where they have no error of their own.
_SIGNS = ("can't allocate memory", "not enough memory", "out of memory")


def is_out_of_memory(error: BaseException) -> bool:
    """True if an error means that memory was not enough."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


@contextlib.contextmanager
def explained(step: str, batch: GroupBatch | None, smaller: Sequence[str]) -> Iterator[None]:
    """Turns running out of memory into an error that says what to do about it.

    Args:
        step: What was done, such as ``step 12``.
        batch: The micro-batch that was computed; None where it was the optimizer's turn.
        smaller: Settings, beside the size of the micro-batch, by which a step takes less memory.

    Raises:
        OutOfMemoryError: In place of the allocator's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(_message(step, batch, smaller)) from None


def _message(step: str, batch: GroupBatch | None, smaller: Sequence[str]) -> str:
    if batch is None:
        return f"{step}: not enough memory for the optimizer's step: use {_either(smaller)}"
    tokens, groups = len(batch.input_ids), len(batch.segments)
    prompt, response = max(
        ((prompt, max(responses)) for prompt, *responses in batch.segments), key=sum
    )
    size = f"data.micro_batch_tokens below {tokens}" if groups > 1 else "a lower data.max_length"
    return (
        f"{step}: not enough memory for a micro-batch of {tokens} tokens in {groups} "
        f"group{'s' * (groups > 1)}, the longest with a prompt of {prompt} and a response of "
        f"{response} tokens: use {_either([size, *smaller])}"
    )


def _either(settings: Sequence[str]) -> str:
    *others, last = settings or ["a smaller model"]
    return f"{', '.join(others)} or {last}" if others else last
