"""Memory of a model's training steps: traced with two layers of each kind, once for each way.

Nothing is linear in the tokens of a micro-batch but for three things, so each size that matters is
traced itself: the head computes in chunks and keeps scores up to a limit; plain products of a CPU's
attention keep scores by the lengths of sequences; below a few hundred tokens a layer's gradients
are more than its activations.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from dpo_lightning.memory.footprint import MIB, Footprint, Training
from dpo_lightning.memory.guess import guessed_step
from dpo_lightning.memory.lengths import GroupLengths, Shape
from dpo_lightning.memory.live import TooManyOperationsError
from dpo_lightning.memory.timeline import put_together
from dpo_lightning.memory.trace import (
    MakeOptimizer,
    ShortModel,
    StepTrace,
    quietly,
    trace_step,
)
from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.scoring import ScoringPath

log = logging.getLogger(__name__)

# NF4 with double quantization: 4 bits, an 8-bit scale for 64 weights, a float32 one for 256 scales.
_NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# What a process takes of a GPU before any tensor: the context with torch's kernels, about 500 MiB
# on cards of the last years, and the workspaces of cuBLAS, up to 32 MiB for each of two streams.
CUDA_CONTEXT = 576 * MIB
# Buffers of NCCL for the channels between cards, beside what is sent.
_NCCL_BUFFERS = 256 * MIB
# With expandable segments only the ends of pages and of 512-byte blocks are lost.
_FRAGMENTS = 0.03
_TRACED = 128


class StepMemory:
    """Footprints of a model's training, each way of it traced when it is asked for.

    Args:
        config: The model's transformers config.
        make_optimizer: Makes an optimizer by its name.
        lengths: Of the data's groups.
        path: How responses are scored; None: shared prompts where the model can be traced so.
    """

    def __init__(
        self,
        config: Any,
        *,
        make_optimizer: MakeOptimizer,
        lengths: GroupLengths,
        path: ScoringPath | None = None,
    ) -> None:
        with quietly():
            self._model = meta_model(config)
            self._skeleton = ShortModel(self._model)
        self._name = config.to_json_string(use_diff=False) if config is not None else ""
        self._make_optimizer = make_optimizer
        self._lengths = lengths
        self._path = path
        self.parameters = sum(p.numel() for p in self._model.parameters())

    def with_lengths(self, lengths: GroupLengths, path: ScoringPath) -> StepMemory:
        """The same model, of data that is known by now."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | {"_lengths": lengths, "_path": path}
        return other

    def trained(self, training: Training) -> int:
        """Number of the weights that are trained."""
        return self._sum(self._trace(training), "trained")

    def footprint(self, training: Training) -> Footprint:
        """Memory of a device at the busiest moment of a step.

        Args:
            training: How the model is trained, tokens and checkpointing among it.
        """
        trace = self._trace(training)
        shards = training.shards
        gradients = self._sum(trace, "gradients")
        peak, left = put_together(trace.events, trace.like)
        # Masters have a buffer for their gradients from the start.
        own = 0 if training.masters else gradients
        activations = max(peak, left + trace.optimizer_peak) - own
        weights = self._sum(trace, "weights")
        if training.adapters is not None and training.adapters.four_bit:
            linear = self._layers(trace, "linear")
            weights += round(linear * (_NF4_BYTES - training.compute_bytes))
        # Shards are held in the type of the weights, and gathered in that of the products; a
        # frozen base is held in the latter.
        is_wide = shards > 1 and training.adapters is None
        wide = training.weight_bytes // training.compute_bytes if is_wide else 1
        states = self._sum(trace, "optimizer")
        if training.optimizer != "adamw_8bit":
            states *= wide
        parts = {
            "weights": wide * weights // shards,
            "masters": self._sum(trace, "masters") // shards,
            "reference": (wide * self._sum(trace, "reference") + self._moving(trace, training))
            // shards,
            "gradients": wide * gradients // shards,
            "optimizer": states // shards,
            "gathered": self._gathered(trace, training, gradients),
            "activations": max(0, activations),
        }
        return Footprint(**parts, device=_of_device(training, sum(parts.values())))

    def _moving(self, trace: StepTrace, training: Training) -> int:
        """Bytes that a reference takes more for following the policy.

        The float32 values behind weights of 16 bits, and beside adapters the copy of these.
        """
        if not training.moving_reference:
            return 0
        trained = self._sum(trace, "trained")
        if training.adapters is None:
            return 4 * trained if training.masters or training.weight_bytes == 2 else 0
        # Frozen weights take the type of the computation, but for autocast.
        half = training.compute_bytes == 2 and not training.autocast
        return (2 + 4 if half else 4) * trained

    def _gathered(self, trace: StepTrace, training: Training, gradients: int) -> int:
        """Bytes that several devices, or 4 bits, take beside their shares; by formula.

        A shard is gathered by itself, which no single process does: the layer that computes and the
        one that is fetched meanwhile, what is outside of layers, and a layer's gradient with what
        is sent of it in float32.
        """
        found = 0
        count = max(1, len(trace.like))
        if training.adapters is not None and training.adapters.four_bit:
            found += training.compute_bytes * max([0, *(held.largest for held in trace.layers)])
        if training.buckets:
            found += gradients
        if training.shards > 1:
            layer = self._layers(trace, "parameters") // count
            outer = trace.outer.parameters
            found += training.compute_bytes * (outer + 2 * layer)
            trained = self._sum(trace, "trained")
            share = self._layers(trace, "trained") // count
            found += (training.compute_bytes + 4) * share
            if training.whole_gradients:
                found += 4 * trained
        return found

    def _sum(self, trace: StepTrace, name: str) -> int:
        return int(getattr(trace.outer, name)) + self._layers(trace, name)

    def _layers(self, trace: StepTrace, name: str) -> int:
        return sum(int(getattr(trace.layers[n], name)) for n in trace.like)

    def _trace(self, training: Training) -> StepTrace:
        segments = self._lengths.fill(max(training.tokens, 3))
        # What several devices share changes nothing in what one computes.
        same = replace(
            training,
            shards=1,
            buckets=False,
            whole_gradients=None,
            tokens=0,
            moving_reference=False,
        )
        key = (self._name, same, segments, self._path)
        if key not in _traces:
            if len(_traces) >= _TRACED:
                _traces.pop(next(iter(_traces)))
            _traces[key] = self._traced(same, segments)
        return _traces[key]

    def _traced(self, training: Training, segments: tuple[Shape, ...]) -> StepTrace:
        paths: list[ScoringPath] = [self._path] if self._path else ["flat", "padded"]
        if not getattr(self._model, "_supports_attention_backend", False):
            paths = ["padded"]
        if self._name in _untraced:
            return guessed_step(self._model, training, segments)
        fault: Exception | None = None
        for path in paths:
            try:
                with quietly():
                    return trace_step(
                        self._skeleton,
                        training,
                        segments,
                        path=path,
                        make_optimizer=self._make_optimizer,
                    )
            except Exception as error:  # whatever a family raises that wants to see numbers
                fault = fault or error
        assert fault is not None
        if isinstance(fault, TooManyOperationsError):
            _untraced.add(self._name)
        text = " ".join(str(fault).split())[:120]
        log.info("the memory of a step cannot be traced (%s): activations are a guess", text)
        return guessed_step(self._model, training, segments)


_traces: dict[Any, StepTrace] = {}
"""Steps that were traced in this process; a run asks for the same one more than once."""

_untraced: set[Any] = set()
"""Models of which a step takes too long to be traced; it would take as long to find out again."""


def _of_device(training: Training, allocated: int) -> int:
    """Bytes that a GPU loses beside its tensors; of a CPU nothing is known of that."""
    if training.kind != "cuda":
        return 0
    several = training.buckets or training.shards > 1
    return CUDA_CONTEXT + _NCCL_BUFFERS * several + round(_FRAGMENTS * allocated)
