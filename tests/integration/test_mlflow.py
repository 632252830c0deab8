"""A run in mlflow's own store, read back by its client; a server that is gone ends nothing.

It needs the extra of mlflow, which the environment of the launchers has.
"""

import math
from pathlib import Path

import pytest

from tests.support.runs import TINY, Run, run_train

pytestmark = pytest.mark.launchers

SETTINGS = (
    *(*TINY[:3], "evaluation.samples=2", "evaluation.every_n_steps=2"),
    *("checkpoint.every_n_steps=2", "checkpoint.keep=9", "trainer.max_steps=4"),
)


def store(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


def train(folder: Path, name: str, *overrides: str) -> Run:
    where = f"logger.tracking_uri={store(folder)}"
    run = run_train(folder / name, *overrides, where, logger="mlflow")
    assert run.code == 0
    return run


def recorded(folder: Path, run: Run) -> tuple[str, object]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store(folder))
    return (run.folder / "mlflow" / "id.txt").read_text().strip(), client


def check_values(folder: Path, run: Run) -> None:
    """Each metric and step once, and as in ``metrics.jsonl``."""
    identity, client = recorded(folder, run)
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in run.rows:
        for name, value in row.items():
            if "/" in name:
                expected.setdefault(name, []).append((row["step"], value))
    for name, values in expected.items():
        history = [(m.step, m.value) for m in client.get_metric_history(identity, name)]
        assert sorted(history) == sorted(
            (step, math.nan if value is None else value) for step, value in values
        ), name


def test_a_run_is_read_back_and_goes_on_as_one(tmp_path):
    """Resumed at step 2 in its folder and in another one, it is the same run without doubles."""
    first = train(tmp_path, "a", *SETTINGS, "logger.tags=[one]", "name=my run", "logger.project=p")
    check_values(tmp_path, first)
    identity, client = recorded(tmp_path, first)
    found = client.get_run(identity)
    assert found.info.status == "FINISHED"
    assert found.data.params["beta"] == "0.1"
    assert found.data.params["optimizer.lr"] == found.data.params["lr"] == "0.001"
    assert found.data.tags["one"] == "true"
    assert found.data.tags["mlflow.runName"] == "my-run"
    assert client.get_experiment(found.info.experiment_id).name == "p"
    assert found.data.metrics["controlled/log_z"] == first.result["metrics"]["controlled/log_z"]
    assert [f.path for f in client.list_artifacts(identity)] == [*("answers.json", "samples.json")]
    resume = f"resume={first.folder / 'checkpoints' / 'step-000002.ckpt'}"
    for name, more in (("a", ["overwrite=true"]), ("b", [])):
        again = train(tmp_path, name, resume, *more)
        assert recorded(tmp_path, again)[0] == identity
    check_values(tmp_path, first)
    changed = train(tmp_path, "c", resume, "beta=0.4", "resume_changed=true")
    assert recorded(tmp_path, changed)[0] != identity


def test_a_model_is_kept(tmp_path):
    run = train(tmp_path, "a", *SETTINGS, "logger.log_model=true")
    identity, client = recorded(tmp_path, run)
    names = {Path(f.path).name for f in client.list_artifacts(identity, "model")}
    assert {"model.safetensors", "config.json", "README.md"} <= names


def test_a_server_that_is_gone_costs_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    run = run_train(tmp_path / "run", *SETTINGS, logger="mlflow")
    assert run.code == 0
    log = (run.folder / "train.log").read_text()
    assert log.count("mlflow takes no metrics (") == 1
    assert len(run.values("train/loss")) == 4
