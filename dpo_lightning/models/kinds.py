"""Kinds of models that cannot be trained here, told by their config; each with what to do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dpo_lightning.errors import UserError

_TEXT = "name a causal language model (such as Llama, Qwen or Gemma)"
# Parts of a config that read something else than text.
_SENSES = ("vision_config", "audio_config", "speech_config", "vq_config")


def check_kind(config: Any, *, name: str, weights: bool) -> None:
    """Refuses a config of a model that cannot be trained.

    Args:
        config: A transformers config.
        name: The config key and its value, for errors.
        weights: True if weights are loaded for it.

    Raises:
        UserError: With the kind and the remedy.
    """
    for fault in _faults(config, weights=weights):
        raise UserError(f"{name}: {fault}")


def _faults(config: Any, *, weights: bool) -> Iterator[str]:
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        yield f"{kind} is an encoder-decoder model, which is not trained here; {_TEXT}"
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        sense = next((part for part in _SENSES if getattr(config, part, None) is not None), None)
        if sense is None:
            yield f"{kind} is no causal language model; {_TEXT}"
        else:
            yield (
                f"{kind} is a model of text and {sense.partition('_')[0]}, which is not trained "
                f"here; {_TEXT}, such as the text model that it was made from"
            )
    text = config.get_text_config()
    for entry in ("num_hidden_layers", "hidden_size", "vocab_size"):
        value = None
        # Where layers differ in it there is none of all.
        with contextlib.suppress(RuntimeError):
            value = getattr(text, entry, None)
        if isinstance(value, int) and value < 1:
            yield f"its config.json has {entry}={value}, which has to be 1 or more; fix it there"
    stored = getattr(config, "quantization_config", None)
    if weights and stored is not None:
        yield _quantized(stored)
    for rope in rope_types(config):
        if rope not in (*ROPE_INIT_FUNCTIONS, "default"):
            known = ", ".join(sorted(("default", *ROPE_INIT_FUNCTIONS)))
            yield (
                f"its config.json has the rope_type {rope}, which the installed transformers does "
                f"not know (it knows {known}); update transformers, or name another model"
            )


def rope_types(config: Any) -> Iterator[str]:
    """Types of rotary embeddings that a config names, those of each kind of layer."""
    yield from _types(getattr(config.get_text_config(), "rope_parameters", None))


def _types(parameters: Any) -> Iterator[str]:
    if isinstance(parameters, Mapping):
        if isinstance(parameters.get("rope_type"), str):
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _types(value)


def _quantized(stored: Any) -> str:
    values = stored if isinstance(stored, Mapping) else stored.to_dict()
    method = str(values.get("quant_method") or "an unnamed method")
    method = method.rpartition(".")[2].lower()
    bits = values.get("bits") or values.get("w_bit")
    if method == "bitsandbytes":
        bits = 8 if values.get("load_in_8bit") else 4
    held = f"in {bits} bits by {method}" if bits else f"quantized by {method}"
    return (
        f"its weights are stored {held}, which loses what training would change; name the "
        "unquantized model that it was made from (peft=qlora then holds its frozen weights in 4 "
        "bits)"
    )


def build_error(config: Any, error: Exception) -> UserError:
    """Turns what a family raises about its config into one line."""
    text = " ".join(str(error).split())[:200]
    return UserError(
        f"model: no {config.model_type} model can be made by its config.json "
        f"({type(error).__name__}: {text}); fix that entry, or name another model"
    )
