"""Runs that are stopped, diverge, run out of memory or lose a rank; one process and two."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT, TINY, Run, run_train

DISTURBED = ("plugins=[tests.disturbances]", "trainer.callbacks=[disturb]")
SMALL = (*TINY, "evaluation.partition_samples=0", "trainer.accelerator=cpu")
TWO = ("strategy=ddp", "trainer.devices=2")
# Long enough that a signal comes in the middle.
LONG = ("trainer.max_steps=400", "checkpoint.every_n_steps=null")


def start(folder, *overrides: str, disturb: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "train.py", f"hydra.run.dir={folder}", "logger=none"]
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [*command, "trainer.threads=1", *overrides],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "DISTURB": disturb, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for_step(folder, process, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with_rows = folder / "metrics.jsonl"
        lines = with_rows.read_text().splitlines() if with_rows.exists() else []
        if len(lines) > 1 and json.loads(lines[-2])["step"] >= step:
            return
        time.sleep(0.02)
    raise AssertionError(folder.with_suffix(".log").read_text())


def ended(folder, process, seconds: float = 60) -> Run:
    """The run, when all of its processes are gone."""
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(folder.with_suffix(".log").read_text()) from None
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline and ranks_of(folder):
        time.sleep(0.1)
    assert not ranks_of(folder)
    return Run(code, folder)


def ranks_of(folder) -> list[int]:
    """Process ids of a run, the first rank first."""
    found = []
    for path in ROOT.__class__("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode().split("\0")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"hydra.run.dir={folder}" in words and state != "Z":
            rank = b"LOCAL_RANK=1" in (path / "environ").read_bytes()
            found.append((rank, int(path.name)))
    return [pid for _, pid in sorted(found)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run of one process."""
    run = run_train(tmp_path_factory.mktemp("whole") / "run", *SMALL, *LONG)
    assert run.code == 0
    return run


def assert_same_weights(one: Run, other: Run, *, exact: bool) -> None:
    mine, theirs = (load_file(run.folder / "model" / "model.safetensors") for run in (one, other))
    for name, tensor in mine.items():
        if exact:
            assert torch.equal(tensor, theirs[name]), name
        else:
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.faults)],
)
def test_a_signal_finishes_the_step_and_saves_it(whole, tmp_path, signum, code: int):
    folder = tmp_path / "run"
    process = start(folder, *SMALL, *LONG)
    wait_for_step(folder, process, 5)
    process.send_signal(signum)
    run = ended(folder, process)
    assert run.code == code
    assert run.result["status"] == "stopped"
    step = run.result["step"]
    assert 5 <= step < 400
    assert (folder / "checkpoints" / f"step-{step:06d}.ckpt").exists()
    assert signal.Signals(signum).name in run.result["error"]
    assert not (folder / "model").exists()
    resumed = run_train(folder, *SMALL, *LONG, "resume=auto")
    assert resumed.code == 0
    assert_same_weights(whole, resumed, exact=True)
    steps = [row["step"] for row in resumed.rows if "train/loss" in row]
    assert steps == sorted(set(steps))


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_stops_all_at_one_step(whole, tmp_path, rank: int):
    folder = tmp_path / "run"
    process = start(folder, *SMALL, *LONG, *TWO)
    wait_for_step(folder, process, 5)
    os.kill(ranks_of(folder)[rank], signal.SIGTERM)
    run = ended(folder, process)
    assert run.code == 143
    assert run.result["status"] == "stopped"
    assert (folder / "checkpoints" / f"step-{run.result['step']:06d}.ckpt").exists()
    # The same groups in the same order with one rank, too.
    resumed = run_train(folder, *SMALL, *LONG, "resume=auto")
    assert resumed.code == 0
    assert_same_weights(whole, resumed, exact=False)


def test_a_second_signal_does_not_wait_for_the_step(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, *SMALL, *LONG, *DISTURBED, disturb="sleep:4:0")
    deadline = time.monotonic() + 120
    while b"asleep" not in folder.with_suffix(".log").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    process.send_signal(signal.SIGTERM)
    run = ended(folder, process, seconds=20)
    assert run.code == 143
    assert run.result["status"] == "stopped"


@pytest.mark.parametrize("kind", ["nan", "loss", "gradient"])
def test_a_step_that_is_not_finite_is_not_taken(tmp_path, monkeypatch, kind: str):
    monkeypatch.setenv("DISTURB", f"{kind}:3:0")
    run = run_train(tmp_path / "run", *SMALL, *DISTURBED, "checkpoint.every_n_steps=1")
    assert run.code == 3
    assert run.result["status"] == "diverged"
    assert run.result["step"] == 2
    content = json.loads((run.folder / "diverged.json").read_text())
    assert content["step"] == 3
    assert len(content["rows"]) == 16
    assert "diverged.json" in run.result["error"]
    assert "step 3" in run.result["error"]
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    assert names == ["step-000002.ckpt", "step-000002.json"]
    assert not (run.folder / "model").exists()


def test_so_many_steps_may_be_skipped_and_are_counted(tmp_path, monkeypatch):
    """The skipped step counts in plan and schedule, so a resume from behind it is exact."""
    monkeypatch.setenv("DISTURB", "nan:3:0")
    settings = (*SMALL, *DISTURBED, "trainer.max_skipped_steps=1", "checkpoint.every_n_steps=2")
    run = run_train(tmp_path / "run", *settings, "checkpoint.keep=9")
    assert run.code == 0
    assert run.values("train/skipped_steps")[-1] == 1
    assert run.result["step"] == 6
    resume = f"resume={run.folder}/checkpoints/step-000004.ckpt"
    resumed = run_train(tmp_path / "resumed", *settings, resume)
    assert resumed.code == 0
    assert_same_weights(run, resumed, exact=True)
    assert resumed.values("train/skipped_steps")[-1] == 1


def test_too_little_memory_is_one_line_with_what_to_turn(tmp_path, monkeypatch):
    monkeypatch.setenv("DISTURB", "memory:3:0")
    run = run_train(tmp_path / "run", *SMALL, *DISTURBED, "checkpoint.every_n_steps=2")
    assert run.code == 2
    error = run.result["error"]
    for part in (
        *("step 3", "tokens in", "data.micro_batch_tokens below"),
        *("model.gradient_checkpointing=true", "step-000002.ckpt"),
    ):
        assert part in error, part


@pytest.mark.parametrize(
    ("kind", "code", "status"),
    [
        ("loss", 3, "diverged"),
        pytest.param("memory", 2, "failed", marks=pytest.mark.faults),
        pytest.param("vanish", 1, "failed", marks=pytest.mark.faults),
    ],
)
def test_what_happens_to_one_rank_ends_all(tmp_path, kind: str, code: int, status: str):
    folder = tmp_path / "run"
    process = start(folder, *SMALL, *LONG, *TWO, *DISTURBED, disturb=f"{kind}:4:1")
    run = ended(folder, process, seconds=120)
    assert run.code == code, folder.with_suffix(".log").read_text()
    assert run.result["status"] == status
    assert "rank 1" in run.result["error"] or kind == "loss"
    assert (folder / "diverged.json").exists() == (kind == "loss")
