"""The try of a model before it is trained: causal, finite, and given ids alone."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from dpo_lightning.models.layers import largest, layer_values
from dpo_lightning.models.probe import why_unfit
from tests.support.models import _LLAMA_LIKE, FAMILIES, PADDED_ONLY, VOCABULARY, make_model

_BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt-neox", "gemma2", "mamba", "bloom"])
def test_decoders_are_fit_and_stay_in_their_mode(family):
    assert family in FAMILIES | PADDED_ONLY
    model = make_model(family)
    assert why_unfit(model) is None
    assert model.training


def test_an_encoder_that_says_so_is_none_to_train():
    model = AutoModelForCausalLM.from_config(transformers.RobertaConfig(**_BERT))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # no score tells it
    assert "encoder" in str(why_unfit(model))


def test_an_encoder_is_found_by_its_scores():
    torch.manual_seed(0)
    config = transformers.BertGenerationConfig(**_BERT)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    assert "depends on those behind it" in str(why_unfit(model))
    config = transformers.BertGenerationConfig(**_BERT, is_decoder=True)
    assert why_unfit(AutoModelForCausalLM.from_config(config)) is None


def test_scores_that_are_no_numbers_and_a_pass_that_fails():
    model = make_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    assert "no numbers" in str(why_unfit(model))
    model.model.norm.weight = torch.nn.Parameter(torch.ones(3))
    assert "forward pass of token ids fails" in str(why_unfit(model))


def test_entries_of_layers():
    values = _LLAMA_LIKE | {"head_dim": 8}
    config = transformers.Gemma4TextConfig(
        **values, per_layer_config={1: {"head_dim": 16}}, hidden_size_per_layer_input=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    assert layer_values(config, "head_dim") == [8, 16]
    plain = transformers.LlamaConfig(**_LLAMA_LIKE)
    assert largest(plain, "n_embd", "hidden_size") == 32
    assert largest(plain, "sliding_window") is None
