"""Runs out of the warm process are those that start cold; with two threads it forks none."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.recovery import rows
from tests.support.runs import TINY, Run, run_train
from tests.support.warm import (
    Order,
    WarmProcess,
    WarmRun,
    needs_cold_start,
    own_environment,
    run_apart,
    start_train,
    warm_process,
)

TASK = ("logger=none", "trainer.threads=1", "trainer.max_steps=3", *TINY)


def ended(run: WarmRun) -> int:
    return run.wait(120)


def forked(warm: WarmProcess, target: str, folder: Path, *argv: str) -> WarmRun:
    """A call of a function of a module in a folder."""
    order = Order(
        argv=["x", *argv],
        environment=dict(os.environ) | {"ONLY_HERE": "1"},
        cwd=str(folder),
        session=False,
        target=target,
        path=[str(folder)],
    )
    with (folder / "log").open("w") as log:
        pid = warm.start(order, log.fileno(), log.fileno())
    return WarmRun(warm, pid, None, None)


@pytest.mark.long
@pytest.mark.slow
def test_a_warm_run_is_the_cold_one_to_the_bit(tmp_path):
    warm = run_apart(f"hydra.run.dir={tmp_path / 'warm'}", *TASK)
    # PYTHONHASHSEED is read when the interpreter starts.
    environment = {"PYTHONHASHSEED": "7"}
    cold = run_apart(f"hydra.run.dir={tmp_path / 'cold'}", *TASK, env=environment)
    runs = [
        Run(done.returncode, tmp_path / name) for done, name in ((warm, "warm"), (cold, "cold"))
    ]
    assert [run.code for run in runs] == [0, 0], warm.stderr + cold.stderr
    assert rows(runs[0]) == rows(runs[1])
    weights = [(run.folder / "model" / "model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    assert runs[0].result["metrics"] == runs[1].result["metrics"]


@pytest.mark.long
@pytest.mark.slow
def test_a_variable_that_is_read_at_import_starts_cold(tmp_path):
    process = start_train("--help", stdout=subprocess.DEVNULL, env={"OMP_NUM_THREADS": "2"})
    assert isinstance(process, subprocess.Popen)
    assert process.wait(120) == 0
    process = start_train("--help", stdout=subprocess.DEVNULL, env={"DISTURB": "x", "RANK": "0"})
    assert isinstance(process, WarmRun)
    assert ended(process) == 0
    # What a run in this process leaves behind is no reason.
    assert run_train(tmp_path / "run", "trainer.max_steps=1", *TINY).code == 0
    assert needs_cold_start(own_environment(), warm_process().environment) == []
    base = {"A": "1", "WANDB_DIR": "x"}
    assert needs_cold_start(base, base | {"WANDB_DIR": "y"}) == []
    assert needs_cold_start(base, {"A": "2", "B": "3"}) == ["A", "B"]


def test_a_fork_has_its_own_place_and_ends_as_a_program_does(tmp_path):
    """Exit handlers of the interpreter run, and the exit code is the target's."""
    (tmp_path / "program.py").write_text(
        "import atexit, os, sys\nfrom pathlib import Path\n\ndef main():\n"
        "    atexit.register(Path('left').write_text, os.environ['ONLY_HERE'])\n"
        "    print(*sys.argv)\n    return 7\n"
    )
    assert ended(forked(warm_process(), "program:main", tmp_path, "a", "b")) == 7
    assert (tmp_path / "left").read_text() == "1"
    assert (tmp_path / "log").read_text() == "x a b\n"
    assert "ONLY_HERE" not in os.environ


def test_a_signal_is_minus_its_number(tmp_path):
    (tmp_path / "sleeper.py").write_text(
        "import time\nfrom pathlib import Path\n\ndef main():\n"
        "    Path('up').touch()\n    time.sleep(600)\n"
    )
    run = forked(warm_process(), "sleeper:main", tmp_path)
    while not (tmp_path / "up").exists():
        assert run.poll() is None
    run.kill()
    assert ended(run) == -9


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_two_threads_fork_nothing(tmp_path, monkeypatch):
    """A fork while another thread holds a lock, as those of a product do, would hang."""
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    warm = WarmProcess(["threaded"])
    with pytest.raises(RuntimeError, match="2 threads"):
        forked(warm, "sys:exit", tmp_path)
    warm.close()
