"""Float32 weights behind a model that computes in bfloat16."""

import copy

import pytest
import torch
from transformers import LlamaForCausalLM

from dpo_lightning.models.master_weights import MasterWeights, cast_frozen, cast_parameters
from tests.support.models import tiny_llama_config

IDS = torch.tensor([[5, 6, 7, 8]])


def make_model(*, tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(tiny_llama_config(tie_word_embeddings=tied))


def loss(model) -> torch.Tensor:
    return model(input_ids=IDS).logits.float().log_softmax(-1)[0, :, 3].sum()


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_micro_batches_add_up_in_float32(tied):
    """Three times the same backward pass: three times its bfloat16 gradient, and no rounding."""
    model = make_model(tied=tied)
    plain = cast_parameters(copy.deepcopy(model), torch.bfloat16)
    loss(plain).backward()
    masters = MasterWeights(model, torch.bfloat16)
    for _ in range(3):
        loss(model).backward()
    expected = [p.grad.float() * 3 for p in plain.parameters()]
    assert len(masters.parameters) == len(expected)
    for master, gradient in zip(masters.parameters, expected, strict=True):
        assert master.grad.dtype == torch.float32
        torch.testing.assert_close(master.grad, gradient, rtol=1e-6, atol=0)
    assert all(p.grad is None for p in model.parameters())
    # The next step begins anew.
    for master in masters.parameters:
        master.grad = None
    loss(model).backward()
    for master, gradient in zip(masters.parameters, expected, strict=True):
        torch.testing.assert_close(master.grad, gradient / 3, rtol=1e-6, atol=0)


def test_small_updates_are_kept_that_bfloat16_would_lose():
    """1 + 1e-4 is 1 in bfloat16; a hundred such steps are not."""
    model = make_model()
    masters = MasterWeights(model, torch.bfloat16)
    norm = next(i for i, p in enumerate(masters.parameters) if p.ndim == 1)
    optimizer = torch.optim.SGD(masters.parameters, lr=1e-4)
    for _ in range(100):
        for master in masters.parameters:
            master.grad = -torch.ones_like(master)
        optimizer.step()
        masters.publish()
    computed = [p for p in model.parameters() if p.requires_grad][norm]
    assert masters.parameters[norm].detach() == pytest.approx(1.01, rel=1e-4)
    assert torch.equal(computed, masters.parameters[norm].bfloat16())
    assert (computed > 1).all()


@pytest.mark.parametrize("tied", [False, True])
def test_names_and_values_are_the_models_and_come_back(tied):
    model = make_model(tied=tied)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masters = MasterWeights(model, torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    held = dict(masters.state_dict())
    assert set(held) == set(before)
    for name, value in held.items():
        assert torch.equal(value, before[name])
    masters.restore()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    loss(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(master.grad is None for master in masters.parameters)


def test_buffers_and_what_a_family_keeps_wide_stay_float32():
    model = make_model()
    model._keep_in_fp32_modules = ["norm"]
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    cast_parameters(model, torch.bfloat16)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].input_layernorm.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, inv_freq)
    assert inv_freq.dtype == torch.float32


def test_frozen_weights_are_rounded_and_not_trained():
    model = make_model()
    model.model.embed_tokens.weight.requires_grad_(False)
    masters = MasterWeights(model, torch.bfloat16)
    assert len(masters.parameters) == len(list(model.parameters())) - 1
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_only_frozen_weights_are_cast_beside_an_adapter():
    """Frozen weights are cast, but no codes of 4 bits, and none that a family keeps in float32."""
    model = make_model()
    model._keep_in_fp32_modules = ["norm"]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layer = model.model.layers[0]
    layer.mlp.up_proj.weight.requires_grad_(True)
    codes = torch.arange(8, dtype=torch.uint8)
    layer.mlp.down_proj.weight = torch.nn.Parameter(codes.clone(), requires_grad=False)
    assert cast_frozen(model, torch.bfloat16) is model
    assert layer.self_attn.q_proj.weight.dtype == torch.bfloat16
    assert layer.mlp.up_proj.weight.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.float32
    assert layer.input_layernorm.weight.dtype == torch.bfloat16
    assert layer.mlp.down_proj.weight.dtype == torch.uint8
    assert torch.equal(layer.mlp.down_proj.weight, codes)
