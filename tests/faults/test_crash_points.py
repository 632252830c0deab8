"""Killed at each phase of a save: there is a whole checkpoint, and the run ends exactly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning.checkpoints import CHECKPOINTS, find_checkpoint, saved_checkpoints
from tests.conftest import ROOT, Run, run_train
from tests.faults.crash import POINTS
from tests.recovery import DRAWING, assert_same_end, differences, load, rows

pytestmark = pytest.mark.faults

TASK = (
    *("data.controlled.train_groups=64", "data.controlled.eval_groups=20", "data.batch_size=16"),
    *("trainer.max_epochs=2", "evaluation.samples=0", "evaluation.partition_samples=0"),
    *("checkpoint.every_n_steps=2", "trainer.enable_progress_bar=false", "optimizer.lr=0.01"),
    *DRAWING,
)


def drive(point: str, step: int, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    arguments = [f"hydra.run.dir={folder}", "logger=none", "trainer.threads=1", *TASK, *overrides]
    return subprocess.run(
        [sys.executable, "-m", "tests.faults.crash", point, str(step), *arguments],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": "/dev/shm", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """Eight steps; all checkpoints kept."""
    run = run_train(tmp_path_factory.mktemp("whole") / "run", *TASK, "checkpoint.keep=9")
    assert run.code == 0
    return run


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_phase_of_a_save(whole: Run, tmp_path, point: str):
    """The save of step 4, with keep=1 and step 2 saved before."""
    folder = tmp_path / "run"
    done = drive(point, 4, folder)
    assert done.returncode == -9, done.stdout + done.stderr
    found = find_checkpoint("auto", folder)
    written = POINTS.index(point) >= POINTS.index("after the manifest")
    assert found == folder / CHECKPOINTS / f"step-00000{4 if written else 2}.ckpt"
    assert differences(load(found), load(whole.folder / CHECKPOINTS / found.name)) == []
    again = run_train(folder, *TASK, "resume=auto")
    assert_same_end(again, whole, after=4 if written else 2)
    assert rows(again) == rows(whole)
    assert [path.name for path in saved_checkpoints(folder)] == ["step-000008.ckpt"]
    # Nothing else is left, of the killed save least of all.
    assert sorted(path.name for path in (folder / CHECKPOINTS).iterdir()) == [
        "step-000008.ckpt",
        "step-000008.json",
    ]
