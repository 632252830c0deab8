"""The message about a run that does not fit, its remedies, and the command that prints it."""

import dataclasses
import functools
import json
import logging
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from dpo_lightning.errors import UserError
from dpo_lightning.memory.budget import Budget
from dpo_lightning.memory.estimate import (
    MemoryEstimate,
    check_fits,
    estimate_of,
    may_not_load,
    memory_settings,
    plan_training,
    remedies,
    step_memory_of,
    with_budget,
)
from dpo_lightning.memory.footprint import GIB, AdapterFacts, Training
from dpo_lightning.memory.hardware import decide_hardware
from dpo_lightning.memory.lengths import GroupLengths
from dpo_lightning.memory.step_memory import StepMemory
from dpo_lightning.preflight import main
from dpo_lightning.run.guard import guarded
from dpo_lightning.settings.schema import CONF, Config
from dpo_lightning.settings.validation import validate
from dpo_lightning.training.traced import traced_optimizer
from tests.support.memory_page import config_of
from tests.support.real_steps import step_memory, training
from tests.support.runs import TINY, run_train


@functools.cache
def llama_8b() -> StepMemory:
    return step_memory(config_of("8B"), GroupLengths((512, 256, 256), (512, 256, 256)))


def on_gpu(**changes) -> Training:
    values = {"kind": "cuda", "compute_bytes": 2, "masters": True, "tokens": 4096}
    return training(**(values | changes))


def estimate(**changes) -> MemoryEstimate:
    values = {
        "memory": llama_8b(), "training": on_gpu(), "device_bytes": 80 * GIB, "devices": 1
    }  # fmt: skip
    return MemoryEstimate(**(values | changes))


def on_large_gpu(config: Config, model: str) -> MemoryEstimate:
    """Training that the settings come to on GPUs of 80 GiB."""
    return estimate_on(config, model, 80 * GIB)


def estimate_on(config: Config, model: str, device_bytes: int) -> MemoryEstimate:
    settings, hardware = memory_settings(config), decide_hardware(config.trainer, kind="cuda")
    memory = step_memory_of(settings, config_of(model), make_optimizer=traced_optimizer)
    return estimate_of(settings, hardware, memory, device_bytes=device_bytes)


def test_what_does_not_fit_is_one_line_with_the_remedies_in_order():
    with pytest.raises(UserError) as caught:
        check_fits(estimate(), "stop")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("model.dtype=float32 optimizer=adamw data.micro_batch_tokens=4096")
    assert "of 80.0 GiB: weights 15.0, masters 29.9" in message
    assert "and may take 93% of it; each of these helps: " in message
    order = [
        *("data.micro_batch_tokens=1024 (", "model.gradient_checkpointing=true ("),
        *("optimizer=adamw_8bit (", "model.dtype=bfloat16 (", "trainer.memory_check=warn"),
    ]
    places = [message.index(name) for name in order]
    assert places == sorted(places)


def test_what_fits_or_is_not_to_be_checked_says_nothing(caplog):
    check_fits(estimate(device_bytes=800 * GIB), "stop")
    check_fits(estimate(device_bytes=None), "stop")
    check_fits(estimate(), "off")
    assert caplog.text == ""
    check_fits(estimate(), "warn")
    assert "training takes about" in caplog.text


def test_a_cpu_is_only_warned_of(caplog):
    check_fits(estimate(training=training(tokens=600), device_bytes=GIB), "stop")
    assert "training takes about" in caplog.text
    assert "memory_check" not in caplog.text


def test_each_remedy_takes_what_it_says_and_those_that_do_not_help_are_left_out():
    now = estimate()
    found = dict(remedies(now))
    half = dataclasses.replace(now.training, weight_bytes=2, masters=False)
    assert found["model.dtype=bfloat16"] == now.memory.footprint(half).total
    assert all(size < now.footprint.total for size in found.values())
    small = dataclasses.replace(half, optimizer="adamw_8bit", checkpointing=True, tokens=1024)
    keys = ("model.dtype", "optimizer", "model.gradient_checkpointing", "data.micro_batch_tokens")
    assert not [name for name, _ in remedies(estimate(training=small)) if name.startswith(keys)]


def typed(*words: str) -> Config:
    """The settings of a line: a group's choice is the file of that name, anything else a value."""
    cfg = OmegaConf.structured(Config)
    for key, value in (word.split("=") for word in words):
        chosen = OmegaConf.from_dotlist([f"{key}={value}"])
        if "." not in key:
            chosen = OmegaConf.create({key: OmegaConf.load(CONF / key / f"{value}.yaml")})
        cfg = OmegaConf.merge(cfg, chosen)
    return validate(cfg)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("", {"peft", "strategy", "optimizer", "model.dtype"}),
        ("trainer.devices=4", {"peft", "strategy", "optimizer", "model.dtype"}),
        (
            "trainer.devices=4 strategy=fsdp strategy.sync_gradients=step",
            {"peft", "strategy.sync_gradients", "model.dtype"},
        ),
        ("peft=lora", set()),
        ("model.dtype=bfloat16", {"peft", "strategy", "optimizer"}),
    ],
)
def test_each_remedy_can_be_typed_and_takes_what_it_says(words: str, names: set[str]):
    """The same settings with those of the remedy come to the bytes that it promises, to 0.2%.

    Adapters of bfloat16 weights may have float32 ones, which the numbers alone do not tell.
    """
    fixed = "data.micro_batch_tokens=4096 model.gradient_checkpointing=false"
    fixed += f" trainer.accelerator=gpu trainer.precision=bf16-mixed {words}"

    def total(more: str) -> MemoryEstimate:
        config = typed(*fixed.split(), *more.split())
        return on_large_gpu(config, "8B")

    found = dict(remedies(total("")))
    names = names | {"data.micro_batch_tokens", "model.gradient_checkpointing"}
    assert names <= {name.partition("=")[0] for name in found}
    taken = {name: total(name).footprint.total for name in found}
    assert found == pytest.approx(taken, rel=0.002)


@pytest.mark.parametrize(
    ("changes", "devices", "mixed", "expected"),
    [
        ({}, 1, False, {"weight_bytes": 4, "compute_bytes": 4, "masters": False}),
        ({}, 1, True, {"weight_bytes": 4, "compute_bytes": 2, "masters": True, "autocast": False}),
        ({}, 2, True, {"compute_bytes": 2, "masters": False, "autocast": True, "shards": 1,
                         "buckets": True}),
        ({"model.dtype": "bfloat16"}, 1, False, {"weight_bytes": 2, "compute_bytes": 2}),
        ({"model.dtype": "bfloat16"}, 1, True, {"weight_bytes": 2, "masters": False}),
        ({"optimizer.name": "adamw_8bit"}, 1, True, {"optimizer": "adamw_8bit"}),
        ({"reference.kind": "live"}, 1, True, {"live_reference": True, "moving_reference": False}),
        ({"reference.sync_every": 9}, 1, True, {"live_reference": True, "moving_reference": True}),
        ({"strategy.name": "fsdp"}, 8, True,
         {"shards": 8, "whole_gradients": None, "masters": False, "autocast": False,
          "buckets": False}),
    ],
)  # fmt: skip
def test_settings_come_to_a_way_of_training(changes, devices, mixed, expected):
    config = Config()
    for key, value in changes.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    found = plan_training(memory_settings(config), "cuda", devices=devices, mixed=mixed)
    assert {name: getattr(found, name) for name in expected} == expected


def test_adapters_of_the_settings_are_counted():
    config = Config()
    config.peft = SimpleNamespace(
        kind="lora", r=8, quantization="nf4", target_modules=["q_proj"], dora=True
    )
    config.strategy.sync_gradients = "micro_batch"
    config.strategy.name = "fsdp"
    found = plan_training(memory_settings(config), "cuda", devices=8, mixed=True)
    assert found.adapters == AdapterFacts(8, ("q_proj",), dora=True, four_bit=True)
    assert found.whole_gradients is False


def test_a_longer_group_is_a_micro_batch_of_its_own():
    budget = Budget(1000, checkpointing=True)
    assert with_budget(training(), budget, longest=1500).tokens == 1500
    assert with_budget(training(), budget, longest=500).checkpointing


def test_an_estimate_needs_no_weights_and_no_gpu():
    config = Config()
    found = on_large_gpu(config, "70B")
    assert found.memory.parameters == 70_553_706_496
    assert found.training.masters
    assert found.footprint.total > 1000 * GIB
    assert not found.fits


@pytest.mark.slow  # starts processes
def test_the_command_prints_a_table_and_the_refusal(tmp_path, capsys):
    model, rows = tmp_path / "config.json", tmp_path / "pairs.jsonl"
    model.write_text(json.dumps({"model_type": "llama"} | config_of("8B").to_diff_dict()))
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    words = [f"model.config={model}", f"data.train={rows}"]
    assert main([*words, "--gib", "80"]) == 2
    said = capsys.readouterr()
    assert "8,030,261,248 parameters" in said.out
    assert "masters" in said.out
    assert said.err.count("\n") == 1
    assert said.err.startswith("error: model.dtype=float32")
    assert main([*words, "--gib=80", "model.dtype=bfloat16", "optimizer=adamw_8bit"]) == 0
    assert "total" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gib", "much"], "--gib much: needs the memory of a GPU"),
        (["--gib"], "--gib: needs a value behind it"),
        (["bta=1"], "did you mean `beta`?"),
        (["beta=1,2"], "beta=1,2 gives several values"),
    ],
)
def test_a_wrong_command_is_one_line(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_what_kernels_of_others_say_when_they_are_imported_is_not_shown(caplog):
    """PEFT imports torchao where it is installed, which tells of files that it cannot load."""

    def command(argv: list[str]) -> int:
        for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
            logging.getLogger(name).warning("Failed to load %s", name)
        logging.getLogger("dpo_lightning.preflight").warning("our own")
        return 0

    assert guarded(command, []) == 0
    assert caplog.messages == ["our own"]


@pytest.mark.slow
def test_a_run_says_its_estimate_and_keeps_it(tmp_path, capsys, monkeypatch):
    run = run_train(tmp_path / "run", *TINY, "trainer.accelerator=cpu", "trainer.max_steps=1")
    assert run.code == 0
    parts = run.result["memory"]["estimated_bytes"]
    # 74,624 float32 weights with 64 bytes of rotary frequencies, and two moments.
    assert (parts["weights"], parts["optimizer"]) == (298560, 596992)
    assert "GiB: " in capsys.readouterr().out
    # As if it were a GPU with less than that; nothing is loaded then.
    monkeypatch.setattr("dpo_lightning.memory.hardware.device_kind", lambda accelerator: "cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("dpo_lightning.memory.budget.memory_of", lambda device: 1 << 20)
    monkeypatch.setattr("dpo_lightning.run.prepare._load_models", lambda *_: 1 / 0)
    small = run_train(tmp_path / "small", *TINY, "trainer.accelerator=cpu")
    assert small.code == 2
    assert "trainer.memory_check=warn" in small.result["error"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "masters"), [("bf16-mixed", True), ("16-mixed", False)])
def test_float16_is_autocast_and_is_not_advised_to_hold_bfloat16(precision: str, masters: bool):
    """One device: float32 weights with copies by autocast, and not masters behind a rounding."""
    config = Config()
    config.trainer.precision = precision
    found = estimate_on(config, "1B", GIB)
    assert (found.training.masters, found.training.autocast) == (masters, not masters)
    assert found.training.compute_bytes == 2
    assert ("model.dtype=bfloat16" in dict(remedies(found))) is masters


@pytest.mark.parametrize(
    ("kind", "weights", "asked"),
    [
        ("cuda", 1, True),
        ("cpu", 232, False),
        ("cpu", 233, True),
    ],
)
def test_ahead_of_loading_a_cpu_is_asked_of_its_weights_alone(monkeypatch, kind, weights, asked):
    """93% of 1,000 bytes are 930: room for 232 weights of 4 bytes and not for 233."""
    monkeypatch.setattr("dpo_lightning.memory.budget.memory_of", lambda _: 1000)
    config = Config()
    hardware = decide_hardware(config.trainer, kind=kind)
    memory = SimpleNamespace(parameters=weights)
    assert may_not_load(memory, memory_settings(config), hardware) is asked
