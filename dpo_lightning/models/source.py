"""Which tokenizer, policy and reference an experiment uses, checked before anything is trained."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.tokens import PLAIN_CHAT_TEMPLATE
from dpo_lightning.errors import UserError
from dpo_lightning.models.adapter_files import AdapterFile
from dpo_lightning.models.adapters import Adapters, LoraSettings
from dpo_lightning.models.loading import (
    adopt_special_tokens,
    check_same_vocabulary,
    check_vocabulary,
    load_config,
    load_model,
    load_tokenizer,
    max_positions,
    meta_model,
    random_model,
    weights_hash,
    without_dropout,
)
from dpo_lightning.models.probe import choose_path
from dpo_lightning.models.quantization import keep_trainable
from dpo_lightning.models.scoring import Scorer, ScoringPath
from dpo_lightning.reference.fill import LiveReference, NoReference, Reference

log = logging.getLogger(__name__)

# Longest prompt + response where nothing is said and the model would take more.
_DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The ``model`` group, resolved.

    Attributes:
        name: What the model is called in headers and cards.
        key: The config key that named it, for errors.
        source: Folder or hub id of weights, or of a config when ``random``.
        random: Whether the weights are random.
        bundled: Whether this is the bundled tiny model.
        revision: Revision on the hub.
        dtype: Type of the weights.
        tokenizer: The tokenizer.
        config: The model's config as it was loaded.
        max_length: Longest prompt + response, in tokens.
        quantization: How transformers holds linear layers, if in fewer bits.
    """

    name: str
    key: str
    source: str
    random: bool
    bundled: bool
    revision: str | None
    dtype: torch.dtype
    tokenizer: Any
    config: Any
    max_length: int
    quantization: Any = None


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


def load_model_config(
    *,
    pretrained: str | None,
    revision: str | None,
    config: str | None,
    config_overrides: Mapping[str, Any],
) -> Any:
    """The policy's config alone; the arguments are those of :func:`resolve_model`."""
    return load_config(
        config or pretrained or str(BUNDLED_MODEL),
        key="model.config" if config is not None else "model.pretrained",
        revision=revision,
        overrides=config_overrides,
    )


def resolve_model(
    *,
    pretrained: str | None,
    revision: str | None,
    tokenizer: str | None,
    config: str | None,
    config_overrides: Mapping[str, Any],
    dtype: str,
    max_length: int | None,
) -> ModelSource:
    """Loads tokenizer and config, which say early whether model and data can work together.

    Args:
        pretrained: Folder or hub id of weights; None is the bundled model, unless ``config``.
        revision: Revision on the hub.
        tokenizer: Folder or hub id of another tokenizer.
        config: Folder or file of a config for a random model.
        config_overrides: Changes to that config.
        dtype: Name of the weights' type.
        max_length: Longest prompt + response; None is the model's own limit.

    Raises:
        UserError: If they cannot.
    """
    bundled = pretrained is None and config is None
    key = "model.config" if config is not None else "model.pretrained"
    source = config or pretrained or str(BUNDLED_MODEL)
    loaded_config = load_model_config(
        pretrained=pretrained, revision=revision, config=config, config_overrides=config_overrides
    )
    tokenizer_source = tokenizer or (str(Path(source).parent) if Path(source).is_file() else source)
    loaded_tokenizer = load_tokenizer(
        tokenizer_source,
        key="model.tokenizer" if tokenizer else key,
        revision=None if tokenizer else revision,
    )
    if config is not None:
        adopt_special_tokens(loaded_config, loaded_tokenizer)
    check_vocabulary(loaded_config, loaded_tokenizer, key=f"{key}={source}")
    positions = max_positions(loaded_config)
    if max_length is None:
        max_length = min(positions or _DEFAULT_MAX_LENGTH, _DEFAULT_MAX_LENGTH)
    elif positions is not None and max_length > positions:
        raise UserError(
            f"data.max_length={max_length}: the model has {positions} positions; set "
            f"data.max_length={positions} or less"
        )
    return ModelSource(
        name="bundled tiny Llama" if bundled else Path(source).name if config is None else source,
        key=key,
        source=source,
        random=config is not None,
        bundled=bundled,
        revision=revision,
        dtype=getattr(torch, dtype),
        tokenizer=loaded_tokenizer,
        config=loaded_config,
        max_length=max_length,
    )


def set_chat_template(tokenizer: Any, template: str | None, *, needed: bool) -> str | None:
    """Gives the tokenizer the template that was named, or a plain one when it has none.

    Args:
        tokenizer: The tokenizer; what it is given is exported with it.
        template: A Jinja template, or a file that holds one.
        needed: Whether the data has messages.

    Returns:
        A line to say when the plain template is used.
    """
    if template is not None:
        path = Path(template)
        looks_like_path = "{" not in template
        if looks_like_path and not path.is_file():
            raise UserError(f"data.chat_template={template}: no such file")
        tokenizer.chat_template = path.read_text() if looks_like_path else template
        return None
    if not needed or tokenizer.chat_template:
        return None
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    return (
        "the tokenizer has no chat template: messages are written as 'User: ...' and "
        "'Assistant: ...' (plain template, exported with the model; data.chat_template= names "
        "another)"
    )


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
