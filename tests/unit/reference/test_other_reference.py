"""A reference of another family: both models on one path, with the numbers of plain passes."""

import math

import pytest
from transformers import AutoModelForCausalLM, Gemma2Config

from tests.support.models import byte_tokenizer
from tests.support.runs import run_train


@pytest.mark.slow
def test_a_reference_that_cannot_share_prompts_takes_the_policy_along(
    tiny_model, pairs_file, tmp_path, caplog
):
    """Scored on the policy's path it failed in the middle of the first step."""
    folder = tmp_path / "gemma"
    config = Gemma2Config(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=128,
        eos_token_id=1, bos_token_id=0, pad_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    losses = []
    for kind in ("cached", "live"):
        run = run_train(
            tmp_path / kind,
            *(f"model.pretrained={tiny_model}", f"data.train={pairs_file}"),
            *(f"reference.pretrained={folder}", f"reference={kind}", "trainer.max_steps=1"),
            *("evaluation.samples=0", "evaluation.partition_samples=0"),
        )
        assert run.code == 0
        losses += run.values("train/loss")
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert abs(losses[0] - math.log(2)) > 1e-4
