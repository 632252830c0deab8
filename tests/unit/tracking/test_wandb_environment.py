"""Variables of the environment that users of wandb know; what is set in the settings wins."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from dpo_lightning.settings.schema import LoggerConfig
from dpo_lightning.tracking.logger_settings import logger_settings
from dpo_lightning.tracking.wandb_runs import (
    note_run,
    ready_for_trials,
    report_sweep,
    start_run,
    sync_command,
    tag_pruned,
    untag_pruned,
    wandb_mode,
)

VARIABLES = (
    *("PROJECT", "NAME", "TAGS", "DISABLED", "MODE", "RUN_ID", "ENTITY", "RUN_GROUP", "NOTES"),
    "TRIAL_PREFIX",
)


@pytest.fixture(autouse=True)
def started(monkeypatch) -> list[dict[str, Any]]:
    """Arguments that wandb is called with; nothing is recorded, and the environment is empty."""
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    asked: list[dict[str, Any]] = []

    def init(**arguments: Any) -> Any:
        asked.append(arguments)
        return SimpleNamespace(id="abc", offline=True)

    monkeypatch.setattr(wandb, "init", init)
    return asked


def start(folder, *, run_name=None, **settings) -> Any:
    config = LoggerConfig(**{"mode": "offline", **settings})
    return start_run(
        logger_settings(config, run_name=run_name),
        run_name=run_name or "llama-sigmoid-beta-0.1",
        folder=folder,
        config={},
        continued=False,
    )


@pytest.mark.parametrize(
    ("variable", "argument", "without", "typed"),
    [
        ("PROJECT", "project", "dpo-lightning", {"project": "mine"}),
        ("NAME", "name", "llama-sigmoid-beta-0.1", {"run_name": "mine"}),
    ],
)
def test_a_variable_stands_for_what_is_not_set(
    variable, argument, without, typed, started, monkeypatch, tmp_path
):
    start(tmp_path)
    monkeypatch.setenv(f"WANDB_{variable}", "theirs")
    start(tmp_path)
    start(tmp_path, **typed)
    assert [asked[argument] for asked in started] == [without, "theirs", "mine"]


def test_what_is_none_is_left_to_wandb(started, monkeypatch, tmp_path):
    """Wandb reads these itself where it is given nothing."""
    for name in ("TAGS", "ENTITY", "RUN_GROUP", "RUN_ID"):
        monkeypatch.setenv(f"WANDB_{name}", "a,b")
    start(tmp_path)
    assert {started[0][name] for name in ("tags", "entity", "group", "id")} == {None}
    start(tmp_path, tags=["x"], entity="me", group="g")
    assert [started[1][name] for name in ("tags", "entity", "group")] == [["x"], "me", "g"]
    read = wandb.Settings()
    read.update_from_env_vars({"WANDB_TAGS": "a,b", "WANDB_RUN_ID": "i", "WANDB_RUN_GROUP": "g"})
    assert (read.run_tags, read.run_id, read.run_group) == (("a", "b"), "i", "g")


@pytest.mark.parametrize(
    ("variable", "value", "mode"),
    [
        *(("MODE", "offline", "offline"), ("MODE", "dryrun", "offline")),
        *(("MODE", "disabled", "disabled"), ("DISABLED", "true", "disabled")),
        *(("DISABLED", "1", "disabled"), ("DISABLED", "YES", "disabled")),
    ],
)
def test_a_mode_of_the_environment(variable, value, mode, monkeypatch, started, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv(f"WANDB_{variable}", value)
    assert wandb_mode("auto") == mode
    assert (start(tmp_path, mode="auto") is None) == (mode == "disabled")
    # A mode that was set stays.
    assert wandb_mode("offline") == "offline"


def test_what_is_not_disabled_is_recorded(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for value in ("false", "0", ""):
        monkeypatch.setenv("WANDB_DISABLED", value)
        assert wandb_mode("auto") == "offline"


def test_no_two_trials_have_one_id_or_one_name(started, monkeypatch, tmp_path, caplog):
    monkeypatch.setenv("WANDB_RUN_ID", "one")
    monkeypatch.setenv("WANDB_NAME", "study")
    monkeypatch.setenv("WANDB_TRIAL_PREFIX", "")
    ready_for_trials()
    [said] = caplog.records
    assert said.getMessage().startswith("WANDB_RUN_ID names one run: the trials of a sweep have")
    for beta in ("0.1", "0.2"):
        folder = tmp_path / f"beta-{beta}"
        folder.mkdir()
        start(folder)
    assert [asked["name"] for asked in started] == ["study-beta-0.1", "study-beta-0.2"]
    assert "WANDB_RUN_ID" not in os.environ


def test_the_report_of_a_sweep_is_in_the_group_of_its_trials(monkeypatch, started, tmp_path):
    def report(**settings: Any) -> None:
        with pytest.raises(AttributeError):  # there is no run to log to
            report_sweep(
                logger_settings(LoggerConfig(mode="offline", **settings)),
                tmp_path,
                columns=(),
                rows=(),
                picture=tmp_path,
                summary={},
            )

    report()
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    report()
    report(group="mine")
    assert [asked["group"] for asked in started] == [tmp_path.name, "theirs", "mine"]
    assert {asked["name"] for asked in started} == {f"{tmp_path.name}-report"}


def test_a_pruned_trial_is_tagged_once_and_no_longer_when_it_goes_on(monkeypatch, tmp_path):
    """It is the trial's own run, whose other tags stay; without a run there is nothing to tag."""
    runs: list[SimpleNamespace] = []

    def init(**arguments: Any) -> Any:
        run = SimpleNamespace(**arguments)
        run.tags, run.finish = ("mine",), lambda: None
        runs.append(run)
        return runs[-1]

    monkeypatch.setattr(wandb, "init", init)
    settings = logger_settings(LoggerConfig(mode="offline"))
    trial = tmp_path / "sweep" / "beta-0.1"
    trial.mkdir(parents=True)
    tag_pruned(settings, trial)
    assert runs == []
    note_run(trial, "abc")
    tag_pruned(settings, trial)
    tag_pruned(settings, trial)
    [run] = runs
    assert (run.id, run.group, run.tags) == ("abc", "sweep", ("mine", "pruned"))
    untag_pruned(run, trial)
    assert run.tags == ("mine",)
    tag_pruned(settings, trial)
    assert len(runs) == 2


def test_the_command_that_uploads_a_sweep_has_all_of_its_runs(tmp_path):
    sweep = tmp_path / "my sweep"
    sweep.mkdir()
    assert sync_command(sweep) is None
    (sweep / "beta-0.1" / "wandb" / "offline-run-1-a").mkdir(parents=True)
    trials = f"'{sweep}'/*/wandb/offline-run-*"
    assert sync_command(sweep) == f"wandb sync {trials}"
    (sweep / "wandb" / "offline-run-1-b").mkdir(parents=True)
    assert sync_command(sweep) == f"wandb sync '{sweep}'/wandb/offline-run-* {trials}"
