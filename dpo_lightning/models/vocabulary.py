"""Tokenizers with more tokens than a model has embeddings for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError

log = logging.getLogger(__name__)

_SHOWN = 3
# Of transformers, in a line that is to be typed.
_LOAD = "from_pretrained"


def check_vocabulary(config: Any, tokenizer: Any, *, name: str, random: bool) -> None:
    """Refuses a tokenizer that needs more tokens than a model has, and says which it may not use.

    An added token, such as a pad token, may be more than the model knows, as long as no row has it.

    Args:
        config: The model's config.
        tokenizer: The tokenizer.
        name: The config key and its value, for errors.
        random: True if the weights are random, of any shape that is asked for.
    """
    size = config.get_text_config().vocab_size
    if len(tokenizer) <= size:
        return
    counts = f"{name}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {size}"
    if random:
        raise UserError(
            f"{counts}; give it as many, model.config_overrides.vocab_size={len(tokenizer)}, or "
            "name the tokenizer that belongs to it with model.tokenizer="
        )
    if tokenizer.eos_token_id >= size:
        raise UserError(
            f"{counts}: its end token {tokenizer.eos_token} is not among these; name the tokenizer "
            "that belongs to the model with model.tokenizer="
        )
    more = sorted((id, token) for token, id in tokenizer.get_vocab().items() if id >= size)
    shown = ", ".join(token for _, token in more[:_SHOWN])
    shown += " and others" if len(more) > _SHOWN else ""
    log.info("%s: %s cannot be in a row", counts, shown)


def check_ids(
    groups: Iterable[TokenGroup], config: Any, tokenizer: Any, *, name: str, source: str
) -> None:
    """Refuses rows with tokens that the model has no embeddings for.

    Args:
        groups: The rows.
        config: The model's config.
        tokenizer: The tokenizer that made them.
        name: The config key and its value, for errors.
        source: The model's folder or hub id.
    """
    size = config.get_text_config().vocab_size
    if max(tokenizer.get_vocab().values(), default=0) < size:
        return
    for group in groups:
        for ids in (group.prompt, *group.responses):
            if ids.max() < size:
                continue
            token = tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise UserError(
                f"{name}: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {size}"
                f", and {group.source} has the token {token}; name the tokenizer that belongs to "
                f"the model with model.tokenizer=, or make room for them with "
                f"{_resize(source, tokenizer.name_or_path)}"
            )


def _resize(source: str, tokenizer: str) -> str:
    """A line that writes the model with more embeddings, and what to name then."""
    folder = (
        f"{source.rstrip('/')}-resized" if Path(source).is_dir() else f"{Path(source).name}-resized"
    )
    return (
        '`python -c "from transformers import AutoModelForCausalLM as A, AutoTokenizer as T; '
        f"m = A.{_LOAD}('{source}', dtype='auto'); t = T.{_LOAD}('{tokenizer}'); "
        f"m.resize_token_embeddings(len(t)); m.save_pretrained('{folder}'); "
        f"t.save_pretrained('{folder}')\"`, then model.pretrained={folder}"
    )
