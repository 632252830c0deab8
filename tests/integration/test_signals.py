"""Runs that are stopped, diverge, run out of memory or lose a rank; one process and two."""

import contextlib
import json
import os
import signal
import subprocess

import pytest

from tests.support.runs import run_train
from tests.support.signals import (
    DISTURBED,
    LONG,
    SHORT,
    SMALL,
    TWO,
    UNDISTURBED,
    assert_same_weights,
    ended,
    ranks_of,
    start,
    wait_for_word,
)
from tests.support.waiting import until


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run of one process."""
    run = run_train(tmp_path_factory.mktemp("whole") / "run", *SMALL, *SHORT)
    assert run.code == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.faults)],
)
def test_a_signal_finishes_the_step_and_saves_it(whole, tmp_path, signum, code: int):
    folder = tmp_path / "run"
    process = start(folder, *SMALL, *SHORT, *DISTURBED, disturb="pause:6:0")
    wait_for_word(folder, process, "paused")
    process.send_signal(signum)
    folder.with_suffix(".go").touch()
    run = ended(folder, process)
    assert run.code == code
    assert run.result["status"] == "stopped"
    assert run.result["step"] == 6
    assert (folder / "checkpoints" / "step-000006.ckpt").exists()
    assert signal.Signals(signum).name in run.result["error"]
    assert not (folder / "model").exists()
    resumed = run_train(folder, *SMALL, *SHORT, *UNDISTURBED, "resume=auto")
    assert resumed.code == 0
    assert_same_weights(whole, resumed, exact=True)
    steps = [row["step"] for row in resumed.rows if "train/loss" in row]
    assert steps == list(range(1, 25))


@pytest.mark.faults
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_any_rank_stops_all_at_one_step(whole, tmp_path, rank: int):
    folder = tmp_path / "run"
    process = start(folder, *SMALL, *SHORT, *TWO, *DISTURBED, disturb="pause:6:0")
    wait_for_word(folder, process, "paused")
    os.kill(ranks_of(process)[rank], signal.SIGTERM)
    folder.with_suffix(".go").touch()
    run = ended(folder, process)
    assert run.code == 143
    assert run.result["status"] == "stopped"
    assert (folder / "checkpoints" / f"step-{run.result['step']:06d}.ckpt").exists()
    # The same groups in the same order with one rank, too.
    resumed = run_train(folder, *SMALL, *SHORT, *UNDISTURBED, "resume=auto")
    assert resumed.code == 0
    assert_same_weights(whole, resumed, exact=False)


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_the_step(tmp_path):
    folder = tmp_path / "run"
    process = start(folder, *SMALL, *LONG, *DISTURBED, disturb="sleep:4:0")
    log = folder.with_suffix(".log")
    until(lambda: b"asleep" in log.read_bytes(), log.read_text)
    sent = 0

    def end() -> bool:
        # Two within a second count as one, as whoever signals a group may reach each of it twice.
        nonlocal sent
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            sent += 1
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.5)
        return process.poll() is not None

    until(end, log.read_text)
    assert sent > 1
    run = ended(folder, process)
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


@pytest.mark.long
@pytest.mark.slow
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
    run = ended(folder, process)
    assert run.code == code, folder.with_suffix(".log").read_text()
    assert run.result["status"] == status
    assert "rank 1" in run.result["error"] or kind == "loss"
    assert (folder / "diverged.json").exists() == (kind == "loss")
