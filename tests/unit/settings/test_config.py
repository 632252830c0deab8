"""The schemas: closed, mirrored from other libraries where they say so, and named plainly."""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ValidationError

from dpo_lightning.settings.keys import settings
from dpo_lightning.settings.names import (
    LONGEST_NAME,
    model_label,
    name_of_trial,
    run_name,
    slug,
    trial_name,
)
from dpo_lightning.settings.schema import Config, OptimizerConfig, TrainerConfig
from tests.support.runs import ROOT

PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")


def test_schema_is_closed_and_typed() -> None:
    schema = OmegaConf.structured(Config)
    with pytest.raises(ConfigAttributeError):
        schema.bta = 1
    with pytest.raises(ConfigAttributeError):
        schema.trainer.max_stepz = 1
    with pytest.raises(ValidationError):
        schema.beta = "abc"


def test_settings_lists_every_key_with_its_type() -> None:
    found = settings()
    assert list(found)[:4] == ["beta", "seed", "name", "resume"]
    assert found["beta"].kind is float
    assert found["optimizer.lr"].optional
    assert not found["optimizer.eps"].optional
    assert found["data.controlled"].is_section
    assert found["data.controlled.train_groups"].kind is int
    assert found["data.columns"].kind is dict
    assert found["logger.tags"].kind is list
    assert found["trainer.devices"].kind is object


def test_two_configs_share_no_mutable_value() -> None:
    first, second = Config(), Config()
    first.optimizer.betas.append(0.5)
    first.data.columns["prompt"] = "question"
    assert second.optimizer.betas == [0.9, 0.999]
    assert second.data.columns == {}


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in _leaves(child, f"{prefix}.{name}" if prefix else name).items()
    }


# What a file repeats although it is the default: which choice it is.
CHOICES = {
    *("model.name", "data.name", "loss.name", "strategy.name", "logger.name"),
    *("reference.kind", "peft.kind", "optimizer.name"),
}


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "conf").glob("*/*.yaml")),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_a_file_states_only_what_differs_from_the_schema(path: Path) -> None:
    text = path.read_text()
    content = OmegaConf.to_container(OmegaConf.create(text) if text.strip() else OmegaConf.create())
    assert isinstance(content, dict)
    content.pop("defaults", None)
    is_global = "# @package _global_" in text
    leaves = _leaves(content if is_global else {path.parent.name: content})
    defaults = _leaves(dataclasses.asdict(Config()))
    shipped_example = path.parent.name in ("experiment", "debug")
    for key, value in leaves.items():
        if value == {} or shipped_example:
            continue
        if key.startswith(("loss.terms.", "logger.name.")):
            continue  # losses are the keys, and loggers
        assert key in defaults, key
        assert key in CHOICES or defaults[key] != value, f"{path.name} repeats the default of {key}"


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("my run", "my-run"),
        ("../../x", "x"),
        ("..", "run"),
        (".", "run"),
        ("", "run"),
        (".hidden", "hidden"),
        ("/etc/passwd", "etc-passwd"),
        ("a" * 200, "a" * 80),
        ("größe", "gr-e"),
        ("beta-0.1_seed-1", "beta-0.1_seed-1"),
    ],
)
def test_slug(text: str, name: str) -> None:
    # "größe": the two letters beside each other become one dash.
    assert slug(text) == name


@given(st.text())
def test_slug_is_one_plain_folder_name(text: str) -> None:
    name = slug(text)
    assert PLAIN_NAME.fullmatch(name)
    assert Path("root", name).resolve().parent == Path("root").resolve()
    assert slug(name) == name


def test_run_name_is_the_given_one_or_says_what_was_run() -> None:
    assert run_name("mine", "llama", "sigmoid", 0.1, 3) == "mine"
    assert run_name(None, "llama", "sigmoid", 0.1, 3) == "llama-sigmoid-beta-0.1-seed-3"
    assert run_name(None, "meta/llama", "sft", 1.0, 0) == "meta-llama-sft-beta-1-seed-0"
    # What tells runs apart stays, however long a model's name is.
    long = run_name(None, "m" * 99, "sigmoid", 0.1, 3)
    assert long.endswith("m-sigmoid-beta-0.1-seed-3")
    assert len(long) == LONGEST_NAME


@pytest.mark.parametrize(
    ("pretrained", "config", "label"),
    [
        (None, None, "preset"),
        ("gpt2", None, "gpt2"),
        ("Qwen/Qwen3-0.6B", None, "Qwen3-0.6B"),
        ("../models/stories260k/", None, "stories260k"),
        ("outputs/runs/first/model", None, "first"),
        ("outputs/runs/first/model-merged/", None, "first"),
        (None, "shapes/small/config.json", "small"),
        ("model", None, "model"),
    ],
)
def test_a_model_is_called_by_its_weights(pretrained, config, label) -> None:
    assert model_label("preset", pretrained, config) == label


@pytest.mark.parametrize(
    ("trial", "name"),
    [
        ("beta-0.1_seed-2", "tiny-sigmoid-beta-0.1_seed-2"),
        ("optimizer.lr-1e-05", "tiny-sigmoid-optimizer.lr-1e-05-beta-0.1-seed-2"),
        ("beta-0.1_loss-ipo", "tiny-beta-0.1_loss-ipo-seed-2"),
        ("3", "tiny-sigmoid-3-beta-0.1-seed-2"),
    ],
)
def test_a_trial_is_called_by_what_is_swept_and_model_loss_beta_and_seed(trial, name) -> None:
    assert name_of_trial(trial, "tiny", "sigmoid", 0.1, 2) == name


def test_trial_name_keeps_trials_apart() -> None:
    assert trial_name("beta-0.1_seed-1", 7) == "beta-0.1_seed-1"
    assert trial_name("", 7) == "7"
    slashed, dashed = trial_name("data.train-a/b", 0), trial_name("data.train-a-b", 1)
    assert slashed != dashed
    assert slashed.startswith("data.train-a-b-")
    long = [trial_name("x" * 100 + end, 0) for end in "ab"]
    assert long[0] != long[1]
    assert all(PLAIN_NAME.fullmatch(name) for name in [slashed, dashed, *long])


# Keys that are handed to another library under its own name, held against its signature. Importing
# these imports torch, which is why it happens here and not where the config is checked.
MIRRORED_TRAINER = {
    "accelerator",
    "callbacks",
    "devices",
    "num_nodes",
    "precision",
    "max_steps",
    "max_epochs",
    "max_time",
    "log_every_n_steps",
    "deterministic",
    "detect_anomaly",
    "enable_progress_bar",
    "profiler",
}
OWN_TRAINER = {"max_skipped_steps", "memory_check", "threads"}


def test_trainer_keys_are_those_of_lightning() -> None:
    from lightning.pytorch import Trainer

    fields = {item.name for item in dataclasses.fields(TrainerConfig)}
    assert fields == MIRRORED_TRAINER | OWN_TRAINER
    assert set(inspect.signature(Trainer.__init__).parameters) >= MIRRORED_TRAINER


@pytest.mark.parametrize("profiler", settings()["trainer.profiler"].rule["choices"])
def test_profilers_are_those_of_lightning(profiler: str) -> None:
    from lightning.pytorch import Trainer

    trainer = Trainer(profiler=profiler, accelerator="cpu", logger=False, max_steps=1)
    assert type(trainer.profiler).__name__.lower().startswith(profiler)


def test_optimizer_keys_are_those_of_adamw() -> None:
    import torch

    fields = {item.name for item in dataclasses.fields(OptimizerConfig)}
    own = {"max_grad_norm", "schedule", "warmup", "name", "stochastic_rounding"}
    assert own < fields
    assert fields - own <= set(inspect.signature(torch.optim.AdamW.__init__).parameters)
    assert fields - own == {"lr", "betas", "eps", "weight_decay"}


def test_schedules_are_those_of_transformers() -> None:
    from transformers import SchedulerType

    names = {member.value for member in SchedulerType}
    assert set(settings()["optimizer.schedule"].rule["choices"]) <= names


def test_dtypes_are_those_of_torch() -> None:
    import torch

    for name in settings()["model.dtype"].rule["choices"]:
        assert isinstance(getattr(torch, name), torch.dtype)


def test_losses_are_those_that_can_be_computed() -> None:
    from dpo_lightning.objectives import LISTWISE_LOSSES, PAIRWISE_LOSSES, listwise

    assert {"sigmoid", "sft", "simpo"} <= {*PAIRWISE_LOSSES}
    assert {*LISTWISE_LOSSES} == {*listwise.LISTWISE_LOSSES}
