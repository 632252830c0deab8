"""Budget of tokens that a device holds at once, and the choice of checkpointing.

What one token leaves in memory for the backward pass, against what the device has beside weights,
gradients and optimizer states (``footprint`` has the formulas). What happens to be free at the
moment plays no part: the same run on the same machine is split the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.memory.footprint import ModelShape, Training, activation_bytes, footprint

log = logging.getLogger(__name__)

LEAST_TOKENS = {"cpu": 512, "mps": 1024, "cuda": 1024}
# Of a GPU's parallelism more than this gains nothing.
_MOST_TOKENS = {"cpu": 8192, "mps": 8192, "cuda": 65536}
# On a CPU it takes less than that: beyond its caches only the memory grows, not the speed.
_CPU_ACTIVATIONS = 1 << 28
# The rest is for what the estimate leaves out, and for fragments.
_USABLE = 0.7


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits for a device: tokens of a micro-batch, and checkpointing.

    Attributes:
        tokens: Most tokens of a micro-batch.
        checkpointing: True if activations are computed again in the backward pass.
    """

    tokens: int
    checkpointing: bool


def choose_budget(
    shape: ModelShape,
    training: Training,
    *,
    kind: str,
    device_bytes: int | None,
    longest: int,
    tokens: int | None,
    checkpointing: bool | None,
) -> Budget:
    """Chooses what the settings leave open.

    Args:
        shape: The model's shape.
        training: How it is trained; tokens and checkpointing are chosen here.
        kind: Kind of device: ``cpu``, ``cuda`` or ``mps``.
        device_bytes: Memory of the device; None where nobody knows.
        longest: Tokens of the longest group.
        tokens: ``data.micro_batch_tokens``.
        checkpointing: ``model.gradient_checkpointing``.
    """
    least, most = LEAST_TOKENS[kind], _MOST_TOKENS[kind]
    if device_bytes is None:
        return Budget(tokens or most, bool(checkpointing))
    fixed = footprint(shape, replace(training, tokens=least)).fixed
    usable = max(0.0, _USABLE * (device_bytes - fixed))

    def fitting(again: bool) -> int:
        one = activation_bytes(
            shape, width=training.compute_bytes, checkpointing=again, keys=training.keys
        )
        return int(usable / one)

    if checkpointing is None:
        # By need alone: computing everything twice costs a third of the speed.
        checkpointing = fitting(False) < max(longest, tokens or least)
    if kind == "cpu":
        usable = min(usable, _CPU_ACTIVATIONS)
    if tokens is None:
        tokens = min(most, max(least, _power_of_two(fitting(checkpointing))))
    return Budget(tokens, checkpointing)


def _power_of_two(number: int) -> int:
    """The largest power of two that is not larger."""
    return 1 << (max(number, 1).bit_length() - 1)


def memory_of(device: torch.device) -> int | None:
    """Memory that a device has, in bytes; None where it cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemTotal:")]
    return 1024 * int(found[0]) if found else None


def mean_keys(groups: Sequence[TokenGroup]) -> int:
    """Keys that a token's query meets, in the mean over all tokens of groups.

    A query of the prompt meets those of the prompt, one of a response those of both.
    """
    met = total = 0
    for group in groups:
        prompt = len(group.prompt)
        lengths = [len(response) for response in group.responses]
        met += prompt * prompt + sum(n * (prompt + n) for n in lengths)
        total += prompt + sum(lengths)
    return round(met / max(1, total))


def longest_share(costs: Sequence[int], *, batch_size: int, world_size: int) -> int:
    """Most tokens that any step can bring to one rank.

    Args:
        costs: Tokens of each group of the data set.
        batch_size: Groups of a step.
        world_size: Ranks that share it, balanced within one group's length.
    """
    step = sorted(costs)[-batch_size:]
    return min(sum(step), sum(step) // world_size + step[-1])


def say_if_over(groups: Sequence[TokenGroup], budget: Budget, *, shared: bool) -> None:
    """Says once how many groups are longer than a micro-batch may be."""
    costs = [group.tokens if shared else group.padded_tokens for group in groups]
    over = sum(cost > budget.tokens for cost in costs)
    if over:
        log.info(
            "%d of %d groups have more than data.micro_batch_tokens=%d tokens (up to %d): each is "
            "a micro-batch of its own",
            over,
            len(groups),
            budget.tokens,
            max(costs),
        )
