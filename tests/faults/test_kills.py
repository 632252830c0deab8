"""A run on real rows, killed five times at random moments, ends like an undisturbed one."""

import functools
import json
import os
import random
import subprocess
import sys
import time

import pytest

from tests.support.recovery import DRAWING, assert_same_end, rows
from tests.support.runs import ROOT, Run
from tests.support.signals import DISTURBED
from tests.support.waiting import until

pytestmark = pytest.mark.faults

STEPS, KILLS = 60, 5

# A run that is to be killed comes no further, however late that is done.
BRAKE = "sleep:57:0"


def command(shared, folder, *overrides: str) -> list[str]:
    return [
        *(sys.executable, "train.py", f"hydra.run.dir={folder}", "logger=none"),
        f"model.pretrained={shared / 'models' / 'stories260k'}",
        f"data.train={shared / 'data' / 'politeness.jsonl'}",
        *(f"trainer.max_steps={STEPS}", "data.batch_size=8", "optimizer.lr=5e-4"),
        *("trainer.threads=1", "trainer.accelerator=cpu", "trainer.log_every_n_steps=4"),
        *("checkpoint.every_n_steps=3", "checkpoint.keep=2", "evaluation.every_n_steps=7"),
        *("evaluation.samples=4", "evaluation.max_new_tokens=8"),
        "evaluation.partition_samples=0",
        *DRAWING,
        *DISTURBED,
        *overrides,
    ]


def environment(disturb: str = "sleep:0:0") -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DISTURB": disturb}


def newest_step(folder) -> int:
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"]
    except (OSError, ValueError, IndexError):
        return 0


def is_at(step: int, folder, process: subprocess.Popen) -> bool:
    """True if a run has reached a step, or is over."""
    return newest_step(folder) >= step or process.poll() is not None


def test_five_kills(shared, tmp_path):
    options = {"cwd": ROOT, "env": environment(), "capture_output": True, "text": True}
    done = subprocess.run(command(shared, tmp_path / "whole"), timeout=400, **options)
    assert done.returncode == 0, done.stderr
    seed = random.randrange(1000)
    moments = random.Random(seed)
    targets = sorted(moments.sample(range(4, STEPS - 8), KILLS))
    folder = tmp_path / "run"
    for target in targets:
        delay = moments.uniform(0, 0.3)
        with (tmp_path / "log").open("ab") as log:
            process = subprocess.Popen(
                command(shared, folder, "resume=auto"),
                cwd=ROOT,
                env=environment(BRAKE),
                stdout=log,
                stderr=log,
            )
            until(functools.partial(is_at, target, folder, process))
            time.sleep(delay)
            process.kill()
            assert process.wait() == -9, (tmp_path / "log").read_text()
        print(f"seed {seed}: killed {delay:.2f} s after step {target}")
    done = subprocess.run(command(shared, folder, "resume=auto"), timeout=400, **options)
    assert done.returncode == 0, done.stderr
    whole, run = Run(0, tmp_path / "whole"), Run(0, folder)
    assert run.result["resumed"]["step"] > 0
    assert rows(run) == rows(whole)
    assert_same_end(run, whole, after=run.result["resumed"]["step"])
