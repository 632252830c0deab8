"""Budget of tokens that a device holds at once, and the choice of checkpointing.

Both follow from traced steps (``step_memory``): as many tokens as the device has room for beside
weights, gradients and optimizer states. What happens to be free at the moment plays no part: the
same run on the same machine is split the same way.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.memory.footprint import Training
from dpo_lightning.memory.step_memory import StepMemory

log = logging.getLogger(__name__)

LEAST_TOKENS = {"cpu": 512, "mps": 1024, "cuda": 1024}
# Of a GPU's parallelism more than this gains nothing.
_MOST_TOKENS = {"cpu": 8192, "mps": 8192, "cuda": 65536}
# From here on a GPU gains less by more tokens than by sending gradients once a step.
_ENOUGH_TOKENS = 8192
# On a CPU it takes less than that: beyond its caches only the memory grows, not the speed.
_CPU_ACTIVATIONS = 1 << 28

ACCEPTED = 0.93
"""Share of a device that an estimate may come to; the rest is for what no trace knows."""


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits for a device: tokens of a micro-batch, and checkpointing.

    Attributes:
        tokens: Most tokens of a micro-batch.
        checkpointing: True if activations are computed again in the backward pass.
    """

    tokens: int
    checkpointing: bool


@dataclass(frozen=True, slots=True)
class Room:
    """A device, and what is to be decided for it.

    Attributes:
        device_bytes: Memory of the device; None where nobody knows.
        longest: Tokens of the longest group.
        tokens: ``data.micro_batch_tokens``.
        checkpointing: ``model.gradient_checkpointing``.
    """

    device_bytes: int | None
    longest: int
    tokens: int | None
    checkpointing: bool | None


def choose_budget(memory: StepMemory, training: Training, room: Room) -> Budget:
    """Chooses what the settings leave open.

    Args:
        memory: Of the model's steps.
        training: How it is trained; tokens and checkpointing are chosen here.
        room: The device and the settings.
    """
    kind = training.kind
    least, most = LEAST_TOKENS[kind], _MOST_TOKENS[kind]
    if room.device_bytes is None:
        return Budget(room.tokens or most, bool(room.checkpointing))
    limit = ACCEPTED * room.device_bytes
    most_fit = _takes_most(memory, training, room, limit)
    if most_fit is not None:
        return most_fit
    checkpointing = room.checkpointing
    if checkpointing is None:
        # By need alone: computing everything twice costs a third of the speed.
        needed = max(room.longest, room.tokens or least)
        checkpointing = _fitting(memory, training, limit, again=False)[0] < needed
    if room.tokens is not None:
        return Budget(room.tokens, checkpointing)
    fitting, liked = _fitting(memory, training, limit, again=checkpointing)
    if kind == "cpu":
        fitting = min(fitting, liked)
    tokens = min(most, max(least, _power_of_two(fitting)))
    # Between the two sizes that were traced, and beyond, not all is linear.
    while tokens > least and _total(memory, training, tokens, again=checkpointing) > limit:
        tokens //= 2
    return Budget(tokens, checkpointing)


def _takes_most(memory: StepMemory, training: Training, room: Room, limit: float) -> Budget | None:
    """As many tokens as a budget may have, where they fit: most small models, by a single trace."""
    most = _MOST_TOKENS[training.kind]
    again = bool(room.checkpointing)
    if room.tokens is not None or (room.checkpointing is None and room.longest > most):
        return None
    found = memory.footprint(replace(training, tokens=most, checkpointing=again))
    fits = found.total <= limit
    liked = training.kind != "cpu" or found.activations <= _CPU_ACTIVATIONS
    return Budget(most, again) if fits and liked else None


def _fitting(
    memory: StepMemory, training: Training, limit: float, *, again: bool
) -> tuple[int, int]:
    """Tokens that fit, as two small micro-batches show it, and those that a CPU likes."""
    few = LEAST_TOKENS[training.kind]
    sizes = few, 4 * few
    found = [
        memory.footprint(replace(training, tokens=tokens, checkpointing=again)) for tokens in sizes
    ]
    one = max(1.0, (found[1].total - found[0].total) / (sizes[1] - sizes[0]))
    fitting = few + (limit - found[0].total) / one
    return max(0, int(fitting)), int(_CPU_ACTIVATIONS / one)


def _total(memory: StepMemory, training: Training, tokens: int, *, again: bool) -> int:
    return memory.footprint(replace(training, tokens=tokens, checkpointing=again)).total


def choose_sync(memory: StepMemory, training: Training, room: Room) -> Training:
    """Decides by memory whether ranks that share weights add up whole gradients over a step.

    They do, as that sends them once, where it costs neither tokens of a micro-batch that a GPU
    would gain by nor checkpointing.

    Args:
        memory: Of the model's steps.
        training: How it is trained.
        room: The device and the settings.
    """
    if training.whole_gradients is not None:
        return training
    whole, parts = (replace(training, whole_gradients=value) for value in (True, False))
    if training.shards == 1:
        return parts
    if room.device_bytes is None:
        return whole
    with_whole, without = (choose_budget(memory, way, room) for way in (whole, parts))
    enough = min(without.tokens, _ENOUGH_TOKENS)
    total = _total(memory, whole, with_whole.tokens, again=with_whole.checkpointing)
    fits = total <= ACCEPTED * room.device_bytes
    same = with_whole.tokens >= enough and with_whole.checkpointing <= without.checkpointing
    return whole if fits and same else parts


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
