"""LoRA adapters from folders or the hub: what their config asks for, and their weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dpo_lightning.errors import UserError
from dpo_lightning.models.loading import load_error

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# What decides an adapter's function, beside its weights.
_FUNCTION = (
    *("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "lora_bias"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "modules_to_save"),
)
# Says where an adapter comes from, or is another's to set here (dropout, initial values).
_ELSEWHERE = (
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode"),
    *("peft_type", "task_type", "lora_dropout", "init_lora_weights", "runtime_config"),
)
# Initial values that took something out of the base weights, which only PEFT's own file of the
# initial adapter could give back.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterFile:
    """A LoRA adapter as it was stored.

    Attributes:
        name: The config key and its value, for errors.
        settings: Arguments of PEFT's ``LoraConfig`` that decide its function.
        weights: Name of each tensor in PEFT's format, and the tensor.
        base: Name of the model that it says it was trained on.
        dropout: Dropout that it was trained with.
    """

    name: str
    settings: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    base: str | None
    dropout: float

    def hash(self) -> str:
        """A hash of all that decides the adapter's function; 32 hexadecimal digits."""
        text = json.dumps(self.settings, sort_keys=True)
        digest = hashlib.blake2b(text.encode(), digest_size=16)
        for name, tensor in sorted(self.weights.items()):
            data: Any = tensor.contiguous()
            digest.update(f"{name}{tuple(data.shape)}{data.dtype}".encode())
            digest.update(data.flatten().view(torch.uint8).numpy())
        return digest.hexdigest()


def read_adapter(source: str, *, key: str, revision: str | None = None) -> AdapterFile:
    """Reads a LoRA adapter, safetensors only.

    Args:
        source: A folder or a hub id.
        key: The config key that named it, for errors.
        revision: Revision on the hub.

    Raises:
        UserError: If there is none, it is of another kind than LoRA, or it does what would change
            the base model, the head, or cannot be switched off.
    """
    name = f"{key}={source}"
    try:
        config = json.loads(_file(source, CONFIG_FILE, revision).read_text())
        weights = load_file(_file(source, WEIGHTS_FILE, revision))
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{name}: a damaged file ({' '.join(str(error).split())[:200]})") from error
    except Exception as error:
        raise load_error(f"{name}: no adapter in safetensors", error, remedy=f"{key}=") from error
    if not isinstance(config, dict):
        raise UserError(f"{name}: its {CONFIG_FILE} is no mapping")
    return AdapterFile(
        name=name,
        settings=_settings(name, config),
        weights=weights,
        base=config.get("base_model_name_or_path"),
        dropout=float(config.get("lora_dropout") or 0.0),
    )


def _file(source: str, name: str, revision: str | None) -> Path:
    if Path(source).is_dir():
        return Path(source) / name
    return Path(hf_hub_download(source, name, revision=revision))


def _settings(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are understood; whatever else is set is refused, not left out."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{name}: an adapter of kind {kind}; peft=lora takes LORA")
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(f"{name}: an adapter for {task}; needs one for CAUSAL_LM")
    initial = config.get("init_lora_weights")
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_THE_BASE):
        raise UserError(
            f"{name}: init_lora_weights={initial} belongs to changed base weights; convert it to "
            "plain LoRA (PEFT: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    defaults = _defaults()
    for field, value in config.items():
        if field in _FUNCTION or field in _ELSEWHERE:
            continue
        if value and value != "none" and value != defaults.get(field):
            why = " changes the base model's own biases" if field == "bias" else " is not supported"
            raise UserError(f"{name}: its {field}={value}{why}; name an adapter without it")
    found = {field: config[field] for field in _FUNCTION if config.get(field) is not None}
    # PEFT keeps names as a set and writes them in any order.
    return {k: sorted(v) if isinstance(v, list) else v for k, v in found.items()}


def _defaults() -> dict[str, Any]:
    return {
        field.name: field.default
        for field in dataclasses.fields(LoraConfig)
        if field.default is not dataclasses.MISSING
    }
