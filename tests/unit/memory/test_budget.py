"""Budget of tokens, choice of checkpointing, and tokens that a step computes."""

import itertools
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lightning.data.packing import collate_groups, plan_step
from dpo_lightning.memory.budget import (
    Budget,
    Room,
    choose_budget,
    choose_sync,
    longest_share,
    memory_of,
    say_if_over,
)
from dpo_lightning.memory.footprint import Footprint, Training
from dpo_lightning.models.probe import choose_path
from dpo_lightning.objectives.comparison import Logps, compare_responses
from dpo_lightning.objectives.objective import ObjectiveSettings
from tests.support.groups import group
from tests.support.real_steps import training

GIB = 1 << 30


class Linear:
    """Footprints of 10 GiB and 1 MiB a token, a tenth of that with checkpointing.

    Whole gradients, where ranks share the weights, are ``whole`` GiB more.
    """

    def __init__(self, fixed: float = 10, token: int = 1 << 20, whole: int = 30) -> None:
        self.fixed, self.token, self.whole = fixed, token, whole

    def footprint(self, how: Training) -> Footprint:
        token = self.token // 10 if how.checkpointing else self.token
        more = self.whole * GIB if how.whole_gradients else 0
        return Footprint(
            weights=int(self.fixed * GIB), masters=0, reference=0, gradients=0, optimizer=0,
            gathered=more, activations=token * how.tokens, device=0,
        )  # fmt: skip


def room(**changes: Any) -> Room:
    values = {"device_bytes": 80 * GIB, "longest": 1000, "tokens": None, "checkpointing": None}
    return Room(**(values | changes))


def budget(memory: Any = None, *, kind: str = "cuda", **changes: Any) -> Budget:
    return choose_budget(memory or Linear(), training(kind=kind), room(**changes))


def test_a_large_gpu_takes_many_tokens_and_computes_nothing_twice():
    """93% of 80 GiB less 10 GiB hold 65,945 tokens of 1 MiB: 65,536, which is the most; of 40 GiB
    27.2 GiB hold 27,852: 16,384."""
    assert budget() == Budget(tokens=65536, checkpointing=False)
    assert budget(device_bytes=40 * GIB) == Budget(tokens=16384, checkpointing=False)


def test_activations_are_computed_again_only_where_they_would_not_fit():
    """93% of 12 GiB leave 1.16 GiB: 1,187 tokens, or 11,878 with a tenth of the activations."""
    tight = {"device_bytes": 12 * GIB, "longest": 2048}
    assert budget(**tight) == Budget(tokens=8192, checkpointing=True)
    assert not budget(**tight, checkpointing=False).checkpointing
    assert budget(checkpointing=True).checkpointing
    # More at once than fits: by need.
    assert budget(device_bytes=40 * GIB, tokens=60000).checkpointing


def test_what_is_not_linear_is_traced_before_it_is_chosen():
    """Beyond 20,000 tokens everything takes twice as much: 32,768 would not fit any more."""

    class Bent(Linear):
        def footprint(self, how: Training) -> Footprint:
            found = super().footprint(how)
            steep = 2 if how.tokens > 20000 else 1
            return replace(found, activations=steep * found.activations)

    assert budget(device_bytes=50 * GIB).tokens == 32768
    assert budget(Bent(), device_bytes=50 * GIB).tokens == 16384


class Counted(Linear):
    """Footprints that are counted: each stands for a traced step."""

    asked = 0

    def footprint(self, how: Training) -> Footprint:
        self.asked += 1
        return super().footprint(how)


@pytest.mark.parametrize(
    ("kind", "token", "tokens"), [("cuda", 1 << 20, 65536), ("cpu", 1024, 8192)]
)
def test_where_the_most_tokens_fit_nothing_else_is_traced(kind: str, token: int, tokens: int):
    """2^16 MiB are 64 GiB beside 10 of 74.4; 8,192 KiB are 8 MiB, of 256 that a CPU likes."""
    memory = Counted(token=token)
    assert budget(memory, kind=kind) == Budget(tokens, checkpointing=False)
    assert memory.asked == 1


def test_what_is_set_stays():
    assert budget(tokens=777).tokens == 777
    assert budget(device_bytes=None, kind="mps") == Budget(tokens=8192, checkpointing=False)
    assert budget(device_bytes=None, tokens=5, checkpointing=True) == Budget(5, checkpointing=True)


def test_a_cpu_with_room_takes_what_its_caches_like():
    """Activations of 256 MiB: 8,192 tokens of 32 KiB at most, and 512 of 1 MiB."""
    assert budget(Linear(token=1 << 14), kind="cpu") == Budget(tokens=8192, checkpointing=False)
    assert budget(Linear(token=1 << 17), kind="cpu") == Budget(tokens=2048, checkpointing=False)
    assert budget(kind="cpu") == Budget(tokens=512, checkpointing=False)
    assert memory_of(torch.device("cpu")) > GIB


@pytest.mark.parametrize(
    ("memory", "changes", "whole"),
    [
        # 30 GiB of whole gradients leave 34 GiB: enough tokens, nothing computed twice.
        (Linear(), {}, True),
        # Of 48 GiB they leave 4.6: 4,096 tokens in place of 32,768.
        (Linear(), {"device_bytes": 48 * GIB}, False),
        # They leave nothing.
        (Linear(), {"device_bytes": 40 * GIB}, False),
        # What is set of tokens and checkpointing fits either way.
        (Linear(), {"device_bytes": 48 * GIB, "tokens": 2048}, True),
        (Linear(), {"device_bytes": None}, True),
    ],
)
def test_gradients_are_whole_until_a_step_ends_where_the_memory_allows_it(memory, changes, whole):
    open_way = training(kind="cuda", shards=8, whole_gradients=None)
    assert choose_sync(memory, open_way, room(**changes)).whole_gradients is whole
    for value in (True, False):
        set_way = replace(open_way, whole_gradients=value)
        assert choose_sync(memory, set_way, room(**changes)).whole_gradients is value
    alone = replace(open_way, shards=1)
    assert choose_sync(memory, alone, room(**changes)).whole_gradients is False


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
    [(96, 48), *(pytest.param(*sizes, marks=pytest.mark.long) for sizes in [(64, 128), (256, 64)])],
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
