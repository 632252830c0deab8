"""A model's shape and a training, for tests of what fits into memory."""

from typing import Any

from transformers import LlamaConfig

from dpo_lightning.memory.footprint import Training, shape_of_model
from dpo_lightning.models.loading import meta_model

LLAMA_1B = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip


SHAPE = shape_of_model(meta_model(LLAMA_1B))


def training(**changes) -> Training:
    values: dict[str, Any] = {
        "weight_bytes": 4, "compute_bytes": 2, "masters": True, "autocast": False,
        "optimizer": "adamw", "trained": None, "four_bit": False, "live_reference": False,
        "shards": 1, "buckets": False, "whole_gradients": False, "tokens": 0,
        "checkpointing": False, "keys": 0,
        "head_scores": 1 << 25, "head_kept": 1 << 27,
    }  # fmt: skip
    return Training(**(values | changes))
