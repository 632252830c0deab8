"""Sweeps whose trials crash, and that are stopped, killed and typed again."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import ROOT, Run
from tests.support.sweeps import FAULTS, SMALL, Sweep, alive, sweep
from tests.support.waiting import until

# Faults ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    (place / "faults.py").write_text(FAULTS)
    (place / "broken").touch()
    return place


GRID = ("beta=0.1,0.2,0.3,0.4,0.5,0.6", "plugins=[faults]", *SMALL)


@pytest.fixture(scope="module")
def faulty(place: Path) -> Sweep:
    return sweep(place, *GRID, logger="wandb")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("beta", "status", "code", "error"),
    [
        ("0.1", "finished", 0, None),
        ("0.2", "failed", 1, "RuntimeError: boom"),
        ("0.3", "failed", -9, "killed by signal 9"),
        ("0.4", "failed", 7, "exit code 7"),
        ("0.5", "diverged", 3, "nan"),
        ("0.6", "finished", 0, None),
    ],
)
def test_a_trial_that_ends_badly_is_one_row(faulty: Sweep, beta, status, code, error):
    result = faulty.trial(f"beta-{beta}").result
    about = json.loads((faulty.folder / f"beta-{beta}" / "trial.json").read_text())
    assert (result["status"], about["status"], about["exit_code"]) == (status, status, code)
    assert result["error"] is None if error is None else error in result["error"]
    assert result["beta"] == float(beta)


@pytest.mark.faults
def test_the_sweep_says_so_and_names_the_logs(faulty: Sweep):
    assert faulty.code == 1
    assert faulty.report["statuses"] == {"failed": 3, "finished": 2, "diverged": 1}
    assert "6 trials: 2 finished, 3 failed, 1 diverged" in faulty.stdout
    for beta in ("0.2", "0.3", "0.4", "0.5"):
        log = faulty.folder / f"beta-{beta}" / "trial.log"
        assert str(log.relative_to(faulty.folder.parent)) in faulty.stdout
        assert log.stat().st_size > 0
    assert "boom" in (faulty.folder / "beta-0.2" / "trial.log").read_text()
    assert "Traceback" not in faulty.stderr


@pytest.mark.faults
def test_the_reference_was_computed_once_in_all(faulty: Sweep):
    counts = [faulty.trial(f"beta-{beta}").result["reference"] for beta in ("0.1", "0.6")]
    assert [count["rows"] for count in counts] == [136, 136]
    parts = list((faulty.folder.parent / "cache" / "reference").glob("*/*.safetensors"))
    assert len(parts) == 1
    assert sorted(count["computed"] for count in counts) in ([0, 0], [0, 136])


def wandb_runs(folder: Path) -> list[dict[str, Any]]:
    """Every run that was recorded under a folder, with wandb's own inspector."""
    found = []
    for path in sorted(folder.rglob("wandb/offline-run-*/run-*.wandb")):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]
        lines = subprocess.run(
            [*command, str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        begun = [record["run"] for record in records if record["type"] == "run"]
        if not begun:
            continue  # killed before wandb had written anything
        summary = subprocess.run(
            [*command, "--summary", str(path)], capture_output=True, text=True, check=True
        ).stdout
        text = path.parent.rglob("media/*/*")
        media = sorted(file.suffix for file in text if file.is_file())
        found.append({"run": begun[0], "media": media, **json.loads(summary)})
    return found


@pytest.mark.faults
def test_wandb_has_a_run_per_trial_in_one_group_and_one_with_the_report(faulty: Sweep):
    runs = wandb_runs(faulty.folder)
    assert {run["run"]["run_group"] for run in runs} == {"sweep"}
    reports = [run for run in runs if run["run"].get("job_type") == "report"]
    trials = [run for run in runs if run["run"].get("job_type") != "report"]
    assert len(reports) == 1
    assert {".png", ".json"} <= set(reports[0]["media"])
    assert reports[0]["exit_code"] == 0
    # Each has its own settings and nobody else's; of the one that was killed there may be nothing.
    codes = {run["config"]["beta"]: run.get("exit_code") for run in trials}
    codes.pop(0.3, None)
    assert codes == {0.1: 0, 0.2: 1, 0.4: 7, 0.5: 3, 0.6: 0}
    for run in trials:
        values = run.get("summary", {})
        assert values.get("beta", run["config"]["beta"]) == run["config"]["beta"]
    assert len({run["run"]["run_id"] for run in runs}) == len(runs) >= 6


@pytest.fixture(scope="module")
def mended(faulty: Sweep, place: Path) -> Sweep:
    (place / "broken").unlink()
    for name in ("beta-0.1", "beta-0.6"):
        (faulty.folder / name / "result.json").chmod(0o444)
        os.utime(faulty.folder / name / "result.json", (1, 1))
    return sweep(place, *GRID)


@pytest.mark.faults
def test_a_rerun_does_only_what_is_missing(mended: Sweep):
    assert mended.code == 0, mended.stdout + mended.stderr
    assert mended.report["statuses"] == {"finished": 6}
    assert mended.trials == [f"beta-0.{i}" for i in range(1, 7)]
    for name in ("beta-0.1", "beta-0.6"):
        assert (mended.folder / name / "result.json").stat().st_mtime == 1
    assert mended.stdout.count("already finished, skipped") == 2
    assert [mended.trial(f"beta-0.{i}").result["reference"]["computed"] for i in (2, 3, 4, 5)] == [
        0
    ] * 4


def files_of_trials(done: Sweep) -> dict[str, tuple[int, bytes]]:
    """Time of the last write to each file below the trials' folders, and its content."""
    return {
        str(path.relative_to(done.folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for name in done.trials
        for path in (done.folder / name).rglob("*")
        if path.is_file()
    }


@pytest.mark.faults
def test_a_finished_sweep_is_left_as_it_is(mended: Sweep, place: Path):
    """A trial that was started would write its log at least."""
    before = files_of_trials(mended)
    assert "beta-0.1/trial.log" in before
    again = sweep(place, *GRID)
    assert again.code == 0
    assert again.stdout.count("already finished, skipped") == 6
    assert files_of_trials(again) == before
    # Another grid in the same folder is another set of trials.
    more = sweep(place, "beta=0.1", "seed=9", "trainer.max_steps=2", *SMALL)
    assert more.code == 0
    assert len(more.trials) == 7


# Interrupts --------------------------------------------------------------------------------------

LONG = ("beta=0.1,0.2,0.3", "data.batch_size=2", "trainer.max_steps=50000",
        "checkpoint.every_n_steps=50", "trainer.log_every_n_steps=1", *SMALL[:2],
        "evaluation.samples=0", "hydra.launcher.devices=2")  # fmt: skip


def steps(folder: Path, name: str) -> int:
    try:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):
        return 0


def start(place: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra.sweep.dir=sweep", "logger=none"]
    return subprocess.Popen(
        [*command, *LONG],
        cwd=place,
        env=os.environ | {"DPO_LIGHTNING_CACHE": str(place / "cache")},
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def wait_for_steps(process: subprocess.Popen, folder: Path, count: int) -> None:
    names = ("beta-0.1", "beta-0.2")
    until(lambda: process.poll() is not None or min(steps(folder, n) for n in names) >= count)
    assert process.poll() is None


@pytest.mark.faults
def test_ctrl_c_leaves_nothing_running_and_the_same_command_goes_on(tmp_path):
    folder = tmp_path / "sweep"
    process = start(tmp_path)
    wait_for_steps(process, folder, 60)
    # As a terminal does: to the whole foreground group, of which the trials are none.
    os.killpg(process.pid, signal.SIGINT)
    stdout, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert alive(tmp_path) == []
    assert "the same command resumes it" in stdout
    stopped = {}
    for name in ("beta-0.1", "beta-0.2"):
        result = Run(130, folder / name).result
        assert result["status"] == "stopped"
        assert 60 <= result["step"] < 50000
        stopped[name] = result["step"]
    assert not (folder / "beta-0.3").exists()

    again = start(tmp_path)
    wait_for_steps(again, folder, max(stopped.values()) + 20)
    # Even a dispatcher that has no time to stop them leaves no trial behind.
    again.kill()
    again.communicate()
    until(lambda: alive(tmp_path) == [])
    for name in stopped:
        assert "resume=auto" in (folder / name / ".hydra" / "overrides.yaml").read_text()
        # Steps 1 to 50 are those of the first attempt; nothing is there twice.
        seen = [row["step"] for row in Run(0, folder / name).rows if "train/loss" in row]
        assert seen == list(range(1, len(seen) + 1))
    # Shorter, so that it ends: the settings changed, so this is another trial.
    rest = sweep(tmp_path, "beta=0.1", *LONG[1:], "trainer.max_steps=100")
    assert rest.code == 0, rest.stdout
    assert len(rest.trials) == 3


@pytest.mark.faults
def test_a_stopped_trial_goes_on_from_its_checkpoint(tmp_path):
    """A scorer stops the whole sweep once: the training is not done again."""
    (tmp_path / "once.py").write_text(
        "import os, signal\nfrom pathlib import Path\n\n"
        "def score(prompts, responses):\n"
        "    if not Path('seen').exists():\n"
        "        Path('seen').touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [len(response) for response in responses]\n"
    )
    grid = ("beta=0.5", "plugins=[once]", "evaluation.judge=once.score", *SMALL[:3],
            "evaluation.samples=8", "checkpoint.every_n_steps=2")  # fmt: skip
    first = sweep(tmp_path, *grid)
    assert first.code == 1
    assert first.only_trial.result["error"] == "killed by signal 9"
    times = [row["time"] for row in first.only_trial.rows]
    second = sweep(tmp_path, *grid)
    assert second.code == 0, second.stdout
    run = second.only_trial
    assert run.result["step"] == 6
    assert run.result["metrics"]["samples/judge"] > 0
    assert [row["time"] for row in run.rows if "train/loss" in row] == times[:6]
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "once.py", tmp_path / "other")
    (tmp_path / "other" / "seen").touch()
    undisturbed = sweep(tmp_path / "other", *grid)
    assert undisturbed.code == 0
    weights = [
        (done.only_trial.folder / "model" / "model.safetensors").read_bytes()
        for done in (second, undisturbed)
    ]
    assert weights[0] == weights[1]


def test_two_sweeps_do_not_work_in_one_folder(tmp_path):
    from filelock import FileLock

    (tmp_path / "sweep").mkdir()
    with FileLock(tmp_path / "sweep" / ".lock"):
        refused = sweep(tmp_path, "beta=0.1", *SMALL)
    assert refused.code == 2
    assert "another sweep is running there" in refused.stderr
