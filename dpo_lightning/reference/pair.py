"""Policy and reference beside each other: loaded, adapted, and scored on one path."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from dpo_lightning.errors import UserError
from dpo_lightning.models.adapter_files import AdapterFile
from dpo_lightning.models.adapters import Adapters, LoraSettings
from dpo_lightning.models.config_numbers import numbers_hash, without_dropout
from dpo_lightning.models.fetching import fetch_weights
from dpo_lightning.models.kernel import HeadShape
from dpo_lightning.models.kinds import check_kind
from dpo_lightning.models.loading import (
    check_same_vocabulary,
    load_config,
    load_model,
    max_positions,
    meta_model,
    random_model,
    weights_hash,
)
from dpo_lightning.models.probe import choose_path, why_unfit
from dpo_lightning.models.quantization import keep_trainable
from dpo_lightning.models.rope import RopeLengths
from dpo_lightning.models.scoring import Scorer, ScoringPath
from dpo_lightning.models.source import ModelSource
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.reference.kinds import LiveReference, NoReference, Reference
from dpo_lightning.reference.moving import Movement

log = logging.getLogger(__name__)

FromFirst = Callable[[Callable[[], Any]], Any]
"""Calls a function on rank 0, and gives every rank what it gave."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """Settings of the adapters beside frozen weights.

    Attributes:
        start: A new adapter, or a stored one to go on with.
        reference: What the reference has beside the base model: a stored adapter, or nothing.
        dropout: Of the trained adapter's input.
    """

    start: LoraSettings | AdapterFile
    reference: AdapterFile | None
    dropout: float


@dataclass(frozen=True, slots=True)
class ReferenceSettings:
    """Settings of the reference.

    Attributes:
        kind: ``auto`` (``cached`` where the loss uses one), ``cached``, ``live`` or ``none``.
        pretrained: Folder or hub id of another reference; None is the policy's start.
        revision: Its revision on the hub.
        needed: True if the loss uses a reference.
        movement: How it follows the policy, which makes it a live one; None: it stays as it is.
    """

    kind: str
    pretrained: str | None
    revision: str | None
    needed: bool
    movement: Movement | None = None

    @property
    def is_used(self) -> bool:
        """False where the loss compares with nothing, or is to."""
        return self.kind != "none" and self.needed

    @property
    def is_live(self) -> bool:
        """True if the loss gets it from a model in memory."""
        return self.is_used and (self.kind == "live" or self.movement is not None)


@dataclass(frozen=True, slots=True)
class Models:
    """The policy, its reference, and the scorer of both.

    Attributes:
        policy: The model to train.
        reference: Where the loss gets the reference from; None: from the cache, which the caller
            has to ask.
        scorer: Scores both.
        starts_from_reference: True if the policy's first weights are the reference's.
        weights: Hash of the policy's first weights.
        reference_weights: Hash of the reference's.
        reference_config: Hash of what its config says of its numbers.
        make_reference: Makes the frozen reference as it starts, ready for the scorer; without one
            in the loss, the policy as it starts.
        live: True if the reference is to be held in memory, where ``reference`` is not made yet.
        adapters: What is trained, where the policy's own weights are frozen; its reference is then
            in the same model.
        movement: How the reference of the loss moves away from its start; None: it stays there.
    """

    policy: Any
    reference: Reference | None
    scorer: Scorer
    starts_from_reference: bool
    weights: str
    reference_weights: str
    reference_config: str
    make_reference: Callable[[], Any]
    live: bool = False
    adapters: Adapters | None = None
    movement: Movement | None = None

    def live_model(self) -> Any:
        """The model of a live reference; one that moves beside adapters is a copy of theirs."""
        if self.movement is not None and self.adapters is not None:
            return self.adapters.copy
        return self.make_reference()

    @property
    def start_in_memory(self) -> bool:
        """True if the reference as it starts is held anyway, and need not be loaded."""
        moves_beside = self.movement is not None and self.adapters is not None
        return isinstance(self.reference, LiveReference) or moves_beside

    @contextlib.contextmanager
    def reference_model(self, device: torch.device) -> Iterator[Any]:
        """The weights of the reference as it starts on a device, as long as they are needed."""
        if isinstance(self.reference, LiveReference):
            yield self.reference.model
        else:
            yield self.make_reference().to(device)


def load_models(
    model: ModelSource,
    wanted: ReferenceSettings,
    *,
    seed: int,
    from_first: FromFirst | None = None,
    adapters: AdapterSettings | None = None,
    show: ShowPhase = unshown,
) -> Models:
    """Loads the policy and its reference and chooses the path on which both are scored.

    Args:
        model: The policy's source.
        wanted: Which reference.
        seed: Of a random model, and of a new adapter.
        from_first: Gives every rank what a function gives on rank 0, where ranks are to share the
            models: rank 0 then has them whole, on the CPU, and the others have models without
            weights. None: each process has its own.
        adapters: What is trained beside frozen weights; None trains all.
        show: Shows how far a download is.
    """
    loader = _Loader(model, wanted, seed=seed, from_first=from_first)
    loader.fetch(show)
    policy, scorer, hashes = loader.load_policy()
    own: Adapters | None = None
    starts_alike = wanted.pretrained is None
    if adapters is not None:
        own = loader.adapt(policy, adapters)
        hashes = _with_adapters(hashes, adapters, other=wanted.pretrained is not None)
        starts_alike = starts_alike and hashes.policy == hashes.reference

    def make_reference() -> Any:
        if wanted.pretrained is None and own is not None:
            return own.reference
        return loader.load_reference(scorer)

    models = Models(
        policy=policy,
        reference=None if wanted.is_used else NoReference(),
        scorer=scorer,
        starts_from_reference=wanted.is_used and starts_alike,
        weights=hashes.policy,
        reference_weights=hashes.reference,
        reference_config=hashes.reference_config,
        make_reference=make_reference,
        live=wanted.is_live,
        adapters=own,
        movement=wanted.movement if wanted.is_used else None,
    )
    if models.live and from_first is None:
        models = replace(models, reference=LiveReference(models.live_model(), scorer))
    return models


@dataclass(frozen=True, slots=True)
class _Hashes:
    """Hashes of the first weights, and of the reference's config."""

    policy: str
    reference: str
    reference_config: str


_Shared = tuple[ScoringPath, RopeLengths, dict[HeadShape, int], str | None, _Hashes]
"""What rank 0 tells the others of the policy: facts of its scorer, why it is padded, hashes."""


class _Loader:
    """Loads models here, or on rank 0 for all ranks.

    Args:
        model: The policy's source.
        wanted: Which reference.
        seed: Of a random model, and of a new adapter.
        from_first: As :func:`load_models` takes it.
    """

    def __init__(
        self,
        model: ModelSource,
        wanted: ReferenceSettings,
        *,
        seed: int,
        from_first: FromFirst | None,
    ) -> None:
        self._model = model
        self._wanted = wanted
        self._seed = seed
        self._from_first = from_first

    def fetch(self, show: ShowPhase) -> None:
        """Downloads what is to be loaded, if it is not there."""
        model, wanted = self._model, self._wanted

        def fetch() -> None:
            if not model.random:
                fetch_weights(model.source, model.revision, show)
            if wanted.pretrained is not None:
                fetch_weights(wanted.pretrained, wanted.revision, show)

        self._ask(fetch)

    def load_policy(self) -> tuple[Any, Scorer, _Hashes]:
        """The policy, the scorer that prepared it, and the hashes of both models."""
        model = self._model
        loaded: list[tuple[Any, Scorer]] = []

        def load() -> _Shared:
            policy = _load_policy(model, self._seed)
            if model.quantization is None:
                _check_fit(policy, name=f"{model.key}={model.source}")
            scorer, reason = choose_path(policy, max_length=model.max_length)
            weights = weights_hash(policy)
            hashes = _Hashes(weights, weights, numbers_hash(model.config))
            if self._wanted.pretrained is not None:
                # Loaded once more when it is used; in between it takes no memory.
                other = self._load_other()
                hashes = _Hashes(weights, weights_hash(other.model), other.numbers)
                scorer.release(policy)
                scorer = _of_both(scorer, other.scorer)
                scorer.prepare(policy)
                reason = reason or (other.reason and f"the reference's: {other.reason}")
            loaded.append((policy, scorer))
            return scorer.path, scorer.lengths, scorer.heads, reason, hashes

        path, lengths, heads, reason, hashes = self._ask(load)
        if loaded:
            [(policy, scorer)] = loaded
        else:
            scorer = Scorer(path, lengths, heads)
            policy = meta_model(without_dropout(model.config), dtype=model.dtype)
            scorer.prepare(policy)
        if reason is not None:
            log.info("this model cannot share prompts (%s): batches are padded", reason)
        return policy, scorer, hashes

    def adapt(self, policy: Any, adapters: AdapterSettings) -> Adapters:
        """The policy's own weights frozen, and adapters beside them."""
        return Adapters(
            policy,
            adapters.start,
            reference=adapters.reference,
            dropout=adapters.dropout,
            seed=self._seed,
            load_base=lambda: _load_policy(self._model, self._seed),
            moves=self._wanted.is_used and self._wanted.movement is not None,
        )

    def load_reference(self, scorer: Scorer) -> Any:
        """The frozen reference, prepared by the scorer."""
        loaded: list[Any] = []

        def load() -> Any:
            loaded.append(self._load_reference())
            return loaded[0].config

        config = self._ask(load)
        frozen = loaded[0] if loaded else meta_model(config, dtype=self._model.dtype)
        scorer.prepare(frozen)
        return frozen.requires_grad_(False).eval()

    def _load_reference(self) -> Any:
        if self._wanted.pretrained is None:
            return _load_policy(self._model, self._seed)
        return self._load_other().model

    def _load_other(self) -> _Other:
        """The other model that is the reference."""
        assert self._wanted.pretrained is not None
        return _other_reference(self._model, self._wanted.pretrained, self._wanted.revision)

    def _ask(self, function: Callable[[], Any]) -> Any:
        return function() if self._from_first is None else self._from_first(function)


def _with_adapters(hashes: _Hashes, adapters: AdapterSettings, *, other: bool) -> _Hashes:
    """The hashes with what is beside the base model.

    The base was hashed before, so that a reference without an adapter is that of a run of all
    weights.

    Args:
        hashes: Of models without adapters.
        adapters: What is trained, and what the reference has.
        other: True if the reference is another model.
    """
    start = adapters.start
    own = _with_adapter(hashes.policy, start if isinstance(start, AdapterFile) else None)
    if other:
        return replace(hashes, policy=own)
    return replace(hashes, policy=own, reference=_with_adapter(hashes.policy, adapters.reference))


def _with_adapter(base: str, adapter: AdapterFile | None) -> str:
    """A hash of a base model and what is beside it."""
    if adapter is None:
        return base
    return hashlib.blake2b(f"{base}{adapter.hash()}".encode(), digest_size=16).hexdigest()


def _check_fit(model: Any, *, name: str) -> None:
    """Refuses a model that gives no scores of a line of ids, or looks ahead in it."""
    reason = why_unfit(model)
    if reason is not None:
        raise UserError(
            f"{name}: {reason}; name a causal language model (such as Llama, Qwen or Gemma)"
        )


def _load_policy(model: ModelSource, seed: int) -> Any:
    if model.random:
        return random_model(model.config, dtype=model.dtype, seed=seed)
    policy = load_model(
        model.source,
        model.config,
        key=model.key,
        dtype=model.dtype,
        revision=model.revision,
        quantization=model.quantization,
    )
    return policy if model.quantization is None else keep_trainable(policy)


@dataclass(frozen=True, slots=True)
class _Other:
    """Another model as the reference, as transformers made it.

    Attributes:
        model: The model.
        numbers: Hash of its config.
        scorer: What it could be scored by,
        reason: and why not on the flat path.
    """

    model: Any
    numbers: str
    scorer: Scorer
    reason: str | None


def _of_both(policy: Scorer, reference: Scorer) -> Scorer:
    """A scorer of two models: on the flat path where both can take it."""
    flat = policy.path == reference.path == "flat"
    # Of a layer that both have in the same way there is one.
    heads = Counter(policy.heads) | Counter(reference.heads)
    return Scorer("flat" if flat else "padded", policy.lengths | reference.lengths, heads)


def _other_reference(model: ModelSource, source: str, revision: str | None) -> _Other:
    config = load_config(source, key="reference.pretrained", revision=revision)
    check_kind(config, name=f"reference.pretrained={source}", weights=True)
    check_same_vocabulary(model.config, config, model.tokenizer, source=source)
    positions = max_positions(config)
    if positions is not None and positions < model.max_length:
        raise UserError(
            f"reference.pretrained={source}: it has {positions} positions, fewer than "
            f"data.max_length={model.max_length}; lower data.max_length="
        )
    frozen = load_model(
        source, config, key="reference.pretrained", dtype=model.dtype, revision=revision
    )
    _check_fit(frozen, name=f"reference.pretrained={source}")
    scorer, reason = choose_path(frozen, max_length=model.max_length)
    scorer.release(frozen)
    return _Other(frozen, numbers_hash(config), scorer, reason)
