"""Entries of a model's config that decide its numbers, beside its weights.

The same weights with other rotary frequencies, another window or epsilon are another model. Names,
versions and defaults for sampling are not: a folder that was moved or saved anew is the same model.
What is not known here counts.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

_ABOUT = frozenset(
    {
        # Where it comes from, and who wrote it.
        *("_name_or_path", "name_or_path", "_commit_hash", "architectures", "auto_map"),
        *("model_name", "tokenizer_class", "processor_class", "custom_pipelines", "license"),
        # The type that weights are stored in: the one that they are loaded in is asked for.
        *("dtype", "torch_dtype"),
        # What a forward pass gives back, and labels of other tasks.
        *("use_cache", "return_dict", "output_hidden_states", "output_attentions"),
        *("output_router_logits", "id2label", "label2id", "num_labels", "problem_type"),
        *("finetuning_task", "task_specific_params", "chunk_size_feed_forward"),
        # Special tokens and sampling.
        *("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
        *("suppress_tokens", "begin_suppress_tokens", "generation_config"),
        # The start of weights that were never trained, and speed.
        *("initializer_range", "initializer_factor", "gradient_checkpointing", "torchscript"),
    }
)
_VERSION = re.compile(r"(^|_|\.)version$|^unsloth_|^transformers\.js")
# Noise of training, which is always off here. A classifier's head is none of ours.
_NOISE = re.compile(r"dropout|pdrop$|layerdrop|drop_path|jitter")


def is_noise(name: str, value: Any) -> bool:
    """True if an entry is a share of what is dropped, or a width of noise, while training."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and _NOISE.search(name) is not None


def without_dropout(config: Any) -> Any:
    """A copy of a config with every dropout and noise at 0, functional dropout included."""
    config = copy.deepcopy(config)
    _silence(config)
    return config


def _silence(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _silence(value)
        elif is_noise(name, value):
            # Some families take nothing but the type of the default.
            setattr(config, name, type(value)(0))


def config_numbers(config: Any) -> dict[str, Any]:
    """The entries that decide numbers, by their names; those of a config inside by dotted ones.

    Args:
        config: A transformers config.
    """
    found = _entries(config.to_dict())
    # What the family would choose by itself has no name here.
    named = getattr(config, "_attn_implementation", None)
    if named is not None:
        found["_attn_implementation"] = str(named)
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def _entries(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in _ABOUT or _VERSION.search(name) or is_noise(name, value):
            continue
        if isinstance(value, Mapping) and "model_type" in value:
            found |= _entries(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def numbers_hash(config: Any) -> str:
    """A hash of :func:`config_numbers`; 32 hexadecimal digits."""
    text = json.dumps(config_numbers(config), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
