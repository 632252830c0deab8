"""Runs on two processes of this machine."""

import os
import subprocess
import sys

from tests.support.runs import ROOT, Run


def launch(folder, *overrides: str) -> Run:
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", "logger=none"]
    arguments = ["trainer.accelerator=cpu", "trainer.threads=1", "evaluation.samples=0"]
    done = subprocess.run(
        [*command, *arguments, *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(done.returncode, folder)
