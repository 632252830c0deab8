"""Frozen weights in 4 bits, by bitsandbytes (QLoRA, Dettmers et al., 2305.14314)."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from dpo_lightning.errors import UserError

_KEY = "peft.quantization=nf4"


@dataclass(frozen=True, slots=True)
class Quantized:
    """Way in which linear layers are held in fewer bits.

    Attributes:
        config: transformers' config of it.
        device: Kind of device that weights are quantized on as they are loaded, and stay on.
    """

    config: Any
    device: torch.device

    def arguments(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained``; a GPU is the one that this process has taken."""
        own = torch.cuda.current_device() if self.device.type == "cuda" else self.device.type
        return {"quantization_config": self.config, "device_map": {"": own}}


def nf4_config(compute: torch.dtype, device: torch.device) -> Quantized:
    """Way of loading weights in NormalFloat4 by transformers, block scales quantized too.

    Args:
        compute: Type of the products.
        device: Device on which they will be made.

    Raises:
        UserError: If bitsandbytes cannot do that there.
    """
    _try(device, compute)
    config: Any = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return Quantized(config, device)


def keep_trainable(model: Any) -> Any:
    """Keeps a quantized model's weights as they are; in place.

    On some CPUs bitsandbytes lays weights out anew at the first forward pass in eval mode, for good
    and without a way back to training.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    return model


def _try(device: torch.device, compute: torch.dtype) -> None:
    try:
        layers: Any = importlib.import_module("bitsandbytes.nn")
        layer = layers.Linear4bit(
            64, 64, bias=False, compute_dtype=compute, compress_statistics=True, quant_type="nf4"
        ).to(device)
        states = torch.ones(2, 64, dtype=compute, device=device, requires_grad=True)
        layer(states).sum().backward()
        sound = bool(torch.isfinite(states.grad).all()) if states.grad is not None else False
    except Exception as error:  # whatever its kernels and their loading raise
        text = " ".join(str(error).split())[:200]
        raise UserError(
            f"{_KEY}: bitsandbytes does not run on {device} ({type(error).__name__}: {text}); use "
            "peft.quantization=none"
        ) from error
    if not sound:
        raise UserError(f"{_KEY}: bitsandbytes gives no gradients on {device}; use none")
