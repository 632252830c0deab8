"""Entries of a model's config that decide its numbers, and those that do not."""

import pytest
from transformers import Gemma3Config, LlamaConfig, MixtralConfig, MptConfig

from dpo_lightning.models.config_numbers import config_numbers, numbers_hash, without_dropout
from dpo_lightning.models.loading import meta_model
from tests.support.models import tiny_llama_config

ROPE = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": ROPE | {"beta_fast": 16.0}},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"num_attention_heads": 4},
        {"head_dim": 4},
        {"max_position_embeddings": 64},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"sliding_window": 5},
        {"final_logit_softcapping": 30.0},
        {"logit_scale": 0.5},
        {"an_entry_of_next_year": 1},
        {"attn_implementation": "eager"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ],
)
def test_what_changes_numbers_changes_the_hash(changes):
    assert numbers_hash(tiny_llama_config(**changes)) != numbers_hash(tiny_llama_config())


def test_each_number_of_a_rope_counts():
    hashes = {
        numbers_hash(tiny_llama_config(rope_parameters=ROPE | more))
        for more in ({}, {"factor": 2.0}, {"rope_theta": 5e5}, {"beta_fast": 16.0})
    }
    assert len(hashes) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "4.0.0"},
        {"_name_or_path": "owner/name"},
        {"architectures": ["Other"]},
        {"dtype": "bfloat16"},
        {"use_cache": False},
        {"eos_token_id": 7},
        {"id2label": {0: "a", 1: "b"}},
        {"initializer_range": 0.5},
        {"unsloth_version": "1"},
        {"attention_dropout": 0.3},
    ],
)
def test_what_names_or_dates_a_model_does_not(changes):
    assert numbers_hash(tiny_llama_config(**changes)) == numbers_hash(tiny_llama_config())


def test_a_config_inside_counts_by_dotted_names():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 50, "sliding_window": 9}
    found = config_numbers(Gemma3Config(text_config=text))
    assert found["text_config.sliding_window"] == 9
    assert "text_config.attention_dropout" not in found
    assert not [name for name in found if name.endswith(("dtype", "transformers_version"))]


def test_making_a_model_leaves_its_config_as_it_was():
    config = tiny_llama_config()
    before = config_numbers(config)
    meta_model(config)
    assert config_numbers(config) == before


def test_noise_is_off_in_configs_inside_too():
    """Functional dropout of a text config, of MPT's attention, and the jitter of routers."""
    text = {"hidden_size": 16, "num_hidden_layers": 1, "attention_dropout": 0.1}
    assert without_dropout(Gemma3Config(text_config=text)).text_config.attention_dropout == 0
    config = MptConfig()
    config.attn_config.attn_pdrop = 1
    assert without_dropout(config).attn_config.attn_pdrop == 0
    assert config.attn_config.attn_pdrop == 1
    assert without_dropout(MixtralConfig(router_jitter_noise=0.01)).router_jitter_noise == 0
    assert without_dropout(LlamaConfig(attention_dropout=0.2)).attention_dropout == 0
