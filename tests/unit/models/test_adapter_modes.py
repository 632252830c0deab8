"""The reference inside an adapted policy is in eval mode, whatever the policy is in."""

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dpo_lightning.models.adapters import Adapters, LoraSettings

IDS = torch.tensor([[3, 4, 5, 6, 7]])


def dropping_model() -> GPT2LMHeadModel:
    """A model with dropout of its own, and so in each layer."""
    torch.manual_seed(0)
    config = GPT2Config(
        **{"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.5},
        **{"embd_pdrop": 0.5, "attn_pdrop": 0.5, "bos_token_id": 0, "eos_token_id": 0},
    )
    return GPT2LMHeadModel(config)


def adapted(model) -> Adapters:
    new = LoraSettings(r=4, alpha=8, target_modules=None, rslora=False, dora=False, gaussian=False)
    return Adapters(model, new, reference=None, dropout=0.0, seed=3, load_base=lambda: None)


def test_dropout_of_the_model_is_off_in_the_reference_and_on_in_the_policy():
    """The reference of a policy in training gives the numbers of the base model in eval mode."""
    with torch.no_grad():
        expected = dropping_model().eval()(input_ids=IDS).logits
        model = dropping_model()
        adapters = adapted(model)
        model.train()
        for _ in range(2):
            found = adapters.reference(input_ids=IDS).logits
            np.testing.assert_array_equal(found, expected)
            assert model.training
            assert (model(input_ids=IDS).logits - expected).abs().max() > 1e-3
