"""Memory by formula: by hand, against what autograd saves, and in which direction it goes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from dpo_lightning.data.packing import collate_groups
from dpo_lightning.memory.footprint import GIB, activation_bytes, footprint, in_gib, shape_of_model
from dpo_lightning.models.loading import meta_model
from dpo_lightning.models.master_weights import cast_parameters
from dpo_lightning.models.probe import choose_path
from tests.support.budgets import SHAPE, training
from tests.support.groups import group
from tests.support.memory_page import SHAPES, shape, table, ways
from tests.support.properties import examples
from tests.support.runs import ROOT


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_of_a_model_is_that_by_hand(name: str):
    """Shape from the config alone, on the meta device: 70 billion weights take no memory."""
    layers, hidden, intermediate, heads, key_heads, vocabulary = SHAPES[name]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=key_heads,
        tie_word_embeddings=name == "1B",
    )  # fmt: skip
    assert shape_of_model(meta_model(config)) == shape(name)


def test_parameters_are_those_that_the_models_are_known_for():
    assert shape("1B").parameters == 1_235_814_400
    assert shape("8B").parameters == 8_030_261_248
    assert shape("70B").parameters == 70_553_706_496


@pytest.mark.parametrize(
    ("changes", "each"),
    [
        # Weights, masters, gradients and two moments.
        ({"weight_bytes": 4, "compute_bytes": 4, "masters": False}, (4, 0, 4, 8)),
        ({}, (2, 4, 4, 8)),
        ({"weight_bytes": 2, "masters": False}, (2, 0, 2, 4)),
        ({"optimizer": "adamw_8bit"}, (2, 4, 4, 2 + 8 / 256)),
        ({"weight_bytes": 2, "masters": False, "optimizer": "adamw_8bit"}, (2, 0, 2, 2 + 8 / 256)),
    ],
)
def test_bytes_of_each_trained_weight(changes, each):
    """Beside them one more gradient of the largest tensor, in the type of the backward pass."""
    how = training(**changes)
    found = footprint(SHAPE, how)
    n = SHAPE.parameters
    assert found.weights == each[0] * n
    assert found.masters == each[1] * n
    assert found.gradients == each[2] * n + how.compute_bytes * SHAPE.largest
    assert found.optimizer == pytest.approx(each[3] * n)


def test_what_several_devices_add_to_a_whole_model():
    """DDP's buckets are the gradients once more; autocast's casts are the weights in 2 bytes."""
    n = SHAPE.parameters
    alone = training(masters=False)
    found = footprint(SHAPE, replace(alone, buckets=True, autocast=True))
    assert found.total - footprint(SHAPE, alone).total == 4 * n + 2 * n


def test_adapters_are_small_and_the_rest_is_frozen():
    """Rank 16 on a layer of 1B: q 4096 + k 2560 + v 2560 + o 4096 + 3 * 10240 sides, times 16."""
    model = shape("1B")
    trained = model.lora_parameters(16)
    assert trained == 16 * 16 * (4096 + 2560 + 2560 + 4096 + 3 * 10240)
    found = footprint(model, training(trained=trained))
    assert found.weights == 2 * (model.parameters + trained)
    assert (found.masters, found.optimizer) == (4 * trained, 8 * trained)
    four = footprint(model, training(trained=trained, four_bit=True))
    linear = model.layers * model.linear_parameters
    saved = (2 - (0.5 + 1 / 64 + 1 / 4096)) * linear
    assert found.weights - four.weights == pytest.approx(saved)
    # The frozen model is the reference.
    assert footprint(model, training(trained=trained, live_reference=True)).reference == 0
    assert footprint(model, training(live_reference=True)).reference == 2 * model.parameters


def test_shares_of_a_sharded_model():
    """Each of 8 has an eighth; whole for a while are two layers and what is outside of layers."""
    model = shape("1B")
    found = footprint(model, training(masters=False, shards=8))
    assert found.weights == 4 * model.parameters / 8
    assert found.optimizer == 8 * model.parameters / 8
    assert found.gradients == 4 * model.parameters / 8 + 2 * model.largest
    layer = model.layer_parameters
    assert found.gathered == 2 * model.outer + 2 * 2 * layer + (2 + 4) * layer
    whole = footprint(model, training(masters=False, shards=8, whole_gradients=True))
    assert whole.gradients == 4 * model.parameters / 8 + 4 * model.parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 6), (8, 2)])
def test_activations_are_what_autograd_saves(dtype: torch.dtype, heads: int, key_heads: int):
    """Within 8% once the gradients of one layer, which come on top, are taken off the estimate."""
    config = LlamaConfig(
        vocab_size=512, hidden_size=64 * heads, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=heads, num_key_value_heads=key_heads,
    )  # fmt: skip
    model = cast_parameters(LlamaForCausalLM(config), dtype).train()
    scorer, _ = choose_path(model, max_length=512)
    draw = np.random.default_rng(0)
    groups = [group(96, *draw.integers(40, 56, 2).tolist()) for _ in range(4)]
    batch = collate_groups(groups, range(4))
    plan = scorer.plan(batch)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.base_model(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids[None],
            use_cache=False, group_plan=plan,
        )  # fmt: skip
    found = sum(size for size, _ in saved.values()) / len(batch.input_ids)
    keys = sum(p * p + sum(n * (p + n) for n in rest) for p, *rest in batch.segments)
    keys = round(keys / len(batch.input_ids))
    parts = [
        activation_bytes(
            replace(shape_of_model(model), layers=layers), width=dtype.itemsize,
            checkpointing=False, keys=keys,
        )
        for layers in (8, 0)
    ]  # fmt: skip
    assert states.last_hidden_state.requires_grad
    assert parts[0] - parts[1] == pytest.approx(found, rel=0.08)


# Directions -------------------------------------------------------------------------------------

HOW = st.builds(
    lambda **values: training(**values),
    weight_bytes=st.sampled_from([2, 4]), compute_bytes=st.sampled_from([2, 4]),
    masters=st.booleans(), autocast=st.booleans(),
    optimizer=st.sampled_from(["adamw", "adamw_8bit"]),
    trained=st.sampled_from([None, SHAPE.lora_parameters(16)]), four_bit=st.booleans(),
    live_reference=st.booleans(), tokens=st.integers(1, 1 << 16), checkpointing=st.booleans(),
    keys=st.integers(0, 2048),
)  # fmt: skip


@given(HOW)
def test_parts_are_positive_and_the_total_is_their_sum(how):
    found = footprint(SHAPE, how)
    assert min(found.parts().values()) >= 0
    assert found.total == sum(found.parts().values())
    assert found.fixed + found.activations == found.total


@given(HOW, st.integers(1, 1 << 14))
def test_more_tokens_take_more(how, more):
    assert (
        footprint(SHAPE, replace(how, tokens=how.tokens + more)).total > footprint(SHAPE, how).total
    )


@given(HOW)
def test_checkpointing_and_8_bits_take_less_and_a_live_reference_no_less(how):
    plain = replace(how, checkpointing=False, optimizer="adamw", live_reference=False)
    total = footprint(SHAPE, plain).total
    assert footprint(SHAPE, replace(plain, checkpointing=True)).total < total
    assert footprint(SHAPE, replace(plain, optimizer="adamw_8bit")).total < total
    assert footprint(SHAPE, replace(plain, live_reference=True)).total >= total


@settings(max_examples=examples(50))
@given(HOW, st.sampled_from(sorted(SHAPES)), st.integers(3, 10))
def test_more_devices_take_less_of_each(how, name, power):
    """From 8 on: two already gather layers, which can be more than they share out."""
    totals = [
        footprint(shape(name), replace(how, masters=False, autocast=False, shards=n)).total
        for n in (2**power, 2 ** (power + 1))
    ]
    assert totals[1] < totals[0]


# The page ---------------------------------------------------------------------------------------


def test_the_table_of_the_page_is_the_formulas():
    page = (ROOT / "docs" / "memory.md").read_text()
    assert "\n".join(table()) in page
    for layers, hidden, intermediate, heads, key_heads, vocabulary in SHAPES.values():
        row = f"| {layers} | {hidden} | {intermediate} | {heads} | {key_heads} | {vocabulary} |"
        assert row in page


MEASURED = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())


@pytest.mark.parametrize("way", MEASURED)
def test_measured_is_within_15_percent_of_the_estimate(way: str):
    """The measurements of benchmarks/memory.py stand on the page; the estimate is today's.

    But for activations and head, which depend on the lengths of the rows.
    """
    found = MEASURED[way]
    mib = [f"{found[name] / 2**20:,.0f}" for name in ("estimated", "measured", "resident")]
    off = found["estimated"] / found["measured"] - 1
    assert abs(off) < 0.15
    assert f"| {way} | {' | '.join(mib)} | {off:+.0%} |" in (ROOT / "docs/memory.md").read_text()
    config = LlamaConfig(
        vocab_size=32000, hidden_size=512, intermediate_size=1408, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4,
    )  # fmt: skip
    half = way.startswith("bfloat16")
    masters = "masters" in way
    how = training(
        weight_bytes=2 if half and not masters else 4, compute_bytes=2 if half else 4,
        masters=masters, optimizer="adamw_8bit" if "8-bit" in way else "adamw",
        live_reference="reference" in way,
    )  # fmt: skip
    today = footprint(shape_of_model(meta_model(config)), how).parts()
    fixed = ("weights", "masters", "reference", "gradients", "optimizer", "gathered")
    assert {name: today[name] for name in fixed} == {name: found["parts"][name] for name in fixed}


def test_ways_are_trained_as_named():
    found = ways(shape("8B"))
    totals = [footprint(shape("8B"), how).total for how in found.values()]
    assert totals == sorted(totals, reverse=True)


def test_numbers_of_gib():
    assert [in_gib(n * GIB) for n in (0.003, 0.5, 1, 14.16, 1234.5)] == [
        "0.00", "0.50", "1.0", "14.2", "1234"
    ]  # fmt: skip
