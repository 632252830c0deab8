"""Memory of a step that cannot be traced, by a formula for dense decoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_lightning.memory.footprint import Training
from dpo_lightning.memory.timeline import Event
from dpo_lightning.memory.trace import Held, StepTrace
from dpo_lightning.models.sharding import decoder_layers

# Entries that a layer keeps for each token, over the width of the residual stream, where scores of
# attention are computed again: 34 bytes of 2 (Korthikanti et al., https://arxiv.org/abs/2205.05198).
_KEPT = 17
_EIGHT_BIT_BYTES = 1 + 4 / 256


def guessed_step(model: Any, training: Training, segments: Sequence[Sequence[int]]) -> StepTrace:
    """A step as dense decoders take it.

    Args:
        model: On the meta device.
        training: How it is trained.
        segments: Lengths of the groups of a micro-batch.
    """
    parameters = [*model.parameters()]
    count = sum(p.numel() for p in parameters)
    layers = [*decoder_layers(model)]
    inside = [p for layer in layers for p in layer.parameters() if p.ndim >= 2]
    trained = count
    if training.adapters is not None:
        sides = sum(len(p) + p.numel() // max(1, len(p)) for p in inside)
        trained = training.adapters.rank * sides
    computed = training.compute_bytes if not training.autocast else training.weight_bytes
    held = 4 if training.masters or training.adapters is not None else training.weight_bytes
    moment = _EIGHT_BIT_BYTES if training.optimizer == "adamw_8bit" else held
    tokens = sum(map(sum, segments))
    width = model.get_input_embeddings().weight.shape[-1]
    layer = _KEPT * width * tokens * training.compute_bytes
    kept = layer * max(1, len(layers))
    if training.checkpointing:
        kept = layer + width * tokens * training.compute_bytes * len(layers)
    gradients = 0 if training.masters else held * trained
    events = (
        Event(None, True, kept + gradients, gradients),
        Event(None, True, kept, 0),
    )
    outer = Held(
        parameters=count,
        trained=trained,
        linear=sum(p.numel() for p in inside) if training.adapters is not None else 0,
        largest=0,
        weights=count * computed + (trained * held if training.adapters is not None else 0),
        masters=held * trained if training.masters else 0,
        gradients=held * trained,
        optimizer=round(2 * moment * trained),
        reference=count * computed if training.live_reference and not training.adapters else 0,
    )
    return StepTrace(events=events, optimizer_peak=0, outer=outer, layers=(), like=())
