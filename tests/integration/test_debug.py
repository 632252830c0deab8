"""``debug=fast|overfit|profile``: each does what its name says, in a real run."""

import json
from pathlib import Path

import pytest

from tests.support.runs import Run

SMALL = ["data.controlled.train_groups=96", "data.controlled.eval_groups=40"]


@pytest.fixture
def debugged(tmp_path, monkeypatch):
    """Runs the bundled model with a choice of debug, in a folder of its own."""
    from dpo_lightning.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Run:
        folder = tmp_path / "run"
        assert main([f"hydra.run.dir={folder}", *SMALL, *words]) == 0
        return Run(0, folder)

    return run


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.slow  # a run
def test_fast_is_three_steps_without_answers(debugged, tmp_path):
    run = debugged("debug=fast")
    assert [row["step"] for row in run.rows if "train/loss" in row] == [1, 2, 3]
    assert run.result["data"]["evaluated_groups"] == 32
    assert not [name for name in run.result["metrics"] if name.startswith("samples/")]
    evaluation = json.loads((run.folder / "evaluation.json").read_text())
    assert (evaluation["answers"], evaluation["samples"]) == ([], [])
    expected = {"config.yaml", "evaluation.json", "metrics.jsonl", "model", "report.html"}
    assert names_in(run.folder) == expected | {"result.json", "train.log"}
    assert names_in(tmp_path) == {"run"}


@pytest.mark.slow  # a run
def test_overfit_sees_eight_groups_until_their_loss_is_half(debugged, capsys):
    """The loss starts at ln 2, and its half is 0.3466; what is evaluated is what is trained on."""
    run = debugged("debug=overfit")
    losses = run.values("train/loss")
    assert losses[0] == pytest.approx(0.6931, abs=1e-4)
    assert losses[-1] <= losses[0] / 2 < losses[-2]
    assert run.values("eval/loss")[-1] < losses[0] / 2
    counts = run.result["data"]
    assert (counts["train_groups"], counts["eval_groups"]) == (8, 8)
    assert run.result["step"] == len(losses) < 200
    assert run.result["status"] == "finished"
    assert run.result["signs"] == []
    [said] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("overfit")]
    assert said.endswith(f"on 8 groups in {len(losses)} steps")


@pytest.mark.slow  # a run under a profiler
def test_profile_leaves_a_table_and_a_trace(debugged, capsys):
    run = debugged("debug=profile", "trainer.max_steps=6")
    profile = run.folder / "profile"
    assert names_in(profile) == {"fit-table.txt", "trace-rank-0.json"}
    assert "aten::mm" in (profile / "fit-table.txt").read_text()
    events = json.loads((profile / "trace-rank-0.json").read_text())["traceEvents"]
    steps = [event for event in events if "ProfilerStep#" in event.get("name", "")]
    # One step waits, one warms up, three are recorded.
    assert {event["name"] for event in steps} >= {f"ProfilerStep#{n}" for n in (2, 3, 4)}
    said = capsys.readouterr().out.splitlines()
    assert f"profile   {Path('run/profile')}" in said
