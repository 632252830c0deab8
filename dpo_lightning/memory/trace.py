"""A whole training step of a few layers on meta tensors, with the bytes that it takes.

The step is the run's own: its scorer, head, master weights, adapters, checkpointing and optimizer,
two micro-batches long, so that the second meets the gradients of the first. Nothing is computed and
nothing is held.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_lightning.data.packing import GroupBatch, collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.memory.footprint import AdapterFacts, Training
from dpo_lightning.memory.live import LiveBytes, nbytes
from dpo_lightning.memory.meta_step import Again, computing_as
from dpo_lightning.memory.timeline import Event, Recorder
from dpo_lightning.models.adapters import Adapters, LoraSettings
from dpo_lightning.models.master_weights import MasterWeights, cast_frozen, cast_parameters
from dpo_lightning.models.scoring import Scorer, ScoringPath
from dpo_lightning.models.sharding import decoder_layers

log = logging.getLogger(__name__)

MakeOptimizer = Callable[[str, list[Tensor]], Any]
"""Makes the optimizer of a name for weights to train."""

Segments = Sequence[Sequence[int]]
"""(|P|, |y_1|, ..., |y_K|) of each group of a micro-batch."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that one layer, or what is outside of layers, holds from step to step.

    Attributes:
        parameters: Number of weights.
        trained: Those of them that are trained.
        linear: Weights of its frozen matrices under adapters.
        largest: Weights of the largest of those matrices.
        weights: Bytes of the weights as they compute, buffers among them.
        masters: Of the float32 ones behind them.
        gradients: Of a gradient of each, as it is added up.
        optimizer: Of the optimizer's states.
        reference: Of a live reference.
    """

    parameters: int
    trained: int
    linear: int
    largest: int
    weights: int
    masters: int
    gradients: int
    optimizer: int
    reference: int


@dataclass(frozen=True, slots=True)
class StepTrace:
    """A traced step.

    Attributes:
        events: Of its two micro-batches.
        optimizer_peak: Most bytes that the optimizer takes beside its states.
        outer: Held outside of the layers.
        layers: Held by each traced layer.
        like: For each layer of the model, the traced one that it is like.
    """

    events: tuple[Event, ...]
    optimizer_peak: int
    outer: Held
    layers: tuple[Held, ...]
    like: tuple[int, ...]


class ShortModel:
    """A model on the meta device, and the layers of it that stand for all.

    Args:
        model: On the meta device; left as it is.

    Attributes:
        picked: Numbers of the traced layers: the first two of each kind.
        like: For each layer the place in ``picked`` of the one that it is like.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._owner, self._name, layers = _layer_list(model)
        kinds: dict[Any, list[int]] = {}
        for number, layer in enumerate(layers):
            kinds.setdefault(_kind(layer), []).append(number)
        self.picked = sorted(number for own in kinds.values() for number in own[:2])
        place = {number: at for at, number in enumerate(self.picked)}
        self.like = [
            place[own[0] if number == own[0] else own[1]]
            for number, layer in enumerate(layers)
            for own in [kinds[_kind(layer)]]
        ]

    def small(self) -> tuple[Any, list[nn.Module]]:
        """A copy of the model with the picked layers alone, and those layers."""
        if self._owner is None:
            return copy.deepcopy(self._model), []
        layers = getattr(self._owner, self._name)
        setattr(self._owner, self._name, nn.ModuleList([layers[n] for n in self.picked]))
        try:
            model = copy.deepcopy(self._model)
        finally:
            setattr(self._owner, self._name, layers)
        return model, _layer_list(model)[2]


def _layer_list(model: Any) -> tuple[Any, str, list[nn.Module]]:
    """The module that has the decoder's layers, its name for them, and the layers."""
    own = {id(layer) for layer in decoder_layers(model)}
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and len(child) and id(child[0]) in own:
                return module, name, [*child]
    return None, "", []


def _kind(layer: nn.Module) -> Any:
    """Tells layers apart that do not take the same memory."""
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    windows = [getattr(module, "sliding_window", None) for module in layer.modules()]
    return type(layer), shapes, tuple(str(w) for w in windows if w is not None)


def trace_step(
    skeleton: ShortModel,
    training: Training,
    segments: Segments,
    *,
    path: ScoringPath,
    make_optimizer: MakeOptimizer,
) -> StepTrace:
    """Traces a step.

    Args:
        skeleton: The model.
        training: How it is trained; tokens do not count.
        segments: GroupLengths of the groups of a micro-batch.
        path: How responses are scored.
        make_optimizer: Makes the optimizer.
    """
    half = training.compute_bytes == 2
    autocast = torch.bfloat16 if training.autocast and half else None
    with computing_as(training.kind, autocast) as again:
        scorer = Scorer(path)
        if training.kind == "cuda" and half and path == "flat":
            scorer.suppose_kernel()
        model, layers = _built(skeleton, training, scorer, again)
        reference = _reference(model, training)
        recorded: list[Event] = []
        with LiveBytes("meta") as live:
            for held in (model, reference):
                live.hold([] if held is None else [*held.parameters(), *held.buffers()])
            masters, trained = _trained(model, training)
            recorder = Recorder(live)
            recorder.watch(layers)
            for _ in range(2):
                _micro_batch(model, scorer, segments, training, reference, recorder)
            recorder.mark(None, forward=False)
            recorded = recorder.events
            gradients = {id(p): nbytes([p.grad]) for p in trained if p.grad is not None}
            torch.nn.utils.clip_grad_norm_([p for p in trained if p.grad is not None], 1.0)
            states, extra = _optimizer_step(live, training, trained, make_optimizer)
        computed = [p for p in model.parameters() if p.requires_grad]
        behind = dict(zip(map(id, computed), trained, strict=True))
        # With adapters the reference is the model itself.
        copied = reference is not None and reference is not model
        parts = _Parts(behind, masters is not None, gradients, states, copied)
        return StepTrace(
            events=tuple(recorded),
            optimizer_peak=extra,
            outer=parts.of(_outside(model, layers), [*model.buffers()]),
            layers=tuple(parts.of([*layer.parameters()], []) for layer in layers),
            like=tuple(skeleton.like),
        )


def _built(
    skeleton: ShortModel, training: Training, scorer: Scorer, again: Again
) -> tuple[Any, list[nn.Module]]:
    """The model as it is trained, in train mode."""
    model, layers = skeleton.small()
    held = torch.bfloat16 if training.weight_bytes == 2 else torch.float32
    cast_parameters(model, held)
    if training.adapters is not None:
        _adapt(model, training.adapters)
        if training.compute_bytes == 2 and not training.autocast:
            cast_frozen(model, torch.bfloat16)
    elif training.compute_bytes == 2 and not training.masters and not training.autocast:
        cast_parameters(model, torch.bfloat16)
    scorer.prepare(model)
    if training.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False, "context_fn": again})
    return model.train(), layers


def _adapt(model: Any, facts: AdapterFacts) -> None:
    start = LoraSettings(
        r=facts.rank,
        alpha=facts.rank,
        target_modules=facts.modules,
        rslora=False,
        dora=facts.dora,
        gaussian=False,
    )
    with torch.device("meta"):
        Adapters(model, start, reference=None, dropout=0.0, seed=0, load_base=lambda: model)


def _reference(model: Any, training: Training) -> Any:
    """A live reference: a frozen copy, or with adapters the model itself."""
    if not training.live_reference:
        return None
    if training.adapters is not None:
        return model
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    return cast_parameters(reference, torch.bfloat16) if training.masters else reference


def _trained(model: Any, training: Training) -> tuple[MasterWeights | None, list[Tensor]]:
    """Master weights where there are some, and the weights that the optimizer has."""
    if training.masters:
        masters = MasterWeights(model, torch.bfloat16)
        return masters, [*masters.parameters]
    return None, [p for p in model.parameters() if p.requires_grad]


def _micro_batch(
    model: Any,
    scorer: Scorer,
    segments: Segments,
    training: Training,
    reference: Any,
    recorder: Recorder,
) -> None:
    """Forward and backward pass of a micro-batch."""
    batch = _batch(segments).to("meta")
    logps = _logps(model, scorer, batch, reference)
    recorder.backward = True
    logps.sum().backward()
    recorder.backward = False
    recorder.mark(None, forward=True)


def _logps(model: Any, scorer: Scorer, batch: GroupBatch, reference: Any) -> Tensor:
    """Log-probabilities; the plan that both models share ends here, as it does in a run."""
    plan = scorer.plan(batch)
    policy = scorer.logps(model, batch, plan)
    if reference is None:
        return policy
    with torch.no_grad():
        other = scorer.logps(reference, batch, plan)
    return policy - other


def _batch(segments: Segments) -> GroupBatch:
    groups = []
    for prompt, *responses in segments:
        ids = [np.zeros(length, dtype=np.int32) for length in (prompt, *responses)]
        ranks = tuple(range(1, len(ids)))
        groups.append(TokenGroup(ids[0], tuple(ids[1:]), ranks, 1.0, "", ""))
    return collate_groups(groups, range(len(groups)))


def _optimizer_step(
    live: LiveBytes, training: Training, trained: list[Tensor], make_optimizer: MakeOptimizer
) -> tuple[dict[int, int], int]:
    """Bytes of each weight's states, and the most that the step takes beside them."""
    optimizer = make_optimizer(training.optimizer, trained)
    live.most = None  # one of 8 bits goes through a large weight piece by piece
    before = live.now
    live.begin()
    if type(optimizer) is torch.optim.AdamW:
        # The fused one, which takes nothing beside its states; it is not made for meta tensors.
        states = {p: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                  for p in trained if p.grad is not None}  # fmt: skip
    else:
        optimizer.step()
        states = optimizer.state
    sizes = {
        id(p): nbytes(t for t in own.values() if isinstance(t, Tensor) and t.is_meta)
        for p, own in states.items()
    }
    return sizes, max(0, live.peak - before - sum(sizes.values()))


@dataclass(frozen=True, slots=True)
class _Parts:
    """Bytes of each weight.

    Attributes:
        behind: For each weight that is trained, what the optimizer has of it.
        masters: True if that is another tensor.
        gradients: Bytes of each gradient, by what the optimizer has.
        states: Bytes of its states.
        reference: True if there is a frozen copy.
    """

    behind: dict[int, Tensor]
    masters: bool
    gradients: dict[int, int]
    states: dict[int, int]
    reference: bool

    def of(self, weights: Sequence[Tensor], buffers: Sequence[Tensor]) -> Held:
        """Sums over some weights."""
        own = [self.behind[id(p)] for p in weights if id(p) in self.behind]
        frozen = [p for p in weights if id(p) not in self.behind]
        held = nbytes([*weights, *buffers])
        return Held(
            parameters=sum(p.numel() for p in weights),
            trained=sum(p.numel() for p in own),
            largest=max((p.numel() for p in frozen if p.ndim >= 2), default=0),
            linear=sum(p.numel() for p in frozen if p.ndim >= 2),
            weights=held,
            masters=nbytes(own) if self.masters else 0,
            gradients=sum(
                nbytes([p]) if self.masters else self.gradients.get(id(p), 0) for p in own
            ),
            optimizer=sum(self.states.get(id(p), 0) for p in own),
            reference=held if self.reference else 0,
        )


def _outside(model: Any, layers: Sequence[nn.Module]) -> list[Tensor]:
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return [p for p in model.parameters() if id(p) not in inside]


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Context without what libraries say of a model that is only tried."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
