"""Pruned sweeps whose trials are processes of this machine, jobs of SLURM, and tasks of Ray."""

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_lightning.sweeps.course import Course
from dpo_lightning.sweeps.dispatch import Dispatcher
from dpo_lightning.sweeps.places.base import Work
from dpo_lightning.sweeps.places.ray_tasks import RaySite
from dpo_lightning.sweeps.trials import Trial, place_trials
from tests.support.fake_slurm import cancel_all
from tests.support.pruned import SETTINGS, decisions, make_course, plans
from tests.support.slurm_sweeps import run as run_jobs
from tests.support.slurm_sweeps import slurm_here
from tests.support.trials import Silent, stand_in
from tests.support.trials import run as run_processes

# Stops where it is told to, and reports its beta; the last words come from its checkpoint.
ACT = """
from dpo_lightning.tracking.rungs import read_goal
from tests.support.pruned import report
beta = float(folder.name.removeprefix("beta-"))
saved = folder / "checkpoints" / "step-000008.ckpt"
saved.parent.mkdir(exist_ok=True)
goal = read_goal(folder)
if goal is not None:
    saved.write_text("8")
    report(folder, goal.rung, beta)
    finish("paused")
    if beta == 3: os.kill(os.getpid(), signal.SIGKILL)
else:
    assert saved.exists()
    finish()
"""
GRID = plans([{"beta": beta} for beta in (1, 2, 3)], ACT)


def course(folder: Path, trials: list[Trial]) -> Course:
    """One rung, from which one of three goes on: no neighbours at the last."""
    made = make_course(folder, trials, replace(SETTINGS, at=(0.5,)))
    made.begin()
    return made


def assert_pruned(folder: Path, trials: list[Trial]) -> None:
    statuses = {trial.folder.name: trial.status for trial in trials}
    assert statuses == {"beta-1": "pruned", "beta-2": "pruned", "beta-3": "finished"}
    [decision] = decisions(folder)
    assert decision["kept"] == ["beta-3"]
    assert decision["values"] == {"beta-1": 1.0, "beta-2": 2.0, "beta-3": 3.0}
    assert trials[2].metrics["resumed"] is True
    assert trials[2].attempts == 2


def test_processes_stop_at_a_rung_and_the_best_goes_on(tmp_path):
    """The best is killed between its report and its end: it is at its rung all the same."""
    trials, view = run_processes(tmp_path, GRID, course=course)
    assert_pruned(tmp_path, trials)
    assert ("beta-3", "paused", False) in view.said


@pytest.mark.slow  # each job of the machine's SLURM takes a second
def test_jobs_stop_at_a_rung_and_the_best_goes_on(tmp_path, monkeypatch):
    slurm_here(tmp_path, monkeypatch)
    try:
        trials, _ = run_jobs(tmp_path, GRID, course=course)
    finally:
        cancel_all()
    assert_pruned(tmp_path / "sweep", trials)


@pytest.mark.launchers
@pytest.mark.slow  # starts a cluster of Ray
def test_tasks_of_ray_stop_at_a_rung_and_the_best_goes_on(tmp_path):
    site = RaySite(
        address="local", cpus_per_device=1, node_retries=0, max_parallel=None, max_failures=None,
        retries=0,
    )  # fmt: skip
    trials = place_trials(GRID, tmp_path)
    made = course(tmp_path, trials)
    with site.open(Work(GRID, tmp_path, stand_in(tmp_path), {"OMP_NUM_THREADS": "1"})) as place:
        Dispatcher(
            trials, place=place, max_failures=None, retries=0, view=Silent(), course=made
        ).run()
    assert_pruned(tmp_path, trials)
