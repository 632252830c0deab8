"""Commands that die while they submit a job: the same command finds it, and no trial runs twice."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.sweeps.places import slurm_queue
from dpo_lightning.sweeps.places.claims import order
from dpo_lightning.sweeps.trials import Trial
from tests.support.fake_slurm import LIVE, cancel_all, jobs, wait_for
from tests.support.slurm_sweeps import MOMENTS, run, slurm_here, submit_and_die
from tests.support.sweeps import alive
from tests.support.trials import Silent, plan
from tests.support.waiting import until

RUN = "(folder / 'runs').open('a').write('once\\n'); print('up', flush=True)\n"
QUICK = f"{RUN}finish()"
# Runs until it is let go.
PATIENT = f"{RUN}while not (folder.parent / 'enough').exists(): time.sleep(0.05)\nfinish()"


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of a SLURM whose jobs run here."""
    yield slurm_here(tmp_path, monkeypatch)
    cancel_all()


class LetGo(Silent):
    """Lets the trials end once one was seen to run."""

    def started(self, trial: Trial) -> None:
        super().started(trial)
        (trial.folder.parent / "enough").touch()


def runs(folder: Path, name: str = "a") -> int:
    return len((folder / "sweep" / name / "runs").read_text().splitlines())


def check_ran_once(folder: Path, *, jobs_in_all: int) -> None:
    """The trial ran once, by one of so many jobs, of which none is left."""
    until(lambda: not set(jobs().values()) & set(LIVE))
    assert runs(folder) == 1
    assert len(jobs()) == jobs_in_all
    until(lambda: alive(folder / "sweep") == [])


@pytest.mark.long
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_command_that_dies_at_any_moment_of_a_submission_is_gone_on_with(
    tmp_path, slurm, monkeypatch, moment
):
    submit_and_die(moment, tmp_path, [plan("a", PATIENT)])
    given = order(tmp_path / "sweep" / "a").get("attempt")
    submitted = moment in MOMENTS[3:]
    if not submitted:
        # Nothing is at work any more that the job could come from.
        monkeypatch.setattr(slurm_queue, "_SUBMISSION_SECONDS", 0.3)
    [trial], _ = run(tmp_path, [plan("a", PATIENT)], view=LetGo())
    assert (trial.status, trial.attempts, trial.devices[0]) == ("finished", 1, "slurm:1000")
    check_ran_once(tmp_path, jobs_in_all=1)
    assert (order(trial.folder)["attempt"] == given) == submitted


def test_a_job_needs_no_other_command_to_run_to_its_end(tmp_path, slurm):
    """The command dies with sbatch's answer, before submitit has put the job's file in place."""
    submit_and_die("after sbatch", tmp_path, [plan("a", QUICK)])
    folder = tmp_path / "sweep" / ".submitit"
    said = folder / "1000_0_log.out"
    until(lambda: said.exists() and "Loading pickle" in said.read_text())
    assert (folder / "1000_submitted.pkl").exists()
    until(lambda: jobs() == {"1000": "COMPLETED"})
    assert (tmp_path / "sweep" / "a" / "result.json").exists()
    _, view = run(tmp_path, [plan("a", QUICK)])
    assert view.said == []
    check_ran_once(tmp_path, jobs_in_all=1)


@pytest.mark.slow
def test_sbatch_may_be_at_work_longer_than_the_command_that_called_it(tmp_path, slurm):
    """The job is in the queue only when the next command has asked for it once in vain."""
    submit_and_die("is_late", tmp_path, [plan("a", PATIENT)])
    asked = slurm / "squeue-calls"
    thread = threading.Thread(target=lambda: (wait_for(asked), (slurm / "go").write_text("go")))
    thread.start()
    [trial], _ = run(tmp_path, [plan("a", PATIENT)], view=LetGo())
    thread.join()
    assert trial.status == "finished"
    check_ran_once(tmp_path, jobs_in_all=1)


@pytest.mark.slow
def test_a_job_that_comes_too_late_ends_and_leaves_the_trial_alone(tmp_path, slurm, monkeypatch):
    """Nobody waits for sbatch for ever: its job finds that the trial was ordered anew."""
    monkeypatch.setattr(slurm_queue, "_SUBMISSION_SECONDS", 0.0)
    submit_and_die("is_late", tmp_path, [plan("a", PATIENT)])

    class Late(Silent):
        def started(self, trial: Trial) -> None:
            super().started(trial)
            (slurm / "go").write_text("go")
            until(lambda: jobs().get("1001") == "COMPLETED")
            (trial.folder.parent / "enough").touch()

    [trial], _ = run(tmp_path, [plan("a", PATIENT)], view=Late())
    assert (trial.status, trial.devices[0]) == ("finished", "slurm:1000")
    check_ran_once(tmp_path, jobs_in_all=2)


@pytest.mark.slow
def test_the_job_of_other_settings_under_the_same_name_is_not_taken_for_ones_own(tmp_path, slurm):
    """Both trials are called a; the job of the first is at work when the second is typed."""
    submit_and_die("before the note", tmp_path, [plan("a", PATIENT)])
    other = replace(plan("a", PATIENT), settings_hash="other".ljust(32, "0"))
    [trial], _ = run(tmp_path, [other], view=LetGo())
    assert (trial.status, trial.folder.name) == ("finished", "a-other000")
    check_ran_once(tmp_path, jobs_in_all=2)
    assert runs(tmp_path, "a-other000") == 1


def test_a_trial_is_not_submitted_while_nobody_knows_whether_it_is_queued(
    tmp_path, slurm, monkeypatch
):
    submit_and_die("before the note", tmp_path, [plan("a", PATIENT)])
    (slurm / "no-queue").touch()
    monkeypatch.setattr(slurm_queue, "_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(slurm_queue, "_SUBMISSION_SECONDS", 0.0)
    with pytest.raises(UserError, match="squeue does not answer, and a may be in the queue"):
        run(tmp_path, [plan("a", PATIENT)], view=LetGo())
    (slurm / "no-queue").unlink()
    [trial], _ = run(tmp_path, [plan("a", PATIENT)], view=LetGo())
    assert trial.status == "finished"
    check_ran_once(tmp_path, jobs_in_all=1)


# Commands that are interrupted -------------------------------------------------------------------


@pytest.mark.slow
def test_ctrl_c_while_a_job_is_submitted_cancels_it(tmp_path, slurm):
    """It waits for a node, as one that began meanwhile might end by itself: its order is gone."""
    (slurm / "sbatch").write_text("is_interrupted")
    (slurm / "hold").touch()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [plan("a", PATIENT)])
    assert {*(slurm / "scancel-calls").read_text().split()} == {"1000"}
    assert jobs() == {"1000": "CANCELLED by 1000"}
    (slurm / "hold").unlink()
    until(lambda: alive(tmp_path / "sweep") == [])
    [trial], _ = run(tmp_path, [plan("a", PATIENT)], view=LetGo())
    assert (trial.status, trial.devices[0]) == ("finished", "slurm:1001")


@pytest.mark.slow
def test_a_job_whose_submission_is_said_to_have_failed_is_cancelled(tmp_path, slurm):
    (slurm / "sbatch").write_text("times_out")
    with pytest.raises(UserError, match=r"sbatch refused the job: .*Socket timed out"):
        run(tmp_path, [plan("a", PATIENT)])
    assert jobs() == {"1000": "CANCELLED by 1000"}
    until(lambda: alive(tmp_path / "sweep") == [])
    [trial], _ = run(tmp_path, [plan("a", PATIENT)], view=LetGo())
    assert (trial.status, trial.devices[0]) == ("finished", "slurm:1001")
