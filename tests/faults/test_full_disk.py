"""No room: one line, exit code 2, the old checkpoint whole, result.json and metrics written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning.training.checkpoints.files import CHECKPOINTS, find_checkpoint
from tests.support.crashes import TASK, drive
from tests.support.recovery import assert_same_end
from tests.support.runs import ROOT, Run, run_train

pytestmark = pytest.mark.faults


def one_line(done: subprocess.CompletedProcess) -> str:
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    return errors[0]


@pytest.mark.parametrize("step", [1, 3])
def test_a_file_that_may_not_grow(tmp_path, step: int):
    """EFBIG in the first save, and in a later one with a whole checkpoint before it.

    It is written while the next step is taken, at whose end the run stops.
    """
    folder = tmp_path / "run"
    done = drive("limit", step, folder, "checkpoint.every_n_steps=1", "checkpoint.keep=9")
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"step-00000{step}.ckpt: File too large" in one_line(done)
    run = Run(2, folder)
    assert run.result["status"] == "failed"
    assert run.result["step"] == step + 1
    assert run.values("train/loss")
    left = sorted(path.name for path in (folder / CHECKPOINTS).iterdir())
    assert left == [f"step-00000{n}.{kind}" for n in range(1, step) for kind in ("ckpt", "json")]
    whole = run_train(tmp_path / "whole", *TASK, "checkpoint.keep=9")  # as the other says
    again = run_train(folder, *TASK, "resume=auto")
    assert_same_end(again, whole, after=step - 1)


def can_mount() -> bool:
    probe = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    return shutil.which("unshare") is not None and (
        subprocess.run(probe, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.parametrize("point", ["preflight", "believe in room"])
def test_a_small_file_system(tmp_path, point: str):
    """Room for one checkpoint and a half, foreseen or not."""
    if not can_mount():
        pytest.skip("mounting a tmpfs needs `unshare -rm`, which this system does not allow")
    plain = run_train(tmp_path / "plain", *TASK)
    size = (plain.folder / CHECKPOINTS / "step-000008.ckpt").stat().st_size
    small, copy = tmp_path / "small", tmp_path / "copy"
    small.mkdir()
    room = int(1.5 * size) // 1024 + (1100 if point == "preflight" else 64)
    arguments = [f"hydra.run.dir={small}/run", "logger=none", "trainer.threads=1", *TASK]
    script = (
        f"mount -t tmpfs -o size={room}k tmpfs {small} || exit 99; "
        f'"$@"; code=$?; cp -r {small}/run {copy}; exit $code'
    )
    run = [sys.executable, "-m", "tests.support.crash", point, "0", *arguments]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *run],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    line = one_line(done)
    assert ("GiB free" if point == "preflight" else "No space left") in line
    assert "step-000004.ckpt" in line
    result = json.loads((copy / "result.json").read_text())
    assert result["status"] == "failed"
    assert "step-000004.ckpt" in result["error"]
    found = find_checkpoint("auto", Path(copy))
    assert found is not None
    assert found.name == "step-000002.ckpt"
    assert not list((copy / CHECKPOINTS).glob(".*"))
