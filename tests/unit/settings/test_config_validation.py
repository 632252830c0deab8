"""Faults of a composed config: each is a clause that names key, value and remedy."""

import functools
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from dpo_lightning.errors import UserError
from dpo_lightning.settings.credentials import is_secret
from dpo_lightning.settings.keys import is_known
from dpo_lightning.settings.messages import unknown_key, unknown_option
from dpo_lightning.settings.schema import Config
from dpo_lightning.settings.validation import validate


def composed(**values: Any) -> DictConfig:
    """A config as Hydra composes it, with values set by dotted keys (``__`` for the dot)."""
    cfg = OmegaConf.structured(Config)
    for key, value in values.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    assert isinstance(cfg, DictConfig)
    return cfg


def problem(cfg: DictConfig, **flags: bool) -> str:
    with pytest.raises(UserError) as caught:
        validate(cfg, **flags)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Any]:
    """Rows and a model of one's own, as keyword arguments of ``composed``."""
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()
    return {
        "data__train": str(tmp_path / "rows.jsonl"),
        "model__pretrained": str(tmp_path / "model"),
    }


def test_defaults_are_valid() -> None:
    assert validate(composed()) == Config()


def test_result_is_plain_typed_objects() -> None:
    config = validate(composed(beta=1, optimizer__betas=[0, 0.5], logger__tags=["a"]))
    assert type(config) is Config
    assert type(config.beta) is float
    assert config.optimizer.betas == [0.0, 0.5]
    assert type(config.logger.tags) is list


def test_hydras_own_node_is_left_alone() -> None:
    cfg = OmegaConf.create({"hydra": {"job": {"num": "???"}}, "beta": 0.3})
    assert validate(cfg).beta == 0.3


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("bta", "`beta`"),
        ("trainer.max_stepz", "`trainer.max_steps`"),
        ("modle.pretrained", "`model.pretrained`"),
        ("max_length", "`data.max_length`"),
        ("precision", "`trainer.precision`"),
        ("label_smoothing", "`loss.label_smoothing`"),
        ("experimnt", "`experiment`"),
        ("hydra.run.dri", "`hydra.run.dir`"),
        ("loss.beta", "beta has one place: beta="),
        ("trainer.accumulate_grad_batches", "data.micro_batch_tokens"),
        ("trainer.gradient_clip_val", "optimizer.max_grad_norm="),
        ("learning_rate", "optimizer.lr="),
        ("epochs", "trainer.max_epochs="),
        ("dataset", "data.train="),
        ("model_name_or_path", "model.pretrained="),
        ("qqqqq", "--help-all"),
    ],
)
def test_an_unknown_key_is_answered_with_the_one_that_was_meant(key: str, meant: str) -> None:
    answer = unknown_key(key)
    assert answer.startswith(f"{key}: unknown key")
    assert meant in answer


def test_unknown_keys_at_any_depth_are_all_named() -> None:
    text = problem(composed(bta=1, data__controlled__sise=3, beta=-1))
    assert "bta: unknown key; did you mean `beta`?" in text
    assert "data.controlled.sise: unknown key" in text
    assert "beta=-1: must be" in text


@pytest.mark.parametrize(
    "key",
    [
        "logger.api_key",
        "wandb_api_key",
        "hf_token",
        "token",
        "logger.password",
        "data.secret",
        "apikey",
    ],
)
def test_a_secret_is_refused_and_never_repeated(key: str) -> None:
    assert is_secret(key)
    text = problem(composed(**{key.replace(".", "__"): "hunter2"}))
    assert "wandb login" in text
    assert "hunter2" not in text


def test_a_secret_is_refused_where_keys_are_free() -> None:
    text = problem(composed(model__config="a/b", model__config_overrides={"hf_token": "hunter2"}))
    assert "model.config_overrides.hf_token" in text
    assert "hunter2" not in text


@pytest.mark.parametrize("key", ["model.tokenizer", "data.micro_batch_tokens", "pad_token_id"])
def test_words_with_token_in_them_are_no_secrets(key: str) -> None:
    assert not is_secret(key)


def test_known_keys() -> None:
    assert is_known("beta")
    assert is_known("data.controlled.train_groups")
    assert is_known("model.config_overrides.hidden_size")
    assert is_known("optimizer.betas.0")
    assert is_known("optimizer.betas[0]")
    assert not is_known("beta.x")
    assert not is_known("optimizer.betas.first")
    assert not is_known("model.nope")


@pytest.mark.parametrize(
    ("group", "option", "hint"),
    [
        ("model", "lama", "did you mean model=llama?"),
        ("model", "EleutherAI/pythia-70m", "model.pretrained="),
        ("data", "mine.jsonl", "data.train="),
    ],
)
def test_an_unknown_choice_lists_what_there_is(group: str, option: str, hint: str) -> None:
    answer = unknown_option(group, option, ["llama", "other"])
    assert f"{group}={option}" in answer
    assert "llama, other" in answer
    assert hint in answer


BAD_VALUES: list[tuple[str, Any]] = [
    ("beta", 0),
    ("beta", -1),
    ("beta", float("nan")),
    ("beta", float("inf")),
    ("seed", -1),
    ("seed", 2**32),
    ("loss.name", "dpo"),
    ("loss.label_smoothing", 0.5),
    ("loss.label_smoothing", -0.1),
    ("optimizer.lr", 0),
    ("optimizer.lr", float("inf")),
    ("optimizer.betas", [0.9]),
    ("optimizer.betas", [0.9, 1.0]),
    ("optimizer.betas", [-0.1, 0.9]),
    ("optimizer.betas", [0.9, float("nan")]),
    ("optimizer.eps", 0),
    ("optimizer.weight_decay", -0.1),
    ("optimizer.max_grad_norm", 0),
    ("optimizer.schedule", "step"),
    ("optimizer.warmup", -0.1),
    ("optimizer.warmup", 1.5),
    ("optimizer.warmup", float("nan")),
    ("optimizer.warmup", float("inf")),
    ("data.batch_size", 0),
    ("data.micro_batch_tokens", 0),
    ("data.max_length", 1),
    ("data.eval_fraction", 1.0),
    ("data.eval_fraction", -0.1),
    ("data.max_dropped", 1.1),
    ("data.max_dropped", -0.1),
    ("data.num_workers", -1),
    ("data.controlled.train_groups", 0),
    ("data.controlled.eval_groups", 0),
    ("data.truncation", "left"),
    ("data.format", "parrot"),
    ("data.on_bad_row", "ignore"),
    ("model.dtype", "float16"),
    ("reference.kind", "cache"),
    ("trainer.max_steps", 0),
    ("trainer.max_epochs", 0),
    ("trainer.max_time", "10m"),
    ("trainer.max_time", "00:00:00:00"),
    ("trainer.log_every_n_steps", 0),
    ("trainer.devices", 0),
    ("trainer.devices", -1),
    ("trainer.devices", True),
    ("trainer.devices", "all"),
    ("trainer.devices", "0"),
    ("trainer.devices", []),
    ("trainer.devices", [0, 0]),
    ("trainer.devices", [0, -1]),
    ("trainer.devices", 1.5),
    ("trainer.num_nodes", 0),
    ("trainer.precision", "16"),
    ("trainer.accelerator", "cud"),
    ("trainer.profiler", "fast"),
    ("trainer.threads", 0),
    ("strategy.name", "deepspeed"),
    ("strategy.sync_gradients", "never"),
    ("strategy.timeout_minutes", 0),
    ("logger.name", "comet"),
    ("logger.mode", "on"),
    ("logger.project", ""),
    ("checkpoint.every_n_steps", 0),
    ("checkpoint.keep", 0),
    ("evaluation.every_n_steps", 0),
    ("evaluation.samples", -1),
    ("evaluation.max_new_tokens", 0),
    ("name", ""),
    ("name", "x" * 81),
    ("name", "two\nlines"),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=lambda part: str(part)[:20])
def test_a_value_out_of_range_is_refused(key: str, value: Any) -> None:
    text = problem(composed(**{key.replace(".", "__"): value}))
    assert text.startswith(f"{key}=")
    assert ": must " in text
    assert ";" not in text or "did you mean" in text, "one problem, one clause"


GOOD_VALUES: list[tuple[str, Any]] = [
    ("beta", 1e-4),
    ("seed", 0),
    ("seed", 2**32 - 1),
    ("loss.label_smoothing", 0.49),
    ("optimizer.betas", [0, 0.999]),
    ("optimizer.max_grad_norm", None),
    ("optimizer.warmup", 0),
    ("optimizer.warmup", 100),
    ("data.eval_fraction", 0),
    ("data.max_dropped", 1),
    ("trainer.devices", [1, 0]),
    ("trainer.max_time", "00:00:00:01"),
    ("trainer.precision", "bf16-mixed"),
    ("checkpoint.every_n_steps", None),
    ("evaluation.samples", 0),
    ("name", "größe 1"),
]


@pytest.mark.parametrize(("key", "value"), GOOD_VALUES)
def test_a_value_at_the_edge_is_taken_as_it_is(key: str, value: Any) -> None:
    config = validate(composed(**{key.replace(".", "__"): value}))
    assert functools.reduce(getattr, key.split("."), config) == value


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ({"beta": "abc"}, "beta=abc: must be a finite number > 0"),
        ({"seed": 1.5}, "seed=1.5: must be a whole number"),
        ({"seed": True}, "seed=True: must be a whole number"),
        ({"beta": None}, "beta=null: must be"),
        ({"debug": {"traceback": "maybe"}}, "debug.traceback=maybe: must be true or false"),
        ({"optimizer": {"betas": ["x", 1]}}, "optimizer.betas=x: must be two numbers"),
        ({"optimizer": {"betas": 3}}, "optimizer.betas: must be two numbers"),
        ({"data": {"controlled": 5}}, "data.controlled=5: must be keys below it (train_groups"),
        ({"data": {"columns": 5}}, "data.columns: must be a mapping"),
        ({"name": "${nope}"}, "name: Interpolation key 'nope' not found"),
    ],
)
def test_a_value_of_another_type_is_refused(content: dict[str, Any], fragment: str) -> None:
    assert fragment in problem(OmegaConf.create(content))


def test_precision_bf16_true_holds_the_weights_in_bfloat16() -> None:
    assert validate(composed(trainer__precision="bf16-true")).model.dtype == "bfloat16"
    assert validate(composed(trainer__precision="bf16-mixed")).model.dtype == "float32"


@pytest.mark.parametrize(
    ("given", "normal"),
    [("auto", "auto"), (2, 2), ("2", 2), ("0,1", [0, 1]), ("1,", [1]), ([0, 1], [0, 1])],
)
def test_devices_have_one_form(given: Any, normal: Any) -> None:
    assert validate(composed(trainer__devices=given)).trainer.devices == normal


@pytest.mark.parametrize(
    "key",
    [
        *("model.pretrained", "model.tokenizer", "model.config", "peft.adapter", "resume"),
        *("reference.pretrained", "reference.adapter", "reference.cache_dir", "evaluation.judge"),
        *("data.train", "data.eval", "data.chat_template"),
    ],
)
def test_every_path_may_begin_at_home(
    key: str, own: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("tokenizer.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "model" / name).touch()
    is_file = key in ("data.train", "data.eval", "data.chat_template")
    if key == "model.config":
        own["model__pretrained"] = None
    if "adapter" in key:
        own["peft__kind"] = "lora"
    name = "rows.jsonl" if is_file else "model"
    config = validate(composed(**{**own, key.replace(".", "__"): f"~/{name}"}))
    assert functools.reduce(getattr, key.split("."), config) == str(tmp_path / name)


def test_own_rows_and_model_are_valid(own: dict[str, Any]) -> None:
    config = validate(composed(**own))
    assert (config.data.train, config.model.pretrained) == tuple(own.values())
    config = validate(composed(**own, data__eval=own["data__train"], model__tokenizer="a/b"))
    assert (config.data.eval, config.model.tokenizer) == (own["data__train"], "a/b")


def test_what_does_not_fit_together_is_refused(own: dict[str, Any]) -> None:
    assert "model.config=a/b makes a random model" in problem(composed(**own, model__config="a/b"))


def test_resume_auto_wants_a_folder_that_stays() -> None:
    assert validate(composed(resume="auto"), explicit_run_dir=True).resume == "auto"
    assert "hydra.run.dir=" in problem(composed(resume="auto"))


@pytest.mark.parametrize(
    "values",
    [{"trainer__devices": 2}, {"trainer__devices": [0, 1]}, {"trainer__num_nodes": 2}],
)
def test_trials_in_one_process_have_one_device(values: dict[str, Any]) -> None:
    text = problem(composed(**values), multirun=True)
    assert next(iter(values)).replace("__", ".") in text
    assert "hydra/launcher=devices" in text
    validate(composed(**values))


def test_auto_devices_are_one_in_a_sweep() -> None:
    assert validate(composed(), multirun=True).trainer.devices == 1
    assert validate(composed()).trainer.devices == "auto"


def test_several_problems_are_one_line() -> None:
    text = problem(composed(beta=-1, seed=-1, trainer__max_steps=0))
    assert text.count("; ") == 2
