"""Nothing from outside is run, nothing secret is kept, nothing is written outside a run's folder.

A canary is a file that the attack would make. Each attack here was seen to make it where the guard
is taken away.
"""

import importlib
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dpo_lightning import cli
from tests.support.commands import own_place
from tests.support.runs import TINY, run_train
from tests.support.warm import run_apart

QUICK = (*TINY, "evaluation.partition_samples=0", "trainer.max_steps=2")
TOKEN = "hf_" + "aB3" * 11
SECRET = "correct-horse-battery-staple"


class Evil:
    """An object that creates the canary file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture
def canary(tmp_path: Path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def one_line(capfd) -> str:
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err
    [said] = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    return said


# Weights and checkpoints ------------------------------------------------------------------------


def test_the_canary_sings(tmp_path):
    """The premise of the tests below: unpickled, it makes the file."""
    canary = tmp_path / "canary"
    torch.save({"x": Evil(canary)}, tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert canary.exists()


def test_an_evil_checkpoint(tmp_path, canary, capfd):
    path = tmp_path / "step-000003.ckpt"
    torch.save({"state_dict": {}, "global_step": 3, "x": Evil(canary)}, path)
    run = run_train(tmp_path / "run", *QUICK, f"resume={path}")
    assert run.code == 4
    said = one_line(capfd)
    assert f"resume={path}" in said
    assert run.result["status"] == "failed"


def test_an_evil_pickle(tmp_path, canary, capfd):
    path = tmp_path / "step-000003.ckpt"
    path.write_bytes(pickle.dumps(Evil(canary)))
    assert run_train(tmp_path / "run", *QUICK, f"resume={path}").code == 4
    assert f"resume={path}" in one_line(capfd)


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    return folder


def outcome(model: Path, rows: Path, tmp_path: Path, *more: str):
    few = ("trainer.max_steps=1", "evaluation.samples=0", "evaluation.partition_samples=0")
    return run_train(
        tmp_path / "run", f"model.pretrained={model}", f"data.train={rows}", *few, *more
    )


@pytest.mark.parametrize("key", ["model.pretrained", "reference.pretrained"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.bin"])
def test_pickled_weights(model, tiny_model, pairs_file, tmp_path, canary, capfd, key, name):
    (model / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil(canary)}, model / name)
    policy, more = (model, ()) if key == "model.pretrained" else (tiny_model, (f"{key}={model}",))
    assert outcome(policy, pairs_file, tmp_path, *more).code == 2
    assert f"{key}={model}: no weights" in one_line(capfd)


def test_without_an_attack_the_folder_trains(model, pairs_file, tmp_path):
    assert outcome(model, pairs_file, tmp_path).code == 0


def test_a_pickled_adapter(model, pairs_file, tmp_path, canary, capfd):
    """transformers takes an adapter that lies beside a model without being asked."""
    about = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    about["base_model_name_or_path"] = str(model)
    (model / "adapter_config.json").write_text(json.dumps(about))
    torch.save({"x": Evil(canary)}, model / "adapter_model.bin")
    assert outcome(model, pairs_file, tmp_path).code == 2
    assert "model.pretrained" in one_line(capfd)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_beside_a_model(model, pairs_file, tmp_path, canary, part):
    """An ``auto_map`` names it; the architecture is one that is known, whose own code is used."""
    name = "config.json" if part == "model" else "tokenizer_config.json"
    values = json.loads((model / name).read_text())
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    if part == "tokenizer":
        classes = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (model / name).write_text(json.dumps(values | {"auto_map": classes}))
    (model / "evil.py").write_text(f"open({str(canary)!r}, 'w')\nclass Evil: pass\n")
    assert outcome(model, pairs_file, tmp_path).code == 0


@pytest.mark.parametrize(
    "typed",
    [
        "resume=http://127.0.0.1:9/evil.ckpt",
        "resume=https://host/evil.ckpt",
        "resume=s3://bucket/evil.ckpt",
        "model.pretrained=https://host/model",
        "reference.pretrained=http://host/model",
        "model.tokenizer=https://host/model",
        "data.train=https://host/rows.jsonl",
        "data.eval=https://host/rows.jsonl",
        "evaluation.judge=https://host/model",
    ],
)
def test_addresses_are_not_loaded(typed, tmp_path, capfd, monkeypatch):
    with own_place(tmp_path):
        words = {"data.train": "rows.jsonl", "model.pretrained": "model"}
        key, _, value = typed.partition("=")
        assert cli.main([f"{k}={v}" for k, v in (words | {key: value}).items()]) == 2
    assert f"{typed}: addresses are not" in one_line(capfd)


# Settings that name code ------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a module that makes the canary."""
    monkeypatch.syspath_prepend(tmp_path)
    canary = str(tmp_path / "canary")
    (tmp_path / "evil.py").write_text(f"def go(*a, **k):\n    open({canary!r}, 'w')\n")
    importlib.invalidate_caches()
    with own_place(tmp_path):
        yield tmp_path
    sys.modules.pop("evil", None)


HANDLER = "++hydra.job_logging.handlers.file"


@pytest.mark.parametrize(
    "typed",
    [
        "+x._target_=evil.go",
        "+hydra.callbacks.x._target_=evil.go",
        "+hydra.callbacks={x:{_target_:evil.go}}",
        "-m beta=1,2 +hydra.callbacks.x._target_=evil.go",
        "-m beta=1,2 hydra.launcher._target_=evil.go",
        "-m beta=1,2 hydra.sweeper._target_=evil.go",
        "-m beta=1,2 hydra/launcher=basic +hydra.callbacks.x._target_=evil.go",
        "logger={_target_:evil.go}",
        "model={_target_:evil.go}",
        f"{HANDLER}.class=evil.go",
        "++hydra.job_logging.formatters.plain.class=evil.go",
        "++hydra.hydra_logging.handlers.x.class=evil.go",
        "++hydra.job_logging.handlers.x={class:logging.StreamHandler,stream:ext://evil.go}",
        f"{HANDLER}={{class:logging.os.system,command:touch canary}}",
        "--cfg job +hydra.callbacks.x._target_=evil.go",
    ],
)
def test_settings_call_nothing(typed, place, canary, capfd):
    words = typed.replace("touch canary", "touch_canary").split(" ")
    assert cli.main([word.replace("touch_canary", "'touch canary'") for word in words]) == 2
    assert "evil.go" in (said := one_line(capfd)) or "os.system" in said or "_target_" in said


@pytest.mark.parametrize(
    "text",
    [
        "x: {_target_: evil.go}",
        "hydra: {callbacks: {x: {_target_: evil.go}}}",
        "hydra: {launcher: {_target_: evil.go}, mode: MULTIRUN, sweeper: {params: {beta: '1,2'}}}",
        "hydra: {job_logging: {handlers: {file: {class: evil.go}}}}",
        'hydra: {job_logging: {handlers: {file: {"()": evil.go}}}}',
        "model: {config_overrides: {_target_: evil.go}}",
        "hydra: {mode: MULTIRUN, sweeper: {params: {beta: '1', hydra.launcher._target_: evil.go}}}",
    ],
)
def test_files_call_nothing(text, place, canary, capfd):
    (place / "own" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    assert cli.main(["--config-dir=own", "experiment=mine"]) == 2
    one_line(capfd)


@pytest.mark.slow
def test_the_installed_launchers_and_sweepers_stay(place, capfd):
    for choice in ("hydra/launcher=basic", "hydra/launcher=devices"):
        assert cli.main(["-m", "beta=1,2", choice, "hydra.sweep.dir=s"]) == 0, capfd.readouterr()
    sampler = ["hydra/sweeper=optuna", "hydra/sweeper/sampler=random", "hydra.sweeper.n_trials=1"]
    words = ["-m", "beta=interval(0.1,1)", *sampler, "hydra.sweep.dir=s"]
    assert cli.main(words) == 0, capfd.readouterr()


# Where things are written -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", "a/../../b", "~/x"])
def test_names_stay_in_the_root_of_runs(name, place):
    assert cli.main([f"name='{name}'"]) == 0
    [run] = (place / "outputs" / "runs").iterdir()
    assert (run / ".hydra").is_dir()
    assert sorted(p.name for p in place.parent.iterdir() if p.name == "x") == []


@pytest.mark.parametrize(
    "typed",
    [
        "hydra.output_subdir=../../outside",
        "hydra.output_subdir=/tmp/outside",
        "hydra.job.name=../../outside",
        "-m beta=1,2 hydra.sweep.subdir=../outside",
        "-m beta=1,2 hydra.sweep.subdir=/tmp/outside",
    ],
)
def test_parts_of_a_run_stay_in_it(typed, place, capfd):
    assert cli.main(typed.split(" ")) == 2
    assert "outside" in one_line(capfd)
    assert not (place / "outputs").exists()


@pytest.mark.parametrize(
    "planted",
    [
        *("model", "checkpoints", "result.json", "config.yaml", "metrics.jsonl", ".hydra", "wandb"),
        *("checkpoints/step-000002.ckpt", ".hydra/config.yaml", "train.log", ".model.staged"),
    ],
)
def test_a_planted_link_is_not_followed(planted, place, capfd):
    victim = place / "victim"
    victim.mkdir()
    (victim / "kept").write_text("mine")
    link = place / "run" / planted
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if "." not in planted.lstrip(".") else victim / "kept")
    assert cli.main(["hydra.run.dir=run"]) == 2
    assert planted in one_line(capfd)
    assert [path.name for path in victim.iterdir()] == ["kept"]
    assert (victim / "kept").read_text() == "mine"


def test_a_trial_does_not_follow_a_planted_link(place, capfd):
    (place / "victim").mkdir()
    trial = place / "s" / "beta-1"
    trial.mkdir(parents=True)
    (trial / "model").symlink_to(place / "victim")
    words = ["-m", "beta=1,2", "hydra/launcher=basic", "hydra.sweep.dir=s"]
    assert cli.main(words) == 1
    assert "beta=1: " in (said := one_line(capfd))
    assert "model: a symbolic link" in said
    assert list((place / "victim").iterdir()) == []


def test_a_folder_that_its_owner_made_a_link_is_used(place):
    (place / "big-disk").mkdir()
    (place / "run").symlink_to(place / "big-disk")
    assert cli.main(["hydra.run.dir=run"]) == 0
    assert (place / "big-disk" / ".hydra").is_dir()


# Secrets ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "typed",
    [
        "+api_key=SECRET",
        "logger.api_key=SECRET",
        "WANDB_API_KEY=SECRET",
        "+WANDB_API_KEY=SECRET",
        "HF_TOKEN=SECRET",
        "++hydra.job.env_set.HF_TOKEN=SECRET",
        "hydra.job.env_set={WANDB_API_KEY:SECRET}",
        "+data.columns.token=SECRET data.train=rows.jsonl model.pretrained=model",
        "name=TOKEN",
        "beta=TOKEN",
        "TOKEN",
        "--TOKEN",
        "model.pretrained=TOKEN",
        "data.train=TOKEN",
        "logger.tags=[a,TOKEN]",
        "-m name=a,TOKEN",
        "model=TOKEN",
        "hydra.run.dir=TOKEN",
        "--config-dir=TOKEN",
        "--config-name TOKEN",
        "resume=https://me:SECRET@host/x",
        "name=${oc.env:MY_TOKEN}",
        "hydra.run.dir=${oc.env:MY_TOKEN}",
        "-m beta=1,2 name=${oc.env:MY_TOKEN}",
        "--cfg job name=TOKEN",
    ],
)
def test_secrets_are_refused_and_leave_no_trace(typed, place, capfd, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", SECRET)
    words = typed.replace("SECRET", SECRET).replace("TOKEN", TOKEN) if "MY_" not in typed else typed
    # The names of variables are not the token.
    words = words.replace(f"HF_{TOKEN}", "HF_TOKEN")
    assert cli.main(words.split(" ")) == 2
    said = one_line(capfd)
    assert "credentials are no settings" in said
    assert SECRET not in said
    assert TOKEN not in said
    traces(place, SECRET, TOKEN)


def test_secrets_in_files_are_refused(place, capfd):
    for text in (
        f"logger: {{api_key: {SECRET}}}",
        f"name: {TOKEN}",
        f"hydra: {{job: {{env_set: {{WANDB_API_KEY: {SECRET}}}}}}}",
        f"hydra: {{job: {{env_set: {{X: {TOKEN}}}}}}}",
        f"model: {{config_overrides: {{a: {{b: [{TOKEN}]}}}}}}",
    ):
        (place / "own" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
        assert cli.main(["--config-dir=own", "experiment=mine"]) == 2
        said = one_line(capfd)
        assert "credentials are no settings" in said, text
        assert SECRET not in said
        assert TOKEN not in said
    (place / "own" / "experiment" / "mine.yaml").unlink()
    traces(place, SECRET, TOKEN)


def test_words_with_token_in_them_are_let_through(place, capfd):
    words = ["data.micro_batch_tokens=100", "evaluation.max_new_tokens=3", "name=token-study"]
    assert cli.main(words) == 0, capfd.readouterr()
    own = ["model.config=model", "data.train=rows.jsonl", "model.tokenizer=model/tokenizer"]
    (place / "model" / "tokenizer").mkdir()
    (place / "model" / "tokenizer" / "tokenizer.json").touch()
    own += ["model.config_overrides.pad_token_id=3", "data.columns.prompt=tokens"]
    assert cli.main(own) == 0, capfd.readouterr()


def traces(folder: Path, *secrets: str) -> None:
    """No file below the folder has one of the secrets in it or in its name."""
    paths = list(folder.rglob("*"))
    assert paths
    for path in paths:
        assert not any(secret in path.name for secret in secrets), path
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets), path


@pytest.mark.slow
def test_secrets_of_the_environment_are_in_no_file_of_a_run(tmp_path):
    """A wandb run that is recorded; the files are read byte by byte, the .wandb file too."""
    key = "0123456789abcdef" * 2 + "01234567"
    secrets = {"WANDB_API_KEY": key, "HF_TOKEN": TOKEN, "MY_SECRET": SECRET}
    done = run_apart(
        *(f"hydra.run.dir={tmp_path / 'run'}", *QUICK),
        env=secrets | {"WANDB_MODE": "offline", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb"))
    traces(tmp_path / "run", key, TOKEN, SECRET)
    assert not any(secret in done.stdout + done.stderr for secret in (key, TOKEN, SECRET))


def test_what_fails_shows_no_secret(tmp_path, capfd, monkeypatch):
    """A library's message has the key in it: not on the terminal, in the log or in the result."""
    from dpo_lightning.run import session

    monkeypatch.setenv("MY_TOKEN", SECRET)

    def fails(*arguments, **options):
        raise RuntimeError(f"401 for https://x?key={SECRET} and {TOKEN}")

    monkeypatch.setattr(session, "run_experiment", fails)
    run = run_train(tmp_path / "run", *QUICK)
    assert run.code == 1
    captured = capfd.readouterr()
    assert "RuntimeError: 401 for https://x?key=[hidden]" in captured.err
    assert SECRET not in captured.out + captured.err
    assert TOKEN not in captured.out + captured.err
    assert "[hidden]" in run.result["error"]
    traces(tmp_path, SECRET, TOKEN)


def test_the_pickle_of_an_earlier_job_is_not_run(place, canary, capfd):
    (place / "job.pickle").write_bytes(pickle.dumps(Evil(canary)))
    assert cli.main(["--experimental-rerun", "job.pickle"]) == 2
    one_line(capfd)
