"""The folder of each trial, trials that have finished before, and judging an attempt."""

import json

import pytest

from dpo_lightning.sweeps.trials import Plan, Trial, judge, place_trials


def plan(name: str, settings_hash: str) -> Plan:
    return Plan(
        name=name,
        overrides=(f"name={name}",),
        arguments=(),
        settings_hash=settings_hash,
        kind="cpu",
        width=1,
        facts={"beta": 0.1, "loss": "sigmoid", "seed": 1, "command": "python train.py"},
    )


def write_result(folder, **values) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(values))


def test_trials_get_folders_by_their_names(tmp_path):
    trials = place_trials([plan("a", "1" * 32), plan("b", "2" * 32)], tmp_path)
    assert [trial.folder for trial in trials] == [tmp_path / "a", tmp_path / "b"]
    assert {trial.status for trial in trials} == {"waiting"}


def test_equal_trials_are_one_and_names_that_meet_are_kept_apart(tmp_path):
    trials = place_trials([plan("a", "1" * 32), plan("a", "1" * 32), plan("a", "2" * 32)], tmp_path)
    assert [trial.folder.name for trial in trials] == ["a", "a-22222222"]


def test_a_finished_trial_is_known_by_its_hash_and_not_by_its_name(tmp_path):
    write_result(tmp_path / "a", status="finished", settings_hash="1" * 32, metrics={"x": 2})
    [same] = place_trials([plan("a", "1" * 32)], tmp_path)
    assert (same.status, same.skipped, same.metrics, same.exit_code) == (
        *("finished", True, {"x": 2}),
        0,
    )
    [other] = place_trials([plan("a", "3" * 32)], tmp_path)
    assert (other.status, other.folder.name) == ("waiting", "a-33333333")
    # And again: its own folder is found by its hash.
    write_result(other.folder, status="finished", settings_hash="3" * 32)
    [again] = place_trials([plan("a", "3" * 32)], tmp_path)
    assert (again.skipped, again.folder) == (True, other.folder)


@pytest.mark.parametrize("status", ["stopped", "failed", "diverged", "running"])
def test_what_did_not_finish_runs_again_in_its_folder(tmp_path, status):
    write_result(tmp_path / "a", status=status, settings_hash="1" * 32)
    [trial] = place_trials([plan("a", "1" * 32)], tmp_path)
    assert (trial.status, trial.folder.name) == ("waiting", "a")


def test_a_trial_that_was_killed_is_known_by_what_its_launcher_wrote(tmp_path):
    [trial] = place_trials([plan("a", "1" * 32)], tmp_path)
    trial.folder.mkdir()
    trial.status = "running"
    trial.save()
    [again] = place_trials([plan("a", "1" * 32)], tmp_path)
    assert (again.status, again.folder.name) == ("waiting", "a")
    [other] = place_trials([plan("a", "2" * 32)], tmp_path)
    assert other.folder.name == "a-22222222"


def test_a_torn_result_is_nobodys(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "result.json").write_text('{"status": "fini')
    [trial] = place_trials([plan("a", "1" * 32)], tmp_path)
    assert trial.status == "waiting"
    assert trial.folder.name == "a-11111111"


@pytest.mark.parametrize(
    ("exit_code", "said", "stopped", "status", "error"),
    [
        (0, "finished", False, "finished", None),
        (0, None, False, "failed", "before the run had finished"),
        (0, "running", False, "failed", "before the run had finished"),
        (1, None, False, "failed", "exit code 1"),
        (2, "failed", False, "failed", "exit code 2"),
        (3, "diverged", False, "diverged", "exit code 3"),
        (-9, None, False, "failed", "killed by signal 9"),
        (-9, "finished", False, "failed", "killed by signal 9"),
        (143, "stopped", False, "stopped", "exit code 143"),
        (130, None, True, "stopped", "exit code 130"),
        (-9, None, True, "stopped", "killed by signal 9"),
    ],
)
def test_an_attempt_is_judged_by_its_exit_and_its_result(
    tmp_path, exit_code, said, stopped, status, error
):
    trial = Trial(plan("a", "1" * 32), tmp_path / "a")
    trial.folder.mkdir()
    if said is not None:
        write_result(trial.folder, status=said, error=None, settings_hash="1" * 32, step=7)
    (trial.folder / "metrics.jsonl").write_text('{"step": 7, "train/loss": 0.6}\n')
    judge(trial, exit_code, stopped=stopped)
    assert (trial.status, trial.exit_code) == (status, exit_code)
    assert trial.error is None if error is None else error in trial.error
    # Whoever reads the folder finds the same, and what the run itself had said.
    result = json.loads((trial.folder / "result.json").read_text())
    assert result["status"] == status
    assert result["step"] == (0 if said is None else 7)
    assert result["settings_hash"] == "1" * 32
    if said != status:  # a process that was killed wrote no page
        assert f">{status}</span>" in (trial.folder / "report.html").read_text()
    if said is None:
        assert (result["beta"], result["loss"], result["seed"]) == (0.1, "sigmoid", 1)


def test_a_runs_own_word_for_its_end_is_kept(tmp_path):
    trial = Trial(plan("a", "1" * 32), tmp_path)
    write_result(tmp_path, status="failed", error="data.train: nothing left")
    judge(trial, 2, stopped=False)
    assert trial.error == "data.train: nothing left"
