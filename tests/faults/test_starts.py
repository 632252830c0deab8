"""Starts in the folder of an earlier run: refused, interrupted at any moment, two at once."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.folders import hashes
from tests.support.runs import Run, run_train
from tests.support.signals import DISTURBED, SMALL, UNDISTURBED, ended, start, wait_for_word

pytestmark = pytest.mark.faults

SHORT = (*SMALL, "trainer.max_steps=3")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    run = run_train(tmp_path_factory.mktemp("finished") / "run", *SHORT)
    assert run.code == 0
    return run


@pytest.fixture
def folder(finished: Run, tmp_path) -> Path:
    shutil.copytree(finished.folder, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("tenth", range(10))
def test_ctrl_c_at_ten_moments_of_a_start(folder: Path, tenth: int):
    """The run waits ahead of its first step, so that each moment is before it."""
    before = hashes(folder)
    process = start(folder, *DISTURBED, *SHORT, "overwrite=true", "beta=0.3", disturb="sleep:1:0")
    if tenth == 9:
        wait_for_word(folder, process, "asleep")
    else:
        time.sleep(0.3 * tenth)
    while process.poll() is None:
        os.kill(process.pid, signal.SIGINT)
        # A first one may come before Python listens, or waits for a step that never comes.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2.0)
    assert ended(folder, process).code in (130, -signal.SIGINT)
    assert hashes(folder) == before


def test_of_two_runs_in_one_folder_the_second_is_refused(folder: Path):
    (folder / "result.json").unlink()
    first = start(
        folder, *DISTURBED, *SHORT, "resume=auto", "trainer.max_steps=6", disturb="pause:5:0"
    )
    wait_for_word(folder, first, "paused")
    before = hashes(folder)
    second = run_train(folder, *SHORT, "resume=auto")
    assert second.code == 2
    assert hashes(folder) == before
    folder.with_suffix(".go").touch()
    assert ended(folder, first).result["step"] == 6


def test_a_killed_trainer_with_workers_leaves_its_folder_free(folder: Path):
    (folder / "result.json").unlink()
    words = (*SHORT, "data.num_workers=2", "trainer.max_steps=6")
    first = start(folder, *DISTURBED, *words, "resume=auto", disturb="sleep:5:0")
    wait_for_word(folder, first, "asleep")
    os.kill(first.pid, signal.SIGKILL)
    again = run_train(folder, *words, *UNDISTURBED, "resume=auto")
    assert again.code == 0
    assert again.result["step"] == 6


def test_a_full_disk_leaves_an_earlier_run(finished: Run, tmp_path):
    """On a file system of its own, whose rest is filled."""
    small, copy = tmp_path / "small", tmp_path / "copy"
    small.mkdir()
    words = [f"hydra.run.dir={small}/run", "logger=none", "trainer.threads=1", *SHORT]
    script = (
        f"mount -t tmpfs -o size=64m tmpfs {small} || exit 99; cp -r {finished.folder} {small}/run;"
        f'dd if=/dev/zero of={small}/rest bs=4k 2>/dev/null; "$@"; code=$?;'
        f"rm {small}/rest; cp -r {small}/run {copy}; exit $code"
    )
    run = [sys.executable, "train.py", *words, "overwrite=true", "beta=0.3"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *run],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode == 99 or "unshare" in done.stderr:
        pytest.skip("mounting a tmpfs needs `unshare -rm`, which this system does not allow")
    assert done.returncode == 2, done.stdout + done.stderr
    [said] = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in said
    assert str(small) in said
    assert hashes(copy) == hashes(finished.folder)
