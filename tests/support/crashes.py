"""Runs that die at a named point of a save."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.recovery import DRAWING
from tests.support.runs import ROOT

TASK = (
    *("data.controlled.train_groups=64", "data.controlled.eval_groups=20", "data.batch_size=16"),
    *("trainer.max_epochs=2", "evaluation.samples=0", "evaluation.partition_samples=0"),
    *("checkpoint.every_n_steps=2", "trainer.enable_progress_bar=false", "optimizer.lr=0.01"),
    *DRAWING,
)


def drive(point: str, step: int, folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    arguments = [f"hydra.run.dir={folder}", "logger=none", "trainer.threads=1", *TASK, *overrides]
    return subprocess.run(
        [sys.executable, "-m", "tests.support.crash", point, str(step), *arguments],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": "/dev/shm", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
