"""Runs on two processes of this machine."""

from pathlib import Path

from tests.support.runs import Run
from tests.support.warm import run_apart


def launch(folder: Path, *overrides: str) -> Run:
    """A run to its end; the second rank is started by the first one."""
    done = run_apart(
        *(f"hydra.run.dir={folder}", "logger=none", "trainer.accelerator=cpu"),
        *("trainer.threads=1", "evaluation.samples=0", *overrides),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(done.returncode, folder)
