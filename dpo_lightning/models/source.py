"""Tokenizer and model that the policy starts from, checked before any weights are loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpo_lightning.assets import BUNDLED_MODEL
from dpo_lightning.data.templates import PLAIN_CHAT_TEMPLATE
from dpo_lightning.errors import UserError
from dpo_lightning.models.kinds import check_kind
from dpo_lightning.models.loading import (
    adopt_special_tokens,
    check_has_weights,
    load_config,
    load_tokenizer,
    max_positions,
)
from dpo_lightning.models.quantization import Quantized
from dpo_lightning.models.vocabulary import check_vocabulary

log = logging.getLogger(__name__)

# Longest prompt + response where nothing is said and the model would take more.
_DEFAULT_MAX_LENGTH = 2048


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The ``model`` group, resolved.

    Attributes:
        name: The model's name in headers and cards.
        key: The config key that named it, for errors.
        source: Folder or hub id of weights, or of a config when ``random``.
        random: True if the weights are random.
        bundled: True if this is the bundled tiny model.
        revision: Revision on the hub.
        dtype: Type of the weights.
        tokenizer: The tokenizer.
        config: The model's config as it was loaded.
        max_length: Longest prompt + response, in tokens.
        quantization: Holds linear layers in fewer bits; None holds them as they are.
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
    quantization: Quantized | None = None


def load_model_config(
    *,
    pretrained: str | None,
    revision: str | None,
    config: str | None,
    config_overrides: Mapping[str, Any],
) -> Any:
    """The policy's config alone; the arguments are those of :func:`resolve_model`.

    Raises:
        UserError: If it is none, or of a model that cannot be trained.
    """
    source = config or pretrained or str(BUNDLED_MODEL)
    key = "model.config" if config is not None else "model.pretrained"
    loaded = load_config(source, key=key, revision=revision, overrides=config_overrides)
    if config is not None and hasattr(loaded, "quantization_config"):
        # Random weights are not in few bits.
        del loaded.quantization_config
    check_kind(loaded, name=f"{key}={source}", weights=config is None)
    return loaded


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
    if config is None:
        check_has_weights(source, key=key)
    tokenizer_source = tokenizer or (str(Path(source).parent) if Path(source).is_file() else source)
    loaded_tokenizer = load_tokenizer(
        tokenizer_source,
        key="model.tokenizer" if tokenizer else key,
        revision=None if tokenizer else revision,
    )
    if config is not None:
        adopt_special_tokens(loaded_config, loaded_tokenizer)
    check_vocabulary(
        loaded_config, loaded_tokenizer, name=f"{key}={source}", random=config is not None
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
        max_length=_longest(loaded_config, max_length),
    )


def _longest(config: Any, max_length: int | None) -> int:
    """Longest prompt + response, as set or as the model takes it."""
    positions = max_positions(config)
    if max_length is None:
        return min(positions or _DEFAULT_MAX_LENGTH, _DEFAULT_MAX_LENGTH)
    if positions is not None and max_length > positions:
        raise UserError(
            f"data.max_length={max_length}: the model has {positions} positions; set "
            f"data.max_length={positions} or less"
        )
    return max_length


def set_chat_template(tokenizer: Any, template: str | None, *, needed: bool) -> str | None:
    """Gives the tokenizer the template that was named, or a plain one when it has none.

    Args:
        tokenizer: The tokenizer; what it is given is exported with it.
        template: A Jinja template, or a file that holds one.
        needed: True if the data has messages.

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
