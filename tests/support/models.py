"""Small models and tokenizers."""

from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM


def byte_tokenizer(*, eos: bool = True, pad: bool = True) -> Any:
    """A tokenizer of single bytes: every text is tokens, none is unknown."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<s>", "</s>", "<pad>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = {"bos_token": "<s>"} | ({"eos_token": "</s>"} if eos else {})
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **named, **({"pad_token": "<pad>"} if pad else {})
    )


def tiny_llama_config(**changes: Any) -> Any:
    from transformers import LlamaConfig

    values = {
        "vocab_size": 259,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaConfig(**(values | changes))


VOCABULARY = 97


# Two key heads for four query heads wherever the family has them; windows shorter than the texts.
_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


_SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _LLAMA_LIKE),
    "qwen2": ("Qwen2Config", _LLAMA_LIKE),
    "qwen3": ("Qwen3Config", _LLAMA_LIKE | {"head_dim": 8}),
    "mistral": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": None}),
    "mistral-window": ("MistralConfig", _LLAMA_LIKE | {"sliding_window": 5}),
    "gemma3-text": ("Gemma3TextConfig", _LLAMA_LIKE | {"head_dim": 8, "sliding_window": 5}),
    "gemma3-capped": (
        "Gemma3TextConfig",
        _LLAMA_LIKE | {"head_dim": 8, "final_logit_softcapping": 0.5},
    ),
    "gpt2": ("GPT2Config", {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}),
    "gpt-neox": (
        "GPTNeoXConfig",
        _SMALL | {"num_attention_heads": 4, "intermediate_size": 64},
    ),
    "opt": (
        "OPTConfig",
        _SMALL
        | {"num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 16, "pad_token_id": 1},
    ),
    "phi3": ("Phi3Config", _LLAMA_LIKE),
    "olmo2": ("Olmo2Config", _LLAMA_LIKE),
    "cohere": ("CohereConfig", _LLAMA_LIKE | {"logit_scale": 0.3}),
    "granite": ("GraniteConfig", _LLAMA_LIKE | {"logits_scaling": 3.0}),
}


PADDED_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    "falcon": ("FalconConfig", _SMALL | {"num_attention_heads": 4}),
    "gpt-oss": (
        "GptOssConfig",
        _LLAMA_LIKE | {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "gemma2": ("Gemma2Config", _LLAMA_LIKE | {"head_dim": 8}),
    "mamba": ("MambaConfig", _SMALL),
}


def make_model(family: str, seed: int = 0):
    """A tiny random model with weights large enough that every mask matters."""
    from dpo_lightning.models.config_numbers import without_dropout

    name, values = (FAMILIES | PADDED_ONLY)[family]
    torch.manual_seed(seed)
    config = without_dropout(getattr(transformers, name)(**values))
    model = AutoModelForCausalLM.from_config(config).float().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model
