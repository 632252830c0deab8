"""How many tokens at once, when activations are computed again, and what a step computes."""

import logging

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lightning.budget import Budget, activation_bytes, choose_budget, memory_of, say_if_over
from dpo_lightning.data.packing import collate_groups
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.models.probe import choose_path
from dpo_lightning.objectives.comparison import compare_responses
from dpo_lightning.objectives.registry import ObjectiveSettings
from tests.conftest import tiny_llama_config

GIB = 1 << 30
LLAMA_1B = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8,
)  # fmt: skip


def budget(**changes) -> Budget:
    values = {
        "kind": "cuda", "device_bytes": 80 * GIB, "trained": 1_236_000_000, "width": 2,
        "longest": 1000, "tokens": None, "checkpointing": None,
    }  # fmt: skip
    return choose_budget(LLAMA_1B, **(values | changes))


def test_what_a_token_leaves_behind():
    """By hand, in bfloat16, for each layer."""
    layer = 2 * (4 * 2048 + 2 * 80 * 64 + 4 * 8192) + 8 * 2048
    assert activation_bytes(LLAMA_1B, width=2, checkpointing=False) == 16 * layer
    once = 16 * 2 * 2048 + layer
    assert activation_bytes(LLAMA_1B, width=2, checkpointing=True) == once


def test_a_large_gpu_takes_many_tokens_and_computes_nothing_twice():
    """80 GiB less 18 bytes a weight, 70% of that, over 1.9 MB a token: 23,000, so 16,384."""
    assert budget() == Budget(tokens=16384, checkpointing=False)


def test_a_small_one_takes_fewer():
    assert budget(device_bytes=32 * GIB).tokens < budget().tokens


def test_activations_are_computed_again_only_where_they_would_not_fit():
    assert budget(device_bytes=24 * GIB, longest=2048) == Budget(tokens=8192, checkpointing=True)
    assert not budget(device_bytes=24 * GIB, longest=2048, checkpointing=False).checkpointing
    assert budget(checkpointing=True).checkpointing
    # More at once than fits: by need.
    assert budget(tokens=60000).checkpointing


def test_what_is_set_stays():
    assert budget(tokens=777).tokens == 777
    assert budget(device_bytes=None, kind="mps") == Budget(tokens=8192, checkpointing=False)
    assert budget(device_bytes=None, tokens=5, checkpointing=True) == Budget(5, checkpointing=True)


def test_a_cpu_with_room_takes_what_its_caches_like():
    tiny = choose_budget(
        tiny_llama_config(), kind="cpu", device_bytes=8 * GIB, trained=10_000, width=4,
        longest=100, tokens=None, checkpointing=None,
    )  # fmt: skip
    assert tiny == Budget(tokens=8192, checkpointing=False)
    assert budget(kind="cpu", width=4) == Budget(tokens=512, checkpointing=False)
    assert memory_of(torch.device("cpu")) > GIB


def group(prompt: int, *responses: int) -> TokenGroup:
    draw = np.random.default_rng(prompt)
    ids = [draw.integers(3, 200, n).astype(np.int32) for n in (prompt, *responses)]
    return TokenGroup(ids[0], tuple(ids[1:]), tuple(range(1, len(ids))), 1.0, "f:1", "key")


def test_groups_over_the_budget_are_said_once(caplog):
    caplog.set_level(logging.INFO)
    groups = [group(5, 2, 2), group(50, 9, 9), group(90, 4, 4)]
    say_if_over(groups, Budget(60, checkpointing=False), shared=True)
    assert caplog.text.count("micro-batch of its own") == 1
    assert "2 of 3 groups" in caplog.text
    assert "up to 98" in caplog.text
    caplog.clear()
    say_if_over(groups, Budget(98, checkpointing=False), shared=True)
    assert caplog.text == ""
    # With the prompt twice the longest has 188.
    say_if_over(groups, Budget(98, checkpointing=False), shared=False)
    assert "up to 188" in caplog.text


@pytest.mark.parametrize(("prompt", "response"), [(96, 48), (64, 128), (256, 64)])
def test_a_step_computes_what_the_model_of_it_says(prompt: int, response: int):
    """FLOPs of a pair, forward and backward, within 5% of 3 (2 N T + 2 H (C + R) + attention).

    N are the weights of the layers and H those of the head; T = P + C + R, the prompt once; causal
    attention of L layers with heads of a entries in all takes 2 L a ((P + C)^2 + (P + R)^2 - P^2).
    """
    layers, size, vocabulary, intermediate = 8, 384, 8192, 1024
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=size, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=6,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    scorer, reason = choose_path(model, max_length=512)
    assert reason is None
    draw = np.random.default_rng(0)
    lengths = [(prompt, *draw.integers(response - 9, response + 9, 2).tolist()) for _ in range(6)]
    batch = collate_groups([group(*shape) for shape in lengths], range(6))
    with FlopCounterMode(display=False) as counter:
        logps = scorer.logps(model, batch)
        comparison = compare_responses(
            ObjectiveSettings(terms={"sigmoid": 1.0}), policy_logps=logps,
            reference_logps=logps.detach(), lengths=batch.lengths,
            group=batch.group, rank=batch.rank, weight=batch.weight, chosen=batch.chosen,
            rejected=batch.rejected, beta=0.1,
        )  # fmt: skip
        comparison.loss.backward()
    weights = layers * (4 * size * size + 3 * size * intermediate)
    expected = 0
    for p, c, r in lengths:
        attention = 2 * layers * size * ((p + c) ** 2 + (p + r) ** 2 - p**2)
        expected += 3 * (2 * weights * (p + c + r) + 2 * vocabulary * size * (c + r) + attention)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)
