"""Policy and reference beside each other: loaded, adapted, and scored on one path."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dpo_lightning.errors import UserError
from dpo_lightning.models.adapter_files import AdapterFile
from dpo_lightning.models.adapters import Adapters, LoraSettings
from dpo_lightning.models.loading import (
    check_same_vocabulary,
    load_config,
    load_model,
    max_positions,
    meta_model,
    random_model,
    weights_hash,
    without_dropout,
)
from dpo_lightning.models.probe import choose_path
from dpo_lightning.models.quantization import keep_trainable
from dpo_lightning.models.scoring import Scorer, ScoringPath
from dpo_lightning.models.source import ModelSource
from dpo_lightning.reference.kinds import LiveReference, NoReference, Reference

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What is trained beside frozen weights.

    Attributes:
        start: A new adapter, or a stored one to go on with.
        reference: What the reference has beside the base model: a stored adapter, or nothing.
        dropout: Of the trained adapter's input.
    """

    start: LoraSettings | AdapterFile
    reference: AdapterFile | None
    dropout: float


@dataclass(frozen=True, slots=True)
class Models:
    """What is trained, what it is compared with, and how both are scored.

    Attributes:
        policy: The model to train.
        reference: Where the loss gets the reference from; None: from the cache, which the caller
            has to ask.
        scorer: Scores both.
        starts_from_reference: Whether the policy's first weights are the reference's.
        weights: Hash of the policy's first weights.
        reference_weights: Hash of the reference's.
        make_reference: Makes the frozen reference, ready for the scorer; without one in the loss,
            the policy as it starts.
        live: Whether the reference is to be held in memory, where ``reference`` is not made yet.
        adapters: What is trained, where the policy's own weights are frozen; its reference is then
            in the same model.
    """

    policy: Any
    reference: Reference | None
    scorer: Scorer
    starts_from_reference: bool
    weights: str
    reference_weights: str
    make_reference: Callable[[], Any]
    live: bool = False
    adapters: Adapters | None = None

    @contextlib.contextmanager
    def reference_model(self, device: torch.device) -> Iterator[Any]:
        """The reference's weights on a device, for as long as they are needed."""
        if isinstance(self.reference, LiveReference):
            yield self.reference.model
        else:
            yield self.make_reference().to(device)


def load_models(
    model: ModelSource,
    *,
    reference_kind: str,
    reference_pretrained: str | None,
    reference_revision: str | None,
    needs_reference: bool,
    seed: int,
    from_first: Callable[[Callable[[], Any]], Any] | None = None,
    adapters: AdapterSettings | None = None,
) -> Models:
    """Loads the policy and its reference and chooses the path on which both are scored.

    Args:
        model: The policy's source.
        reference_kind: ``auto`` (``cached`` where the loss uses one), ``cached``, ``live`` or
            ``none``.
        reference_pretrained: Folder or hub id of another reference; None is the policy's start.
        reference_revision: Its revision on the hub.
        needs_reference: Whether the loss uses a reference.
        seed: Of a random model, and of a new adapter.
        adapters: What is trained beside frozen weights; None trains all.
        from_first: Gives every rank what a function gives on rank 0, where ranks are to share the
            models: rank 0 then has them whole, on the CPU, and the others have models without
            weights. None: each process has its own.
    """
    policy: Any = None
    scorer: Scorer | None = None

    def load_policy() -> tuple[ScoringPath, str | None, str, str]:
        nonlocal policy, scorer
        policy = _load_policy(model, seed)
        scorer, reason = choose_path(policy, max_length=model.max_length)
        weights = reference_weights = weights_hash(policy)
        if reference_pretrained is not None:
            # Loaded once more when it is used; in between it takes no memory.
            reference_weights = weights_hash(
                _other_reference(model, reference_pretrained, reference_revision)
            )
        return scorer.path, reason, weights, reference_weights

    found = load_policy() if from_first is None else from_first(load_policy)
    path, reason, weights, reference_weights = found
    if policy is None or scorer is None:
        scorer = Scorer(path)
        policy = meta_model(without_dropout(model.config), dtype=model.dtype)
        scorer.prepare(policy)
    if reason is not None:
        log.info("the prompt cannot be shared by this model: %s; batches are padded", reason)
    own: Adapters | None = None
    starts_alike = reference_pretrained is None
    if adapters is not None:
        # Hashed before, so that a reference without an adapter is that of a run of all weights.
        base, start = weights, adapters.start
        own = Adapters(
            policy,
            start,
            reference=adapters.reference,
            dropout=adapters.dropout,
            seed=seed,
            load_base=lambda: _load_policy(model, seed),
        )
        weights = _with_adapter(base, start if isinstance(start, AdapterFile) else None)
        if reference_pretrained is None:
            reference_weights = _with_adapter(base, adapters.reference)
        starts_alike = starts_alike and weights == reference_weights
    is_used = reference_kind != "none" and needs_reference

    def load_reference() -> Any:
        if reference_pretrained is None:
            return _load_policy(model, seed)
        return _other_reference(model, reference_pretrained, reference_revision)

    def make_reference() -> Any:
        assert scorer is not None
        if reference_pretrained is None and own is not None:
            return own.reference
        if from_first is None:
            frozen = load_reference()
        else:
            frozen = None

            def load() -> Any:
                nonlocal frozen
                frozen = load_reference()
                return frozen.config

            config = from_first(load)
            if frozen is None:
                frozen = meta_model(config, dtype=model.dtype)
        scorer.prepare(frozen)
        return frozen.requires_grad_(False).eval()

    live = is_used and reference_kind == "live"
    reference: Reference | None = NoReference()
    if is_used:
        reference = None
        if live and from_first is None:
            reference = LiveReference(make_reference(), scorer)
    return Models(
        policy=policy,
        reference=reference,
        scorer=scorer,
        starts_from_reference=is_used and starts_alike,
        weights=weights,
        reference_weights=reference_weights,
        make_reference=make_reference,
        live=live,
        adapters=own,
    )


def _with_adapter(base: str, adapter: AdapterFile | None) -> str:
    """A hash of a base model and what is beside it."""
    if adapter is None:
        return base
    return hashlib.blake2b(f"{base}{adapter.hash()}".encode(), digest_size=16).hexdigest()


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


def _other_reference(model: ModelSource, source: str, revision: str | None) -> Any:
    config = load_config(source, key="reference.pretrained", revision=revision)
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
    _, reason = choose_path(frozen, max_length=model.max_length)
    if reason is not None:
        log.info("the reference cannot share prompts: %s", reason)
    return frozen
