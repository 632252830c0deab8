"""Settings that a run recorded, below what is typed."""

from pathlib import Path

import pytest
import yaml

from dpo_lightning import cli
from dpo_lightning.errors import UserError
from dpo_lightning.settings.compose import compose_one, ready_hydra
from dpo_lightning.settings.recorded import read_recorded, settings_file


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def record(folder: Path, *, as_typed: dict | None = None, cwd: Path | None = None, **sections):
    (folder / ".hydra").mkdir(parents=True)
    (folder / "checkpoints").mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    (folder / ".hydra" / "config.yaml").write_text(yaml.safe_dump(as_typed or {}))
    runtime = {"hydra": {"runtime": {"cwd": str(cwd or Path.cwd())}}}
    (folder / ".hydra" / "hydra.yaml").write_text(yaml.safe_dump(runtime))
    return folder


def composed(*words: str):
    with ready_hydra():
        return compose_one(list(words))


def test_what_is_typed_comes_on_top_of_what_was_recorded(place):
    record(
        place / "run",
        beta=0.4,
        seed=9,
        loss={"name": "ipo", "label_smoothing": 0.0},
        trainer={"max_steps": 30, "max_epochs": None},
        resume="elsewhere",
        overwrite=True,
    )
    found = composed("resume=run")
    assert (found.beta, found.seed, found.loss.name, found.trainer.max_steps) == (0.4, 9, "ipo", 30)
    assert (found.resume, found.overwrite) == ("run", False)
    # Values that are the defaults are typed all the same; a chosen file stands for its section.
    found = composed("resume=run", "beta=0.1", "loss=sigmoid")
    assert (found.beta, found.seed, found.loss.name) == (0.1, 9, "sigmoid")
    # A length that is typed is the whole length.
    found = composed("resume=run", "trainer.max_epochs=2")
    assert (found.trainer.max_steps, found.trainer.max_epochs) == (None, 2)
    found = composed("resume=auto", "hydra.run.dir=run", "trainer={log_every_n_steps:3}")
    assert (found.beta, found.trainer.max_steps, found.trainer.log_every_n_steps) == (0.4, 30, 3)
    assert composed("--config", "run/config.yaml", "seed=2").beta == 0.4
    assert composed("--config", "run").resume is None


def test_what_the_run_filled_in_is_open_again(place):
    filled = {"optimizer": {"lr": 1e-3}, "trainer": {"max_steps": 12}}
    record(place / "run", as_typed={"optimizer": {"lr": None}}, **filled)
    found = composed("resume=run")
    assert (found.optimizer.lr, found.trainer.max_steps) == (None, 12)


def test_paths_are_seen_from_where_they_were_typed(place):
    other = place / "other"
    other.mkdir()
    for name in ("rows.jsonl", "more.jsonl"):
        (other / name).touch()
    folder = record(
        place / "run",
        cwd=other,
        data={"train": "rows.jsonl", "eval": None},
        model={"pretrained": "org/name"},
        reference={"cache_dir": "cache"},
    )
    values = read_recorded(folder / "config.yaml").values
    assert values["data.train"] == str(other / "rows.jsonl")
    assert values["model.pretrained"] == "org/name"
    assert values["reference.cache_dir"] == str(other / "cache")


def test_a_checkpoint_names_its_runs_settings(place):
    folder = record(place / "run", beta=0.3)
    path = folder / "checkpoints" / "step-000002.ckpt"
    path.touch()
    for named in (folder, folder / "checkpoints", path):
        assert settings_file(str(named), None) == folder / "config.yaml"
    assert settings_file("auto", str(folder)) == folder / "config.yaml"
    assert settings_file("auto", None) is None
    assert settings_file(str(place), None) is None


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "beta: [1", "- 1", "\x00", "a: !!python/name:os.x"]
)
def test_what_are_no_settings_is_refused(place, text):
    folder = record(place / "run")
    (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match="no settings of a run, or they are damaged"):
        read_recorded(folder / "config.yaml")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "nope"], "--config nope: no such file"),
        (["--config", "run", "resume=run"], "both bring settings"),
        (["--config", "run", "-m", "beta=1,2"], "does one run again"),
        (["--config", "run", "--cfg", "job"], "read the file"),
        (["--config-dir", "run"], "--config run/config.yaml does again"),
    ],
)
def test_other_ways_are_answered(place, capsys, words, said):
    record(place / "run", beta=0.3)
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


def test_the_trials_of_a_sweep_have_all_their_settings(place, monkeypatch):
    record(place / "run", beta=0.3)
    monkeypatch.setenv("DPO_LIGHTNING_TRIAL", "1")
    assert composed("resume=run").beta == 0.1
