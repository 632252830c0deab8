"""Computation of a run by precision, processes, strategy and storage of the weights."""

import re
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from dpo_lightning.errors import UserError
from dpo_lightning.memory.hardware import decide_hardware
from dpo_lightning.settings.schema import Config
from dpo_lightning.training.loss_scale import Float16Precision
from dpo_lightning.training.precision import make_computation, trainer_precision
from tests.support.models import make_model

BF16 = torch.bfloat16


def compute(*, world_size: int = 1, strategy: str = "auto", peft: str = "none", **settings):
    """The computation, and what the trainer's precision plugin is afterwards."""
    trainer = SimpleNamespace(
        world_size=world_size,
        strategy=SimpleNamespace(
            precision_plugin=MixedPrecision("bf16-mixed", "cpu"), root_device=torch.device("cpu")
        ),
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
        ("bf16-true", "cpu", "bf16-true"),
        ("16-mixed", "cpu", "16-mixed"),
        (None, "cpu", "32-true"),
        (None, "mps", "32-true"),
    ],
)
def test_a_precision_that_is_left_open_is_float32_without_a_gpu(wanted, accelerator, expected):
    config = Config()
    config.trainer.precision, config.trainer.accelerator = wanted, accelerator
    assert decide_hardware(config.trainer).precision == expected


def gpu(monkeypatch, *, native: bool) -> None:
    """A GPU that has bfloat16, or like a T4 only emulates it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")

    def supported(including_emulation: bool = True) -> bool:
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_a_gpu_computes_in_what_it_has(monkeypatch, native: bool, expected: str):
    """Unless another device is asked for."""
    gpu(monkeypatch, native=native)
    config = Config()
    assert decide_hardware(config.trainer).precision == expected
    config.trainer.accelerator = "cpu"
    assert decide_hardware(config.trainer).precision == "32-true"


@pytest.mark.parametrize(
    ("precision", "half_weights", "said"),
    [
        ("bf16-mixed", False, "trainer.precision=bf16-mixed: Tesla T4 has no bfloat16"),
        ("bf16-true", True, "trainer.precision=bf16-true: Tesla T4 has no bfloat16"),
        (None, True, "use model.dtype=float32 trainer.precision=16-mixed"),
        ("32-true", True, "model.dtype=bfloat16: Tesla T4"),
    ],
)
def test_bfloat16_is_never_emulated(monkeypatch, precision, half_weights: bool, said: str):
    """Asked for it is refused in one line, whose remedy works."""
    gpu(monkeypatch, native=False)
    config = Config()
    config.trainer.precision = precision
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        decide_hardware(config.trainer, half_weights=half_weights)
    assert "\n" not in str(caught.value)
    config.trainer.precision = "16-mixed"
    found = decide_hardware(config.trainer)
    assert (found.precision, found.float16, found.mixed) == ("16-mixed", True, True)
    gpu(monkeypatch, native=True)
    config.trainer.precision = precision
    decide_hardware(config.trainer, half_weights=half_weights)


def test_float16_is_refused_where_nobody_scales_a_loss():
    config = Config()
    config.trainer.precision, config.trainer.accelerator = "16-mixed", "mps"
    with pytest.raises(UserError, match=r"not on mps; use trainer\.precision=32-true"):
        decide_hardware(config.trainer)


F16 = torch.float16


@pytest.mark.parametrize(
    ("how", "weights", "autocast", "frozen", "name"),
    [
        ({}, None, True, None, "16-mixed, autocast"),
        ({"world_size": 2}, None, True, None, "16-mixed, autocast"),
        # Beside an adapter no layer is cast anew in each pass.
        ({"peft": "lora"}, None, True, F16, "16-mixed, autocast"),
        ({"world_size": 2, "strategy": "fsdp"}, F16, False, None,
         "16-mixed, weights in torch.float16"),
    ],
)  # fmt: skip
def test_float16_is_autocast_or_shards_with_a_scaled_loss(how, weights, autocast, frozen, name):
    """Never masters: gradients of float16 weights would be float16, and could not be divided."""
    found, plugin = compute(precision="16-mixed", **how)
    assert (found.weights, found.master_dtype, found.autocast) == (weights, None, autocast)
    assert (found.frozen, found.sums, found.name) == (frozen, torch.float32, name)
    assert found.dtype(torch.float32) == F16
    assert found.describe() == "16-mixed, loss scaled, gradients add up in float32"
    assert type(plugin) is Float16Precision
    assert plugin.scaler.is_enabled()
    with plugin.forward_context():
        assert torch.is_autocast_enabled("cpu") is autocast
        expected = F16 if autocast else torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected
    with found.context(torch.device("cpu")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == expected


@pytest.mark.parametrize(
    ("how", "weights", "autocast", "sums"),
    [
        ({}, None, False, BF16),
        # DDP needs no autocast: the weights are bfloat16 themselves.
        ({"world_size": 2}, None, False, BF16),
        ({"world_size": 2, "strategy": "fsdp"}, None, False, BF16),
        # Adapters are float32, with a rounding that computes.
        ({"peft": "lora"}, BF16, False, torch.float32),
        ({"world_size": 2, "peft": "lora"}, None, False, torch.float32),
    ],
)
def test_weights_in_bfloat16_are_trained_themselves(how, weights, autocast, sums):
    found, plugin = compute(precision="bf16-true", dtype="bfloat16", **how)
    assert (found.weights, found.autocast, found.sums) == (weights, autocast, sums)
    assert type(plugin) is Precision
    assert found.dtype(BF16) == BF16
    assert found.describe().startswith("bf16-true, gradients add up in ")
    assert found.describe().endswith(str(sums).partition(".")[2])


def test_gradients_add_up_in_float32_but_for_weights_in_bfloat16():
    for precision in ("32-true", "bf16-mixed"):
        assert compute(precision=precision)[0].sums == torch.float32
        assert compute(precision=precision, dtype="bfloat16")[0].sums == BF16
        assert compute(precision=precision, dtype="bfloat16", peft="lora")[0].sums == torch.float32
    assert compute(precision="32-true")[0].describe() == "32-true"


def test_the_sum_of_bfloat16_gradients_is_off_by_what_is_said_of_it():
    """Eight micro-batches: at most 7 * 2^-8 of the largest partial sum, 0.6% in the mean square."""
    draw = torch.Generator().manual_seed(0)
    parts = torch.randn(8, 10_000, generator=draw).bfloat16()
    weight = torch.nn.Parameter(torch.zeros(10_000, dtype=BF16))
    largest, exact = torch.zeros(10_000), torch.zeros(10_000)
    for part in parts:
        (weight * part).sum().backward()
        exact += part.float()
        largest = torch.maximum(largest, exact.abs())
    assert weight.grad.dtype == compute(dtype="bfloat16")[0].sums
    error = (weight.grad.float() - exact).abs()
    assert (error <= 7 * 2**-8 * largest * 1.01).all()
    assert (error / largest).square().mean().sqrt().item() < 0.006


def test_lightning_is_told_what_it_would_not_change():
    told = {p: trainer_precision(p) for p in ("32-true", "bf16-mixed", "bf16-true", "16-mixed")}
    assert told == {
        "32-true": "32-true", "bf16-mixed": "bf16-mixed", "bf16-true": "32-true",
        "16-mixed": "32-true",
    }  # fmt: skip
