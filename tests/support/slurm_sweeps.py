"""Sweeps of stand-ins through the SLURM launcher, and commands that die while they submit."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from submitit import SlurmExecutor, SlurmJob
from submitit.core.utils import JobPaths

from dpo_lightning.sweeps.dispatch import Dispatcher, Stages
from dpo_lightning.sweeps.places import slurm_jobs, slurm_queue
from dpo_lightning.sweeps.places.base import Work
from dpo_lightning.sweeps.places.slurm_site import SlurmSite
from dpo_lightning.sweeps.trials import Plan, Trial, place_trials
from tests.support.fake_slurm import install
from tests.support.trials import Silent, stand_in

DEFAULTS: dict[str, Any] = {
    "cluster": "slurm", "partition": None, "account": None, "qos": None, "constraint": None,
    "timeout_min": 60, "signal_delay_s": 90, "max_timeouts": 3, "cpus_per_task": None,
    "mem_gb": None, "gpus_per_node": None, "setup": [], "additional_parameters": {},
    "max_parallel": None, "max_failures": None, "retries": 0,
}  # fmt: skip


def site(**options) -> SlurmSite:
    return SlurmSite.of(**(DEFAULTS | options))


def slurm_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a SLURM whose jobs run here, for one test; returns its folder."""
    folder = tmp_path / "slurm"
    for name, value in install(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm_jobs, "_STATE_SECONDS", 0.3)
    monkeypatch.setattr(slurm_jobs, "_STATE_SECONDS_STOPPING", 0.3)
    monkeypatch.setattr(slurm_jobs, "_LATE_SECONDS", 0.5)
    monkeypatch.setattr(slurm_queue, "_POLL_SECONDS", 0.1)
    # What an earlier test's jobs were is another SLURM's.
    monkeypatch.setattr(SlurmJob, "watcher", type(SlurmJob.watcher)(delay_s=600))
    monkeypatch.chdir(tmp_path)
    return folder


def run(
    folder: Path,
    plans: list[Plan],
    *,
    view: Silent | None = None,
    course: Callable[[Path, list[Trial]], Stages] | None = None,
    **options,
) -> tuple[list[Trial], Silent]:
    sweep_dir = folder / "sweep"
    sweep_dir.mkdir(exist_ok=True)
    trials, view, where = place_trials(plans, sweep_dir), view or Silent(), site(**options)
    work = Work(plans, sweep_dir, stand_in(folder), {"OMP_NUM_THREADS": "1"})
    with where.open(work) as place:
        Dispatcher(
            trials,
            place=place,
            max_failures=where.max_failures,
            retries=where.retries,
            view=view,
            course=None if course is None else course(sweep_dir, trials),
        ).run()
    return trials, view


# Commands that are killed ------------------------------------------------------------------------

MOMENTS = (
    "before the order",
    "before sbatch",
    "in sbatch before its job",
    "in sbatch after its job",
    "after sbatch",
    "before the note",
    "after the note",
)
"""Moments of the submission of a job, in their order."""

_IN_SBATCH = {"in sbatch before its job": "dies_first", "in sbatch after its job": "dies"}


def submit_and_die(moment: str, folder: Path, plans: list[Plan]) -> None:
    """Starts a command that is killed at a moment of the submission of its first job.

    One of MOMENTS, or ``is_late``: sbatch is still at work, until a file ``go`` is there.
    """
    befalls = folder / "slurm" / "sbatch"
    if moment in _IN_SBATCH:
        befalls.write_text(_IN_SBATCH[moment])
    elif moment == "is_late":
        befalls.write_text(moment)

    def command() -> None:
        _arm(moment)
        run(folder, plans)

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, moment


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(moment: str) -> None:
    note, move = slurm_jobs.__dict__["note_job"], JobPaths.move_temporary_file

    def dies_on_move(paths: JobPaths, file: Path, name: str, **options: Any) -> None:
        """Kills once submitit knows the number; the file that the job needs has no name yet."""
        if name == "submitted_pickle":
            _die()
        move(paths, file, name, **options)

    def dies_after_note(*given: Any) -> None:
        note(*given)
        _die()

    replaced: dict[str, tuple[Any, str, Callable[..., None]]] = {
        "before the order": (slurm_jobs, "give_order", _die),
        "before sbatch": (SlurmExecutor, "_submit_command", _die),
        "after sbatch": (JobPaths, "move_temporary_file", dies_on_move),
        "before the note": (slurm_jobs, "note_job", _die),
        "after the note": (slurm_jobs, "note_job", dies_after_note),
    }
    if moment in replaced:
        mock.patch.object(*replaced[moment]).start()
