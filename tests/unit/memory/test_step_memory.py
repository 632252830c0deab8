"""Memory told by tracing: against what a real step allocates, and part by part by hand."""

import logging

import pytest
import torch

from dpo_lightning.memory import live
from dpo_lightning.memory.estimate import MemoryEstimate
from dpo_lightning.memory.footprint import GIB, AdapterFacts, in_gib
from dpo_lightning.memory.lengths import GroupLengths
from dpo_lightning.memory.step_memory import CUDA_CONTEXT, StepMemory
from dpo_lightning.memory.timeline import Event, put_together
from tests.support.groups import group
from tests.support.memory_page import SHAPES, table
from tests.support.real_steps import (
    ARCHITECTURES,
    GROUP,
    WAYS,
    allocated,
    config_of,
    step_memory,
    training,
)
from tests.support.runs import ROOT

QUICK = {
    ("llama", "full"),
    ("gemma3", "checkpointing"),
    ("mla", "lora"),
    ("qwen3", "live reference"),
}


@pytest.fixture(scope="module")
def llama() -> StepMemory:
    return step_memory(config_of("llama"))


@pytest.mark.parametrize(
    ("architecture", "way"),
    [
        pytest.param(name, way, marks=[] if (name, way) in QUICK else [pytest.mark.long])
        for name in ARCHITECTURES
        for way in WAYS
    ],
)
def test_a_traced_peak_is_what_a_real_step_allocates(architecture: str, way: str):
    """Within 7%, with and without what is there before the step; by the profiler's records."""
    config, how = config_of(architecture), training(**WAYS[way])
    found = step_memory(config).footprint(how)
    real = allocated(config, how, GroupLengths(GROUP, (999, 1, 1)).fill(how.tokens))
    assert found.total == pytest.approx(real, rel=0.07)
    before = found.weights + found.reference + found.optimizer
    assert found.total - before == pytest.approx(real - before, rel=0.07)


IN_HALF = {"compute_bytes": 2, "weight_bytes": 2}
WITH_AUTOCAST = {"compute_bytes": 2, "autocast": True}


@pytest.mark.parametrize("how", [{}, IN_HALF, WITH_AUTOCAST], ids=["float32", "half", "autocast"])
@pytest.mark.parametrize(
    "architecture",
    [
        name if name == "llama" else pytest.param(name, marks=pytest.mark.long)
        for name in ARCHITECTURES
    ],
)
def test_a_step_of_a_gpu_is_traced_with_and_without_checkpointing(caplog, architecture, how):
    """Layers that are computed again are computed as before, and less of them is kept."""
    memory = step_memory(config_of(architecture))
    with caplog.at_level(logging.INFO):
        whole, again = (
            memory.footprint(training(kind="cuda", checkpointing=value, **how)).activations
            for value in (False, True)
        )
    assert [r for r in caplog.records if r.name.startswith("dpo_lightning")] == []
    assert 0 < again < 0.6 * whole


def test_a_step_of_too_many_operations_is_guessed_and_tried_once(caplog, monkeypatch):
    monkeypatch.setattr(live, "MOST_OPERATIONS", 100)
    config = config_of("llama")
    config.vocab_size = 599  # as no other test has it
    memory = step_memory(config)
    with caplog.at_level(logging.INFO):
        found = [memory.footprint(training(tokens=n)).activations for n in (300, 600)]
    assert 0 < found[0] < found[1]
    [said] = caplog.messages
    assert "more than 100 operations, as of a loop over tokens" in said


@pytest.mark.slow
def test_autocast_keeps_copies_of_weights_as_on_a_cpu():
    """In bfloat16, with float32 weights, as over several processes."""
    config, how = config_of("llama"), training(**WITH_AUTOCAST)
    found = step_memory(config).footprint(how)
    real = allocated(config, how, GroupLengths(GROUP, (999, 1, 1)).fill(how.tokens))
    assert found.total == pytest.approx(real, rel=0.07)


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_step_of_bfloat16_weights_is_traced_as_well(architecture: str):
    """With moments in bfloat16 too."""
    config, how = config_of(architecture), training(**IN_HALF)
    found = step_memory(config).footprint(how)
    real = allocated(config, how, GroupLengths(GROUP, (999, 1, 1)).fill(how.tokens))
    assert found.total == pytest.approx(real, rel=0.07)


# Parts by hand ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "each"),
    [
        # Weights, masters, gradients and two moments, in bytes of each weight.
        ({}, (4, 0, 4, 8)),
        ({"compute_bytes": 2, "masters": True}, (2, 4, 4, 8)),
        ({"weight_bytes": 2, "compute_bytes": 2}, (2, 0, 2, 4)),
    ],
)
def test_bytes_of_each_trained_weight(llama, changes, each):
    found = llama.footprint(training(**changes))
    n = llama.parameters
    # Rotary frequencies are a buffer of 8 float32 numbers, and once more as they were first.
    assert n * each[0] <= found.weights <= n * each[0] + 64
    assert (found.masters, found.gradients, found.optimizer) == tuple(n * e for e in each[1:])


def test_moments_of_8_bits_take_a_quarter(llama):
    """One byte, and the float32 scale of a row of 64; tensors below 4,096 entries keep four."""
    found = llama.footprint(training(optimizer="adamw_8bit"))
    assert 2 * llama.parameters < found.optimizer < 2.7 * llama.parameters


def test_adapters_are_small_and_the_rest_is_frozen(llama):
    """Rank 8 on five layers: q and o 2 (64 + 64), k and v 2 (64 + 32), three of 64 + 160 sides."""
    how = training(adapters=AdapterFacts(8))
    trained = 8 * 5 * (2 * 128 + 2 * 96 + 3 * 224)
    assert llama.trained(how) == trained
    found = llama.footprint(how)
    assert 4 * (llama.parameters + trained) <= found.weights
    assert (found.gradients, found.optimizer) == (4 * trained, 8 * trained)
    four = llama.footprint(training(adapters=AdapterFacts(8, four_bit=True)))
    linear = 5 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160)
    saved = (4 - (0.5 + 1 / 64 + 1 / 4096)) * linear
    assert found.weights - four.weights == pytest.approx(saved, abs=1)
    assert four.gathered == 4 * 64 * 160  # the matrix that is unpacked
    # The frozen model is the reference.
    live = training(adapters=AdapterFacts(8), live_reference=True)
    assert llama.footprint(live).reference == 0


def test_a_live_reference_is_the_weights_once_more(llama):
    found = llama.footprint(training(live_reference=True))
    assert found.reference == found.weights


@pytest.mark.parametrize(
    ("changes", "bytes_of_one"),
    [
        # The model once more; its weights are the values.
        ({}, 4),
        # Under autocast too.
        ({"compute_bytes": 2, "autocast": True}, 4),
        # Rounded weights and the float32 values behind them.
        ({"compute_bytes": 2, "masters": True}, 2 + 4),
        ({"compute_bytes": 2, "weight_bytes": 2}, 2 + 4),
    ],
)
def test_a_moving_reference_has_float32_values(llama, changes, bytes_of_one: int):
    """Of n weights each; buffers of some bytes are beside them."""
    how = training(live_reference=True, moving_reference=True, **changes)
    found = llama.footprint(how)
    assert found.reference == pytest.approx(bytes_of_one * llama.parameters, abs=256)
    still = llama.footprint(training(live_reference=True, **changes))
    assert found.reference - still.reference in (0, 4 * llama.parameters)
    assert (found.weights, found.activations) == (still.weights, still.activations)


def test_a_moving_reference_of_shards_is_their_share(llama):
    """Four devices with float32 shards: a weight each of the four bytes, whatever is gathered."""
    how = training(live_reference=True, moving_reference=True, compute_bytes=2, shards=4)
    assert llama.footprint(how).reference == pytest.approx(llama.parameters, abs=256)


@pytest.mark.parametrize(("half", "bytes_of_one"), [({}, 4), ({"compute_bytes": 2}, 2 + 4)])
def test_a_copy_of_an_adapter_moves_beside_it(llama, half, bytes_of_one: int):
    """The base is the policy's own; of 16 bits the copy has its float32 values behind it."""
    how = training(adapters=AdapterFacts(8), live_reference=True, moving_reference=True, **half)
    assert llama.footprint(how).reference == bytes_of_one * llama.trained(how)


def test_what_several_devices_share_and_add(llama):
    """FSDP2 gathers two layers and what is outside; DDP has the gradients twice."""
    alone = llama.footprint(training())
    assert llama.footprint(training(buckets=True)).gathered == alone.gradients
    n, layer = llama.parameters, 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 160 + 2 * 64
    shared = llama.footprint(training(shards=4))
    assert (shared.gradients, shared.optimizer) == (n, 2 * n)
    outer = n - 5 * layer
    assert shared.gathered == 4 * (outer + 2 * layer) + 8 * layer
    whole = llama.footprint(training(shards=4, whole_gradients=True))
    assert whole.gathered - shared.gathered == 4 * n


def test_a_gpu_has_its_context_and_fragments_beside(llama):
    """On a CPU nothing is added; a GPU has 576 MiB and 3% of what is allocated."""
    assert llama.footprint(training()).device == 0
    found = llama.footprint(training(kind="cuda"))
    allocated = found.total - found.device
    assert found.device == CUDA_CONTEXT + round(0.03 * allocated)


def test_a_gpu_keeps_no_scores_and_a_cpu_those_of_short_sequences():
    """576 tokens in groups of 288 or of 24: of three heads' scores a CPU keeps the more."""
    config = config_of("llama")
    how = training(kind="cuda", weight_bytes=2, compute_bytes=2, tokens=576)
    sizes = {}
    for shape in ((96, 96, 96), (8, 8, 8)):
        memory = step_memory(config, GroupLengths(shape, (9, 9, 9)))
        sizes[shape] = [memory.footprint(way).activations for way in (how, training(tokens=576))]
    gpu, cpu = ([sizes[shape][n] for shape in sizes] for n in (0, 1))
    assert gpu[0] == pytest.approx(gpu[1], rel=0.05)
    assert cpu[0] > 1.5 * cpu[1]


def test_the_estimate_may_come_to_93_percent(llama):
    """One byte more than 0.93 of the device does not fit."""
    how = training()
    total = llama.footprint(how).total
    device = -(-total * 100 // 93)
    assert MemoryEstimate(llama, how, device, 1).fits
    assert not MemoryEstimate(llama, how, device - 2, 1).fits
    assert MemoryEstimate(llama, how, None, 1).fits


def test_torch_is_as_it_was(llama):
    before = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype
    llama.footprint(training(tokens=40))
    assert (torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype) == before


def test_what_cannot_be_traced_is_guessed_and_said(caplog):
    caplog.set_level(logging.INFO)

    def broken(name, parameters):
        raise RuntimeError("no such kernel")

    memory = StepMemory(
        config_of("llama"), make_optimizer=broken, lengths=GroupLengths((5, 5, 4), (7, 7, 7))
    )
    found = memory.footprint(training(tokens=77))
    assert "cannot be traced (no such kernel)" in caplog.text
    assert found.weights == 4 * memory.parameters
    # 77 tokens of five layers that keep 17 times a width of 64, in float32.
    assert found.activations == 17 * 64 * 4 * 77 * 5


# Putting together ---------------------------------------------------------------------------------


def test_events_of_two_layers_tell_of_many():
    """Three keep 5, 5 and 7 bytes; going back the last takes 2 more and each gives its own back."""
    events = [
        Event(None, True, 1, 1),
        Event(0, True, 6, 5), Event(1, True, 9, 7), Event(None, True, 3, 0),
        Event(1, False, 2, -7), Event(0, False, 4, -5), Event(None, False, 0, -1),
    ]  # fmt: skip
    # 1 + 5 + 5 are kept when the last layer takes 9 for a while, and 1 + 5 + 5 + 7 + 3 at the head.
    assert put_together(events, [0, 0, 1]) == (21, 0)
    assert put_together(events, [0, 1]) == (16, 0)


def test_groups_fill_a_micro_batch_to_the_token():
    lengths = GroupLengths((6, 2, 2), (30, 5, 5))
    for tokens in (3, 9, 10, 11, 19, 55, 160):
        found = lengths.fill(tokens)
        assert sum(map(sum, found)) == tokens
        assert min(min(shape) for shape in found) >= 1
    assert len(lengths.fill(55)) == 6
    # The longest group is a micro-batch of its own.
    assert lengths.fill(40) == ((30, 5, 5),)


def test_lengths_of_data_are_those_in_which_a_token_stands():
    """Prompts of 5 and 15: (25 + 225) / 20; responses of 2, 2, 4 and 4: (4 + 4 + 16 + 16) / 12."""
    groups = [group(5, 2, 2), group(15, 4, 4)]
    found = GroupLengths.of(groups, shared=True)
    assert found.usual == (12, 3, 3)
    assert (found.longest, found.most) == ((15, 4, 4), 23)
    assert GroupLengths.of(groups, shared=False).most == 38


def test_numbers_of_gib():
    assert [in_gib(n * GIB) for n in (0.003, 0.5, 1, 14.16, 1234.5)] == [
        "0.00", "0.50", "1.0", "14.2", "1234"
    ]  # fmt: skip


@pytest.mark.long
def test_the_table_of_the_page_is_traced():
    page = (ROOT / "docs" / "memory.md").read_text()
    assert "\n".join(table()) in page
    for layers, hidden, intermediate, heads, key_heads, vocabulary in SHAPES.values():
        row = f"| {layers} | {hidden} | {intermediate} | {heads} | {key_heads} | {vocabulary} |"
        assert row in page
