"""A trial that stops at a rung of its sweep, and what it is when it goes on from there."""

import json
from pathlib import Path

import pytest

from dpo_lightning.settings.program import TRIAL
from dpo_lightning.tracking.rungs import Goal, read_reports, write_goal
from tests.support.recovery import DRAWING, assert_same_end
from tests.support.runs import TINY, Run, run_train

pytestmark = pytest.mark.slow  # trains to compare whole runs to the bit

SMALL = (
    *(*TINY, "trainer.max_steps=8", "trainer.accelerator=cpu", "optimizer.warmup=0.1"),
    *("trainer.log_every_n_steps=3", "evaluation.samples=8", "evaluation.every_n_steps=4"),
    *DRAWING,
)
METRIC = "eval/fitted_log_loss"


def trial(folder: Path, monkeypatch, goal: Goal | None, *overrides: str) -> Run:
    """Starts a trial as its sweep does."""
    monkeypatch.setenv(TRIAL, "1")
    folder.mkdir(exist_ok=True)
    write_goal(folder, goal)
    (folder / "result.json").unlink(missing_ok=True)
    return run_train(folder, *SMALL, "resume=auto", *overrides)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    return run_train(tmp_path_factory.mktemp("whole") / "run", *SMALL)


def test_a_trial_that_stops_at_rungs_ends_like_one_that_does_not(tmp_path, monkeypatch, whole):
    """Eight steps with one of warm-up: rungs at 1/8, 1/4 and 1/2 are at steps 3, 3 and 4.

    Three times the warm-up is 3, so the first two fall together, and one stop reports at both. At
    step 4 an evaluation is due, which is done when the run goes on. The noise draws from every
    generator in each step, so that a rung that touched one would change the weights.
    """
    at = (0.125, 0.25, 0.5)
    run = trial(tmp_path / "run", monkeypatch, Goal(0, at, METRIC))
    assert run.code == 0
    assert (run.result["status"], run.result["step"]) == ("paused", 3)
    reports = read_reports(run.folder, METRIC)
    assert {rung: report.step for rung, report in reports.items()} == {0: 3, 1: 3}
    assert not (run.folder / "model").exists()
    assert not any(name.startswith("eval/") for row in run.rows for name in row)
    run = trial(tmp_path / "run", monkeypatch, Goal(2, at, METRIC))
    assert (run.result["status"], run.result["step"]) == ("paused", 4)
    reports = read_reports(run.folder, METRIC)
    assert reports[2].step == 4
    assert len(reports[2].values) == 40
    assert reports[2].value == pytest.approx(sum(reports[2].values) / 40)
    run = trial(tmp_path / "run", monkeypatch, None)
    assert (run.result["status"], run.result["step"]) == ("finished", 8)
    assert_same_end(run, whole, after=4)


def test_a_trial_killed_before_its_report_makes_the_same_one(tmp_path, monkeypatch):
    """All that was measured after the checkpoint is measured again from it, to the bit."""
    goal = Goal(0, (0.5,), METRIC)
    run = trial(tmp_path / "run", monkeypatch, goal)
    first = read_reports(run.folder, METRIC)
    (run.folder / "rungs.jsonl").unlink()
    run = trial(tmp_path / "run", monkeypatch, goal)
    assert (run.code, run.result["status"]) == (0, "paused")
    assert read_reports(run.folder, METRIC) == first


def test_a_run_beyond_its_rung_is_refused_by_name(tmp_path, monkeypatch, capfd):
    """A checkpoint of step 4 cannot report what the trial was at step 3."""
    run = trial(tmp_path / "run", monkeypatch, Goal(0, (0.5,), METRIC))
    run = trial(tmp_path / "run", monkeypatch, Goal(0, (0.125,), METRIC))
    assert run.code == 2
    assert run.result["error"].startswith("sweep.prune=halving: run was trained to step 4 without")


def test_a_goal_left_in_a_folder_is_no_run_of_ones_own(tmp_path, monkeypatch, whole):
    """Whoever goes on with a trial by hand means its end."""
    run = trial(tmp_path / "run", monkeypatch, Goal(0, (0.5,), METRIC))
    monkeypatch.delenv(TRIAL)
    run = run_train(run.folder, *SMALL, "resume=auto")
    assert (run.code, run.result["status"]) == (0, "finished")
    assert_same_end(run, whole, after=4)


@pytest.mark.parametrize(
    ("metric", "extra", "count"),
    [
        ("controlled/expected_reward", (), 8),
        ("eval/rewards/accuracies", (), 40),
        ("samples/judge", ("plugins=[tests.support.recovery,brevity]",), 8),
    ],
)
def test_each_metric_is_that_of_an_evaluation(tmp_path, monkeypatch, metric, extra, count):
    """A rung at step 4 says the same as the end of a run of four steps under the same schedule.

    A constant schedule is the same for both.
    """
    (tmp_path / "brevity.py").write_text(
        "from dpo_lightning.plugins import register_scorer\n"
        "@register_scorer('brevity')\n"
        "def brevity(prompts, responses):\n"
        "    return [-float(len(response)) for response in responses]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    judge = ("evaluation.judge=brevity",) if extra else ()
    same = ("optimizer.schedule=constant", "optimizer.warmup=0", *extra, *judge)
    run = trial(tmp_path / "run", monkeypatch, Goal(0, (0.5,), metric), *same)
    assert run.code == 0
    [report] = read_reports(run.folder, metric).values()
    whole = run_train(tmp_path / "four", *SMALL, *same, "trainer.max_steps=4")
    assert len(report.values) == count
    assert report.value == pytest.approx(whole.result["metrics"][metric], abs=1e-6)
    assert json.loads((run.folder / "rungs.jsonl").read_text())["total_steps"] == 8
