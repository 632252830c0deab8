"""Budget of tokens, choice of checkpointing, and tokens that a step computes."""

import itertools
import logging

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lightning.data.packing import collate_groups, plan_step
from dpo_lightning.memory.budget import (
    Budget,
    choose_budget,
    longest_share,
    mean_keys,
    memory_of,
    say_if_over,
)
from dpo_lightning.memory.footprint import shape_of_model
from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.probe import choose_path
from dpo_lightning.objectives.comparison import Logps, compare_responses
from dpo_lightning.objectives.objective import ObjectiveSettings
from tests.support.budgets import SHAPE, training
from tests.support.groups import group
from tests.support.models import tiny_llama_config

GIB = 1 << 30


def budget(shape=SHAPE, how=None, **changes) -> Budget:
    values = {
        "kind": "cuda", "device_bytes": 80 * GIB, "longest": 1000, "tokens": None,
        "checkpointing": None,
    }  # fmt: skip
    return choose_budget(shape, how or training(), **(values | changes))


def test_a_large_gpu_takes_many_tokens_and_computes_nothing_twice():
    """1.5 billion weights (head and embeddings apart) of 18 bytes and 0.5 GiB more of gradients.

    80 GiB less 26 GiB, 70% of that, over 1.9 MB a token: 20,500, so 16,384.
    """
    assert SHAPE.parameters == 1_498_482_688
    assert budget() == Budget(tokens=16384, checkpointing=False)


def test_what_takes_less_leaves_room_for_more():
    small = {"device_bytes": 40 * GIB}
    half = training(weight_bytes=2, masters=False)
    assert budget(how=half, **small).tokens > budget(**small).tokens
    adapters = training(trained=SHAPE.lora_parameters(16))
    assert budget(how=adapters, **small).tokens > budget(**small).tokens
    assert budget(device_bytes=32 * GIB).tokens < budget().tokens


def test_activations_are_computed_again_only_where_they_would_not_fit():
    """At 29 GiB 1.2 GiB are left for 600 tokens, or for 11,000."""
    tight = {"device_bytes": 29 * GIB, "longest": 2048}
    assert budget(**tight) == Budget(tokens=4096, checkpointing=True)
    assert not budget(**tight, checkpointing=False).checkpointing
    assert budget(checkpointing=True).checkpointing
    # More at once than fits: by need.
    assert budget(tokens=60000).checkpointing


def test_what_is_set_stays():
    assert budget(tokens=777).tokens == 777
    assert budget(device_bytes=None, kind="mps") == Budget(tokens=8192, checkpointing=False)
    assert budget(device_bytes=None, tokens=5, checkpointing=True) == Budget(5, checkpointing=True)


def test_a_cpu_with_room_takes_what_its_caches_like():
    single = training(compute_bytes=4, masters=False)
    tiny = shape_of_model(meta_model(tiny_llama_config()))
    assert budget(tiny, single, kind="cpu") == Budget(tokens=8192, checkpointing=False)
    assert budget(how=single, kind="cpu") == Budget(tokens=512, checkpointing=False)
    assert memory_of(torch.device("cpu")) > GIB


def test_keys_that_a_query_meets():
    """(5 * 5 + 2 * 7 + 3 * 8 + 4 * 4 + 1 * 5) / (5 + 2 + 3 + 4 + 1) = 84 / 15 = 5.6."""
    assert mean_keys([group(5, 2, 3), group(4, 1)]) == 6


def test_the_most_that_a_step_brings_to_a_rank_by_hand():
    """Three of (5, 1, 9, 4) have at most 18 tokens; of four ranks one has 18 / 4 and 9 more."""
    costs = [5, 1, 9, 4]
    assert longest_share(costs, batch_size=3, world_size=1) == 18
    assert longest_share(costs, batch_size=3, world_size=4) == 4 + 9
    assert longest_share(costs, batch_size=9, world_size=1) == 19


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_no_step_brings_more_to_a_rank(batch_size: int, world_size: int):
    """Whichever groups meet, as the plan of a step shares them out."""
    costs = [3, 8, 2, 9, 9, 1, 20]
    most = longest_share(costs, batch_size=batch_size, world_size=world_size)
    for step in itertools.combinations(costs, batch_size):
        for rank in plan_step(step, world_size=world_size, micro_batch_tokens=1000):
            assert sum(step[i] for micro in rank for i in micro) <= most


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


@pytest.mark.parametrize(
    ("prompt", "response"),
    [(96, 48), *(pytest.param(*sizes, marks=pytest.mark.slow) for sizes in [(64, 128), (256, 64)])],
)
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
            ObjectiveSettings(terms={"sigmoid": 1.0}),
            batch,
            Logps(policy=logps, reference=logps.detach()),
            beta=0.1,
        )
        comparison.loss.backward()
    weights = layers * (4 * size * size + 3 * size * intermediate)
    expected = 0
    for p, c, r in lengths:
        attention = 2 * layers * size * ((p + c) ** 2 + (p + r) ** 2 - p**2)
        expected += 3 * (2 * weights * (p + c + r) + 2 * vocabulary * size * (c + r) + attention)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)
