"""Computation of a run by precision, processes, strategy and storage of the weights."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from dpo_lightning.memory.hardware import decide_hardware
from dpo_lightning.settings.schema import Config
from dpo_lightning.training.precision import make_computation
from tests.support.models import make_model

BF16 = torch.bfloat16


def compute(*, world_size: int = 1, strategy: str = "auto", peft: str = "none", **settings):
    """The computation, and what the trainer's precision plugin is afterwards."""
    trainer = SimpleNamespace(
        world_size=world_size,
        strategy=SimpleNamespace(precision_plugin=MixedPrecision("bf16-mixed", "cpu")),
    )
    found = make_computation(
        settings.get("precision", "bf16-mixed"),
        trainer,
        sharded=strategy == "fsdp",
        half_weights=settings.get("dtype") == "bfloat16",
        adapters=peft == "lora",
    )
    return found, trainer.strategy.precision_plugin


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("strategy", ["auto", "fsdp"])
def test_float32_rounds_nothing(world_size: int, strategy: str):
    found, _ = compute(precision="32-true", world_size=world_size, strategy=strategy)
    assert (found.weights, found.autocast, found.master_dtype) == (None, False, None)
    assert found.sharded is (strategy == "fsdp")
    assert found.name == "32-true"


@pytest.mark.parametrize(
    ("how", "weights", "masters", "autocast", "name"),
    [
        # One process rounds its weights once a step, with float32 ones behind them.
        ({}, BF16, BF16, False, "bf16-mixed, weights in torch.bfloat16"),
        # DDP averages the gradients of the model's own weights, so these stay float32.
        ({"world_size": 2}, None, None, True, "bf16-mixed, autocast"),
        # Shards are rounded as they are gathered, not by each rank.
        *(
            ({"world_size": n, "strategy": "fsdp"}, BF16, None, False,
             "bf16-mixed, weights in torch.bfloat16")
            for n in (1, 2)
        ),
        # Weights that are held in bfloat16 are trained themselves ...
        ({"dtype": "bfloat16"}, None, None, False, "bf16-mixed"),
        # ... but for an adapter beside them.
        ({"dtype": "bfloat16", "peft": "lora"}, BF16, BF16, False, "bf16-mixed"),
    ],
)  # fmt: skip
def test_half_precision_is_masters_autocast_or_shards(how, weights, masters, autocast, name):
    found, plugin = compute(**how)
    assert (found.weights, found.master_dtype, found.autocast) == (weights, masters, autocast)
    assert found.name == name
    # Lightning's own autocast is on where it is wanted, and else is not.
    assert (type(plugin) is Precision) is not autocast


def test_what_is_computed_outside_of_a_step_is_computed_as_in_it():
    """Autocast where the steps have it; the type of a product shows it."""
    for how, dtype in (({"world_size": 2}, BF16), ({}, torch.float32)):
        found, _ = compute(**how)
        with found.context(torch.device("cpu")):
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_frozen_model_is_rounded_where_the_policy_is():
    for how, dtype in (({}, BF16), ({"world_size": 2}, torch.float32)):
        found, _ = compute(**how)
        model = found.cast(make_model("llama").requires_grad_(False))
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("wanted", "accelerator", "expected"),
    [
        ("32-true", "gpu", "32-true"),
        ("bf16-mixed", "cpu", "bf16-mixed"),
        (None, "cpu", "32-true"),
        (None, "mps", "32-true"),
    ],
)
def test_a_precision_that_is_left_open_is_float32_without_a_gpu(wanted, accelerator, expected):
    config = Config()
    config.trainer.precision, config.trainer.accelerator = wanted, accelerator
    assert decide_hardware(config.trainer).precision == expected


def test_a_gpu_with_bfloat16_takes_it(monkeypatch):
    """Unless another device is asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, expected in ((True, "bf16-mixed"), (False, "32-true")):
        # A T4 or a V100 has none, and emulates it where it is asked to.
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True, given=supported: including_emulation or given,
        )
        config = Config()
        assert decide_hardware(config.trainer).precision == expected
        config.trainer.accelerator = "cpu"
        assert decide_hardware(config.trainer).precision == "32-true"
