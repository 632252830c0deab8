"""Estimate of a run's memory before any weights are loaded, and settings that would help."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dpo_lightning.errors import UserError
from dpo_lightning.memory.footprint import AdapterFacts, Footprint, Training, in_gib
from dpo_lightning.memory.hardware import Hardware
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.settings.schema import Config

if TYPE_CHECKING:
    from dpo_lightning.memory.budget import Budget, Room
    from dpo_lightning.memory.step_memory import StepMemory
    from dpo_lightning.memory.trace import MakeOptimizer

log = logging.getLogger(__name__)

# Where nothing is set: what the other places of the settings would take, too.
_LORA_RANK = 16
_DEVICES = 8
# Of a prompt with a response, where nothing is known of the data.
_LONGEST = 1024
_EVERY_MICRO_BATCH = "strategy.sync_gradients=micro_batch"


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """A run's memory on each of its devices.

    Attributes:
        memory: Of the model's steps.
        training: How it is trained.
        device_bytes: A device's memory; None where nobody knows.
        devices: How many there are.
        float16: True if it is computed in, beside which no weights are held in bfloat16.
    """

    memory: StepMemory
    training: Training
    device_bytes: int | None
    devices: int
    float16: bool = False

    @property
    def footprint(self) -> Footprint:
        """Part by part."""
        return self.memory.footprint(self.training)

    @property
    def fits(self) -> bool:
        """True if the run fits, or nobody knows."""
        from dpo_lightning.memory.budget import ACCEPTED

        if self.device_bytes is None:
            return True
        return self.footprint.total <= ACCEPTED * self.device_bytes

    def describe(self) -> str:
        """One line, such as ``about 14 of 80 GiB: weights 2.5, optimizer 5.0``."""
        found = self.footprint
        total = in_gib(found.total)
        if self.device_bytes is not None:
            total = f"{total} of {in_gib(self.device_bytes)}"
        return f"about {total} GiB: {found.describe()}"


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """Settings that decide what a run takes of a device.

    Attributes:
        half_weights: True if the weights are held in bfloat16.
        optimizer: Name of the optimizer.
        adapters: The adapters that are trained; None trains all weights.
        live_reference: True if a frozen copy of the model is held.
        moving_reference: True if that follows the policy.
        sharded: True if the strategy shares the weights out.
        whole_gradients: True if it then adds up whole gradients until the end of a step; None: by
            the memory.
        tokens: Most tokens of a micro-batch; None: by the memory.
        checkpointing: True if activations are computed again; None: by the memory.
        max_length: Most tokens of a prompt with one response; None: the model's own limit.
        check: What happens where it is more than a device has: ``stop``, ``warn`` or ``off``.
    """

    half_weights: bool
    optimizer: str
    adapters: AdapterFacts | None
    live_reference: bool
    moving_reference: bool
    sharded: bool
    whole_gradients: bool | None
    tokens: int | None
    checkpointing: bool | None
    max_length: int | None
    check: str


def memory_settings(config: Config) -> MemorySettings:
    """The settings that an estimate is made of."""
    peft, adapters = config.peft, None
    if peft.kind == "lora":
        modules = None if peft.target_modules is None else tuple(peft.target_modules)
        adapters = AdapterFacts(peft.r, modules, peft.dora, peft.quantization == "nf4")
    moves = config.reference.sync_every is not None
    synced = {"step": True, "micro_batch": False}
    return MemorySettings(
        half_weights=config.model.dtype == "bfloat16",
        optimizer=config.optimizer.name,
        adapters=adapters,
        live_reference=config.reference.kind == "live" or moves or _held_for_rounds(config),
        moving_reference=moves,
        sharded=config.strategy.name == "fsdp",
        whole_gradients=synced.get(config.strategy.sync_gradients),
        tokens=config.data.micro_batch_tokens,
        checkpointing=config.model.gradient_checkpointing,
        max_length=config.data.max_length,
        check=config.trainer.memory_check,
    )


def _held_for_rounds(config: Config) -> bool:
    """True if rounds bring the start beside the policy, for their reference rows."""
    return (
        config.rounds.count > 0
        and config.rounds.reference == "start"
        and config.peft.kind == "none"
        and config.reference.kind != "none"
        and objective_settings(config.loss).uses_reference
    )


def plan_training(
    settings: MemorySettings,
    kind: DeviceKind,
    *,
    devices: int,
    mixed: bool,
    float16: bool = False,
) -> Training:
    """The training that the settings describe; the budget fills in tokens and checkpointing.

    Args:
        settings: The settings.
        kind: Kind of device.
        devices: How many take part.
        mixed: True if products are computed in 16 bits.
        float16: True if those are float16, by autocast on a single device too.
    """
    half, adapters = settings.half_weights, settings.adapters
    sharded = settings.sharded and devices > 1
    alone = devices == 1 and not settings.sharded
    return Training(
        kind=kind,
        weight_bytes=2 if half else 4,
        compute_bytes=2 if half or mixed else 4,
        # The copy in bfloat16 is made once a step by one process, by autocast over several.
        masters=mixed and alone and not float16 and (adapters is not None or not half),
        autocast=mixed and (float16 or not alone) and not sharded,
        optimizer=settings.optimizer,
        adapters=adapters,
        live_reference=settings.live_reference,
        shards=devices if sharded else 1,
        buckets=devices > 1 and not sharded,
        whole_gradients=settings.whole_gradients if sharded else False,
        tokens=0,
        checkpointing=False,
        moving_reference=settings.moving_reference,
    )


def with_budget(training: Training, budget: Budget, *, longest: int) -> Training:
    """The same with the largest micro-batch: the budget's, or a longer group alone.

    Args:
        training: How the model is trained.
        budget: What the device is given.
        longest: Tokens of the longest group.
    """
    tokens = max(budget.tokens, longest)
    return replace(training, tokens=tokens, checkpointing=budget.checkpointing)


def step_memory_of(
    settings: MemorySettings, model_config: Any, *, make_optimizer: MakeOptimizer
) -> StepMemory:
    """Memory of a model's steps where nothing is known of the data yet; nothing is traced here.

    Args:
        settings: The settings.
        model_config: The model's transformers config.
        make_optimizer: Makes the optimizer of a name, for the trace of a step.
    """
    from dpo_lightning.memory.lengths import GroupLengths
    from dpo_lightning.memory.step_memory import StepMemory
    from dpo_lightning.models.loading import max_positions

    longest = settings.max_length or max_positions(model_config) or _LONGEST
    return StepMemory(
        model_config, make_optimizer=make_optimizer, lengths=GroupLengths.assumed(longest)
    )


def may_not_load(memory: StepMemory, settings: MemorySettings, hardware: Hardware) -> bool:
    """True if it is worth a trace ahead of loading that a run may have no room.

    A CPU stops nothing and is warned of with the real data, but for weights that alone are more
    than it has: loading them would be the end.

    Args:
        memory: Of the model's steps.
        settings: The settings.
        hardware: The devices.
    """
    import torch

    from dpo_lightning.memory.budget import ACCEPTED, memory_of

    if hardware.kind != "cpu":
        return True
    room = memory_of(torch.device("cpu"))
    held = memory.parameters * (2 if settings.half_weights else 4)
    return room is not None and held > ACCEPTED * room


def estimate_of(
    settings: MemorySettings,
    hardware: Hardware,
    memory: StepMemory,
    *,
    device_bytes: int | None = None,
) -> MemoryEstimate:
    """The estimate by settings and the model's config alone; no data, no weights.

    Args:
        settings: The settings.
        hardware: The devices.
        memory: Of the model's steps.
        device_bytes: Memory of a device; None asks it.
    """
    import torch

    from dpo_lightning.memory.budget import Room, choose_budget, choose_sync, memory_of

    kind, devices = hardware.kind, hardware.count
    if device_bytes is None and hardware.is_here:
        device_bytes = memory_of(torch.device(kind))
    training = plan_training(
        settings, kind, devices=devices, mixed=hardware.mixed, float16=hardware.float16
    )
    # Of data nothing is known yet: the smallest budget that may be chosen is what it takes.
    room = Room(device_bytes, 0, settings.tokens, settings.checkpointing)
    training = choose_sync(memory, training, room)
    budget = choose_budget(memory, training, room)
    return MemoryEstimate(
        memory=memory,
        training=with_budget(training, budget, longest=0),
        device_bytes=device_bytes,
        devices=devices,
        float16=hardware.float16,
    )


def estimate_run(
    memory: StepMemory,
    training: Training,
    room: Room,
    *,
    costs: Sequence[int],
    batch_size: int,
    coupling: Sequence[str],
    devices: int,
    float16: bool,
) -> tuple[Budget, MemoryEstimate]:
    """The budget of a run on known data, and the memory that it takes with it.

    Args:
        memory: Of the model's steps on that data.
        training: How the model is trained.
        room: The device and the settings.
        costs: Tokens of each training group.
        batch_size: Groups of a step, over all ranks.
        coupling: Names of what compares all pairs of a step at once.
        devices: Processes that share a step.
        float16: True if it is computed in.

    Raises:
        UserError: If the loss needs a whole step at once and the settings allow less.
    """
    from dpo_lightning.memory.budget import choose_budget, choose_sync, longest_share

    def choose(room: Room) -> tuple[Budget, MemoryEstimate]:
        way = choose_sync(memory, training, room)
        budget = choose_budget(memory, way, room)
        way = with_budget(way, budget, longest=room.longest)
        return budget, MemoryEstimate(memory, way, room.device_bytes, devices, float16=float16)

    budget, estimate = choose(room)
    if not coupling or not costs:
        return budget, estimate
    needed = longest_share(costs, batch_size=batch_size, world_size=devices)
    if budget.tokens >= needed:
        return budget, estimate
    if room.tokens is None:
        return choose(replace(room, tokens=needed))
    raise UserError(
        f"data.micro_batch_tokens={room.tokens}: {', '.join(coupling)} "
        f"compares all pairs of a step at once, and a step has up to {needed} tokens on a device: "
        "raise data.micro_batch_tokens to that, or lower data.batch_size"
    )


def check_fits(estimate: MemoryEstimate, mode: str) -> None:
    """Stops a run that a GPU has no memory for, and warns of one that a CPU has none for.

    Args:
        estimate: What it takes.
        mode: ``trainer.memory_check``: ``stop``, ``warn`` or ``off``.

    Raises:
        UserError: With what would make it fit, the cheapest first.
    """
    if mode == "off" or estimate.fits:
        return
    message = too_large(estimate)
    if mode == "stop" and estimate.training.kind == "cuda":
        raise UserError(f"{message}; trainer.memory_check=warn runs it all the same")
    log.warning(message)


def too_large(estimate: MemoryEstimate) -> str:
    """The settings that do not fit, and those that would help with what they come to."""
    from dpo_lightning.memory.budget import ACCEPTED

    training = estimate.training
    held = f"model.dtype={'bfloat16' if training.weight_bytes == 2 else 'float32'}"
    options = [f"{name} ({in_gib(size)} GiB)" for name, size in remedies(estimate)]
    advice = f"; each of these helps: {', '.join(options)}" if options else ""
    return (
        f"{held} optimizer={training.optimizer} data.micro_batch_tokens={training.tokens} on "
        f"{estimate.devices} x {training.kind}: training takes {estimate.describe()}, and may take "
        f"{ACCEPTED:.0%} of it{advice}"
    )


def remedies(estimate: MemoryEstimate) -> Iterator[tuple[str, int]]:
    """Settings that take less, in the order of what they cost, and the bytes with each alone."""
    from dpo_lightning.memory.budget import LEAST_TOKENS

    now, least = estimate.training, LEAST_TOKENS[estimate.training.kind]
    options: dict[str, Training] = {}
    if now.tokens > least:
        options[f"data.micro_batch_tokens={least}"] = replace(now, tokens=least)
    options["model.gradient_checkpointing=true"] = replace(now, checkpointing=True)
    if now.adapters is None:
        alone = now.shards == 1 and not now.buckets
        # Adapters of one device have float32 copies, also beside weights in bfloat16.
        masters = alone and now.compute_bytes == 2 and not estimate.float16
        options["peft=lora"] = replace(now, adapters=AdapterFacts(_LORA_RANK), masters=masters)
    if now.whole_gradients:
        options[_EVERY_MICRO_BATCH] = replace(now, whole_gradients=False)
    options["optimizer=adamw_8bit"] = replace(now, optimizer="adamw_8bit")
    if now.adapters is None and not estimate.float16:
        half = replace(now, weight_bytes=2, compute_bytes=2, masters=False, autocast=False)
        options["model.dtype=bfloat16"] = half
    if now.shards == 1 and not (now.adapters and now.adapters.four_bit):
        count = estimate.devices if estimate.devices > 1 else _DEVICES
        name = f"strategy=fsdp {_EVERY_MICRO_BATCH} trainer.devices={count}"
        options[name] = replace(now, shards=count, masters=False, autocast=False, buckets=False)
    total = estimate.footprint.total
    for name, training in options.items():
        size = estimate.memory.footprint(training).total
        if size < 0.99 * total:
            yield name, size
