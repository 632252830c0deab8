"""An offline wandb run, read back with wandb's own inspector."""

import json
import subprocess
import sys

import pytest

from tests.support.runs import TINY, Run, run_train
from tests.support.wandb_files import inspected


def inspect(run: Run, *flags: str) -> str:
    [path] = run.folder.glob("wandb/offline-run-*/run-*.wandb")
    return inspected(path, *flags)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("wandb") / "run"
    arguments = [*TINY[:3], "evaluation.samples=2", "logger.tags=[one,two]", "logger.project=p"]
    return run_train(folder, *arguments, "beta=0.2", "name=my run", logger="wandb")


def test_the_summary_has_the_config_every_metric_the_state_and_the_exit_code(run: Run):
    assert run.code == 0
    summary = json.loads(inspect(run, "--summary"))
    assert summary["exit_code"] == 0
    assert summary["state"] == "finished"
    assert summary["project"] == "p"
    assert summary["config"]["beta"] == 0.2
    assert summary["config"]["optimizer"]["lr"] == 0.001
    values = summary["summary"]
    assert values["beta"] == 0.2
    # What a plot over runs takes, at the top level.
    assert (values["loss"], values["model"], values["seed"]) == ("sigmoid", "llama", 1)
    assert values["lr"] == summary["config"]["lr"] == 0.001
    assert values["accuracy"] == values["eval/rewards/accuracies"]
    assert values["kl"] == values["controlled/kl_policy_reference"]
    for name, value in run.result["metrics"].items():
        assert values[name] == pytest.approx(value, rel=1e-6), name
    assert {"train/loss", "eval/rewards/accuracies", "controlled/log_z"} <= set(values)


def test_every_row_of_metrics_is_in_the_history_over_optimizer_steps(run: Run):
    records = [json.loads(line) for line in inspect(run).splitlines()]
    history = [r["history"]["item"] for r in records if r["type"] == "history"]
    for row in run.rows:
        names = [name for name in row if "/" in name]
        [logged] = [
            item
            for item in history
            if item.get("trainer/global_step") == row["step"] and names[0] in item
        ]
        assert {n: logged[n] for n in names} == pytest.approx({n: row[n] for n in names})
    first = next(i for i, r in enumerate(records) if r["type"] == "history")
    defined = [i for i, r in enumerate(records) if r["type"] == "metric"]
    assert defined
    assert max(defined) < first
    assert any("samples" in json.dumps(item) for item in history)
    [start] = [r["run"] for r in records if r["type"] == "run"]
    assert sorted(start["tags"]) == ["one", "two"]
    assert start["display_name"] == "my-run"


def test_a_failed_run_is_finished_as_failed(tmp_path):
    run = run_train(
        tmp_path / "run",
        *TINY,
        "optimizer.lr=1e30",
        "optimizer.max_grad_norm=null",
        logger="wandb",
    )
    assert run.code == 3
    summary = json.loads(inspect(run, "--summary"))
    assert summary["exit_code"] == 3
    assert summary["config"]["beta"] == 0.1


def test_csv_and_none(tmp_path):
    csv = run_train(tmp_path / "csv", *TINY, "trainer.max_steps=2", logger="csv")
    text = (csv.folder / "csv" / "metrics.csv").read_text()
    assert "train/loss" in text
    assert "0.693147" in text
    none = run_train(tmp_path / "none", *TINY, "trainer.max_steps=2", logger="none")
    assert not (none.folder / "wandb").exists()
    assert none.code == csv.code == 0


@pytest.mark.slow
def test_a_service_that_a_parent_has_started_elsewhere(tmp_path, monkeypatch):
    """wandb's children take their parent's service, which has a current folder of its own."""
    code = (
        "import os, subprocess, sys, wandb\n"
        "wandb.setup()\n"
        "assert 'WANDB_SERVICE' in os.environ\n"
        "os.makedirs('child')\n"
        "subprocess.run([sys.executable, '-c', sys.argv[1]], cwd='child', check=True)\n"
    )
    child = (
        "from pathlib import Path\n"
        "from dpo_lightning.tracking.logger_settings import LoggerSettings\n"
        "from dpo_lightning.tracking.wandb_runs import finish_run, start_run\n"
        "settings = LoggerSettings(names=('wandb',), project='p', entity=None, mode='offline',"
        " tags=(), group=None)\n"
        "folder = Path('my run')\n"
        "folder.mkdir()\n"
        "run = start_run(settings, run_name='a', folder=folder, config={}, continued=False)\n"
        "print(finish_run(run, summary={}, exit_code=0))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, child], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [path] = (tmp_path / "child" / "my run").glob("wandb/offline-run-*/run-*.wandb")
    assert done.stdout.strip() == f"wandb sync '{path.parent.relative_to(tmp_path / 'child')}'"
