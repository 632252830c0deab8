"""Resuming with two processes, and with another number of them than before."""

import os
import subprocess
import sys

import pytest

from tests.support.recovery import DRAWING, assert_same_end, checkpoint, load
from tests.support.runs import ROOT, Run

pytestmark = pytest.mark.faults

TASK = (
    *("data.controlled.train_groups=36", "data.controlled.eval_groups=7", "data.batch_size=8"),
    *("trainer.max_epochs=2", "checkpoint.every_n_steps=1", "checkpoint.keep=99"),
    *("trainer.log_every_n_steps=3", "evaluation.samples=0", "evaluation.partition_samples=0"),
    *("trainer.accelerator=cpu", "trainer.threads=1", "optimizer.lr=0.01"),
)


def launch(folder, *overrides: str) -> Run:
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", "logger=none"]
    done = subprocess.run(
        [*command, *TASK, *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(done.returncode, folder)


TWO = ("strategy=ddp", "trainer.devices=2", *DRAWING)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    return launch(tmp_path_factory.mktemp("whole") / "run", *TWO)


@pytest.mark.parametrize("step", [4, 5])
def test_two_ranks_resume_exactly(whole: Run, tmp_path, step: int):
    """Five steps a pass; at 4 one step of an interval of three has each rank's own sums."""
    assert len(load(checkpoint(whole, step))["random_states"]) == 2
    resumed = launch(tmp_path / "run", *TWO, f"resume={checkpoint(whole, step)}")
    assert_same_end(resumed, whole, after=step)


def test_another_number_of_processes_sees_the_same_groups(tmp_path):
    """Losses are means over a step's groups, so the same groups in the same order show in them."""
    one = launch(tmp_path / "one")
    two = launch(
        tmp_path / "two", "strategy=ddp", "trainer.devices=2", f"resume={checkpoint(one, 4)}"
    )
    kept = [row for row in one.rows if row["step"] > 4 and "train/loss" in row]
    for row, other in zip(kept, [r for r in two.rows if "train/loss" in r], strict=True):
        assert other["step"] == row["step"]
        for name in ("train/loss", "train/logps/chosen", "train/grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-4), (row["step"], name)
