"""Estimate of a run's memory before any weights are loaded, and settings that would help."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dpo_lightning.errors import UserError
from dpo_lightning.memory.footprint import Footprint, ModelShape, Training, footprint, in_gib
from dpo_lightning.memory.hardware import Hardware
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.settings.schema import Config

if TYPE_CHECKING:
    import torch

    from dpo_lightning.memory.budget import Budget

log = logging.getLogger(__name__)

# Where nothing is set: what the other places of the settings would take, too.
_LORA_RANK = 16
_DEVICES = 8
# Of a query, where nothing is known of the data.
_MOST_KEYS = 512
_EVERY_MICRO_BATCH = "strategy.sync_gradients=micro_batch"


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """A run's memory on each of its devices.

    Attributes:
        shape: The model's shape.
        training: How it is trained.
        kind: DeviceKind of device.
        device_bytes: Its memory; None where nobody knows.
        devices: How many there are.
        float16: True if it is computed in, beside which no weights are held in bfloat16.
    """

    shape: ModelShape
    training: Training
    kind: DeviceKind
    device_bytes: int | None
    devices: int
    float16: bool = False

    @property
    def footprint(self) -> Footprint:
        """Part by part."""
        return footprint(self.shape, self.training)

    @property
    def fits(self) -> bool:
        """True if the run fits, or nobody knows."""
        return self.device_bytes is None or self.footprint.total <= self.device_bytes

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
        optimizer: ``adamw`` or ``adamw_8bit``.
        lora_rank: Rank of the adapters that are trained; None trains all weights.
        four_bit: True if the frozen weights beside them are held in 4 bits.
        live_reference: True if a frozen copy of the model is held.
        sharded: True if the strategy shares the weights out.
        whole_gradients: True if it then adds up whole gradients until the end of a step.
        tokens: Most tokens of a micro-batch; None: by the memory.
        checkpointing: True if activations are computed again; None: by the memory.
        max_length: Most tokens of a prompt with one response; None: the model's own limit.
        check: What happens where it is more than a device has: ``stop``, ``warn`` or ``off``.
    """

    half_weights: bool
    optimizer: str
    lora_rank: int | None
    four_bit: bool
    live_reference: bool
    sharded: bool
    whole_gradients: bool
    tokens: int | None
    checkpointing: bool | None
    max_length: int | None
    check: str


def memory_settings(config: Config) -> MemorySettings:
    """The settings that an estimate is made of."""
    adapters = config.peft.kind == "lora"
    return MemorySettings(
        half_weights=config.model.dtype == "bfloat16",
        optimizer=config.optimizer.name,
        lora_rank=config.peft.r if adapters else None,
        four_bit=adapters and config.peft.quantization == "nf4",
        live_reference=config.reference.kind == "live",
        sharded=config.strategy.name == "fsdp",
        whole_gradients=config.strategy.sync_gradients == "step",
        tokens=config.data.micro_batch_tokens,
        checkpointing=config.model.gradient_checkpointing,
        max_length=config.data.max_length,
        check=config.trainer.memory_check,
    )


def plan_training(
    settings: MemorySettings,
    shape: ModelShape,
    device: torch.device,
    *,
    devices: int,
    mixed: bool,
    float16: bool = False,
) -> Training:
    """The training that the settings describe; the budget fills in tokens and checkpointing.

    Args:
        settings: The settings.
        shape: The model's shape.
        device: Where it is trained.
        devices: How many take part.
        mixed: True if products are computed in 16 bits.
        float16: True if those are float16, by autocast on a single device too.
    """
    from dpo_lightning.models.head import Limits

    half, rank = settings.half_weights, settings.lora_rank
    sharded = settings.sharded and devices > 1
    alone = devices == 1 and not settings.sharded
    limits = Limits.of(device)
    return Training(
        weight_bytes=2 if half else 4,
        compute_bytes=2 if half or mixed else 4,
        # The copy in bfloat16 is made once a step by one process, by autocast over several.
        masters=mixed and alone and not float16 and (rank is not None or not half),
        autocast=mixed and (float16 or not alone) and not sharded,
        optimizer=settings.optimizer,
        trained=None if rank is None else shape.lora_parameters(rank),
        four_bit=settings.four_bit,
        live_reference=settings.live_reference,
        shards=devices if sharded else 1,
        buckets=devices > 1 and not sharded,
        whole_gradients=sharded and settings.whole_gradients,
        tokens=0,
        checkpointing=False,
        keys=0,
        head_scores=limits.scores,
        head_kept=limits.kept,
    )


def with_budget(training: Training, budget: Budget, *, longest: int, keys: int) -> Training:
    """The same with the largest micro-batch: the budget's, or a longer group alone.

    Args:
        training: How the model is trained.
        budget: What the device is given.
        longest: Tokens of the longest group.
        keys: Keys that a query meets in the mean; counts where attention keeps its scores.
    """
    tokens = max(budget.tokens, longest)
    return replace(training, tokens=tokens, checkpointing=budget.checkpointing, keys=keys)


def estimate_of(
    settings: MemorySettings,
    hardware: Hardware,
    model_config: Any,
    *,
    device_bytes: int | None = None,
) -> MemoryEstimate:
    """The estimate by settings and the model's config alone; no data, no weights.

    Args:
        settings: The settings.
        hardware: The devices.
        model_config: The model's transformers config.
        device_bytes: Memory of a device; None asks it.
    """
    import torch

    from dpo_lightning.memory.budget import choose_budget, memory_of
    from dpo_lightning.memory.footprint import shape_of_model
    from dpo_lightning.models.loading import max_positions, meta_model

    kind, devices = hardware.kind, hardware.count
    if device_bytes is None and hardware.is_here:
        device_bytes = memory_of(torch.device(kind))
    shape = shape_of_model(meta_model(model_config))
    training = plan_training(
        settings,
        shape,
        torch.device(kind),
        devices=devices,
        mixed=hardware.mixed,
        float16=hardware.float16,
    )
    # Of data nothing is known yet: the smallest budget that may be chosen is what it takes.
    budget = choose_budget(
        shape,
        training,
        kind=kind,
        device_bytes=device_bytes,
        longest=0,
        tokens=settings.tokens,
        checkpointing=settings.checkpointing,
    )
    longest = settings.max_length or max_positions(model_config) or budget.tokens
    keys = min(longest // 2, _MOST_KEYS) if kind == "cpu" else 0
    return MemoryEstimate(
        shape=shape,
        training=with_budget(training, budget, longest=0, keys=keys),
        kind=kind,
        device_bytes=device_bytes,
        devices=devices,
        float16=hardware.float16,
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
    if mode == "stop" and estimate.kind == "cuda":
        raise UserError(f"{message}; if you know better, trainer.memory_check=warn")
    log.warning(message)


def too_large(estimate: MemoryEstimate) -> str:
    """The settings that do not fit, and those that would help with what they come to."""
    training = estimate.training
    held = f"model.dtype={'bfloat16' if training.weight_bytes == 2 else 'float32'}"
    options = [f"{name} ({in_gib(size)} GiB)" for name, size in remedies(estimate)]
    advice = f"; what helps, each alone: {', '.join(options)}" if options else ""
    return (
        f"{held} optimizer={training.optimizer} data.micro_batch_tokens={training.tokens} on "
        f"{estimate.devices} x {estimate.kind}: training takes {estimate.describe()}{advice}"
    )


def remedies(estimate: MemoryEstimate) -> Iterator[tuple[str, int]]:
    """Settings that take less, in the order of what they cost, and the bytes with each alone."""
    from dpo_lightning.memory.budget import LEAST_TOKENS

    now, shape, least = estimate.training, estimate.shape, LEAST_TOKENS[estimate.kind]
    options: dict[str, Training] = {}
    if now.tokens > least:
        options[f"data.micro_batch_tokens={least}"] = replace(now, tokens=least)
    options["model.gradient_checkpointing=true"] = replace(now, checkpointing=True)
    if now.trained is None:
        options["peft=lora"] = replace(now, trained=shape.lora_parameters(_LORA_RANK))
    if now.whole_gradients:
        options[_EVERY_MICRO_BATCH] = replace(now, whole_gradients=False)
    options["optimizer=adamw_8bit"] = replace(now, optimizer="adamw_8bit")
    if now.trained is None and not estimate.float16:
        half = replace(now, weight_bytes=2, compute_bytes=2, masters=False, autocast=False)
        options["model.dtype=bfloat16"] = half
    if now.shards == 1 and not now.four_bit:
        count = estimate.devices if estimate.devices > 1 else _DEVICES
        name = f"strategy=fsdp {_EVERY_MICRO_BATCH} trainer.devices={count}"
        options[name] = replace(now, shards=count, masters=False, autocast=False, buckets=False)
    total = footprint(shape, now).total
    for name, training in options.items():
        size = footprint(shape, training).total
        if size < 0.99 * total:
            yield name, size
