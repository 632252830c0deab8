"""Trials at a node: one writer of a folder at a time, whoever started it and however it is lost."""

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dpo_lightning.sweeps.places import claims
from dpo_lightning.sweeps.places.base import Work
from dpo_lightning.sweeps.places.claims import claim_of, give_order, withdraw_order
from dpo_lightning.sweeps.places.runner import STOPPED, Order, Runner, make_order, run_order
from dpo_lightning.sweeps.trials import Trial
from tests.support.runs import ROOT
from tests.support.sweeps import alive
from tests.support.trials import plan, run, stand_in
from tests.support.waiting import until

# Beats twenty times a second for as long as it lives, under its own number.
BEAT = (
    "beats = (folder / 'beats').open('a', buffering=1)\n"
    "while not (folder / 'enough').exists():\n"
    "    beats.write(f'{os.getpid()} {time.time()}\\n')\n"
    "    time.sleep(0.05)\n"
    "finish()"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "trial"
    folder.mkdir()
    stand_in(tmp_path)
    return folder


def order(folder: Path, act: str, *, attempt: str | None = None, **options) -> Order:
    return Order(
        attempt=attempt or give_order(folder),
        folder=str(folder),
        program=(str(folder.parent / "train.py"),),
        arguments=(act,),
        workdir=str(folder.parent),
        defaults={"OMP_NUM_THREADS": "1"},
        **options,
    )


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def beats(folder: Path) -> dict[str, list[float]]:
    """Times by process, from lines that are whole."""
    found: dict[str, list[float]] = {}
    path = folder / "beats"
    for line in path.read_text().splitlines()[:-1] if path.exists() else []:
        pid, when = line.split()
        found.setdefault(pid, []).append(float(when))
    return found


class Thread(threading.Thread):
    """A runner beside this one, as if on another node; signals do not reach it."""

    def __init__(self, order: Order, **options) -> None:
        super().__init__(daemon=True)
        self.runner = Runner(order, **options)
        self.code: int | None = None
        self.start()

    def run(self) -> None:
        self.code = self.runner.run()


@pytest.mark.parametrize(
    ("act", "code"),
    [("finish()", 0), ("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", -9)],
)
def test_a_trial_ends_and_its_claim_says_how(folder, act, code):
    given = order(folder, f"print('hello', flush=True); {act}")
    assert run_order(given) == code
    claim = claim_of(folder, given.attempt)
    assert (claim["state"], claim["exit_code"], claim["starts"]) == ("ended", code, 1)
    assert "hello" in (folder / "trial.log").read_text()
    assert claim_of(folder, "another") == {}


def test_it_goes_on_from_a_checkpoint_and_what_was_left_does_not_pass_for_its_result(folder):
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-000003.ckpt").touch()
    (folder / "result.json").write_text('{"status": "finished"}')
    assert run_order(order(folder, "assert not (folder / 'result.json').exists(); finish()")) == 0
    assert result(folder)["metrics"]["resumed"] is True
    assert (folder / "checkpoints" / "step-000003.ckpt").exists()


def test_the_environment_is_the_nodes_but_for_what_the_sweep_sets(folder, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("HF_HOME", "/of/the/node")
    checks = (
        "assert os.environ['CUDA_VISIBLE_DEVICES'] == '' and os.environ['GROUP'] == 'g'\n"
        "assert os.environ['HF_HOME'] == '/of/the/node' and os.environ['HF_X'] == 'sweep'\n"
        "assert os.getpid() == os.getpgrp() and os.getcwd() == str(folder.parent)\n"
        "finish()"
    )
    given = order(folder, checks, hide_gpus=True, environment={"GROUP": "g"})
    defaults = dict(given.defaults) | {"HF_HOME": "/of/the/sweep", "HF_X": "sweep"}
    given = order(folder, checks, hide_gpus=True, environment={"GROUP": "g"}, attempt=given.attempt)
    object.__setattr__(given, "defaults", defaults)
    assert run_order(given) == 0, (folder / "trial.log").read_text()


def test_an_order_has_no_credentials(folder, monkeypatch):
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HF_HOME", "WANDB_MODE", "AWS_SECRET"):
        monkeypatch.setenv(name, "x")
    trial = Trial(plan("a", "x"), folder)
    work = Work([trial.plan], folder.parent, ("train.py",), {"WANDB_RUN_GROUP": "s"})
    made = make_order(trial, work, attempt="a", threads=3, max_starts=None)
    assert {"HF_HOME", "WANDB_MODE"} <= set(made.defaults)
    assert not {"WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET"} & set(made.defaults)
    assert made.defaults["OMP_NUM_THREADS"] == "3"
    assert Path(made.folder).is_absolute()


def test_an_order_that_was_given_anew_is_not_carried_out(folder):
    old = order(folder, BEAT)
    order(folder, BEAT)
    assert run_order(old) == STOPPED
    assert not (folder / "beats").exists()


@pytest.mark.slow
def test_a_trial_whose_order_is_withdrawn_is_asked_to_end(folder):
    act = (
        f"try:\n    exec({BEAT!r})\nexcept KeyboardInterrupt:\n    finish('stopped'); sys.exit(130)"
    )
    given = order(folder, act)
    thread = Thread(given)
    until(lambda: beats(folder))
    withdraw_order(folder)
    thread.join(120)
    assert (thread.code, result(folder)["status"]) == (STOPPED, "stopped")
    assert claim_of(folder, given.attempt)["state"] == "ended"
    assert alive(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("same_attempt", [True, False])
def test_a_second_start_waits_until_the_first_one_is_gone(folder, same_attempt):
    """The first is alive and well: Ray may think its node lost, a sweep may be typed anew."""
    first = order(folder, BEAT)
    one = Thread(first)
    until(lambda: beats(folder))
    second = order(folder, BEAT, attempt=first.attempt if same_attempt else None)
    two = start_runner(second)
    until(lambda: len(beats(folder)) == 2)
    (folder / "enough").touch()
    assert two.wait(120) == 0
    one.join(120)
    assert one.code == STOPPED
    (earlier, later) = beats(folder).values()
    assert max(earlier) < min(later)
    assert claim_of(folder, second.attempt)["starts"] == (2 if same_attempt else 1)
    assert claim_of(folder, second.attempt)["exit_code"] == 0


def test_what_is_not_seen_from_here_is_waited_for(folder, monkeypatch):
    """A claim of another machine: nothing but time says that its runner has noticed."""
    given = order(folder, "finish()")
    claim = {"attempt": given.attempt, "run": "x", "state": "open", "starts": 1, "machine": "far"}
    (folder / ".claim.json").write_text(json.dumps(claim))
    waits = []
    monkeypatch.setattr(claims.time, "sleep", lambda seconds: waits.append(seconds))
    assert claims.Claim(folder, given.attempt, "y").take(["here"]) == 2
    assert waits == [claims.TAKE_OVER_SECONDS]
    # One that said that its processes are gone is not waited for.
    (folder / ".claim.json").write_text(json.dumps(claim | {"state": "left"}))
    assert claims.Claim(folder, given.attempt, "z").take(["here"]) == 2
    assert len(waits) == 1


def test_a_note_of_one_that_was_taken_over_does_not_undo_it(folder, monkeypatch):
    """The other looked at the claim, was overtaken, and only then wrote its own note into it."""
    given = order(folder, "finish()")
    path, first = folder / ".claim.json", {"attempt": given.attempt, "run": "x", "starts": 1}
    second = claims.Claim(folder, given.attempt, "y")

    def take(*, meanwhile: dict) -> bool:
        """True if the second holds the folder after the other's last moments."""
        path.write_text(json.dumps(first | {"state": "open", "machine": "far"}))
        late = json.dumps(first | meanwhile)
        monkeypatch.setattr(claims.time, "sleep", lambda seconds: path.write_text(late))
        second.take(["here"])
        return second.holds()

    assert take(meanwhile={"state": "open", "machine": "far", "group": [1, 0]})
    assert take(meanwhile={"state": "left"})
    # What has come to its end is not begun again, and who overtakes this one in turn may.
    assert not take(meanwhile={"state": "ended", "exit_code": 0})
    assert not take(meanwhile={"state": "open", "run": "z"})


def test_a_runner_whose_order_was_given_anew_takes_the_folder_from_nobody(folder, monkeypatch):
    """It had looked at its order before that, and at the claim after another had taken it."""
    monkeypatch.setattr(claims, "TAKE_OVER_SECONDS", 0.0)
    old, given = order(folder, "finish()"), order(folder, "finish()")
    right, late = (claims.Claim(folder, o.attempt, n) for o, n in ((given, "right"), (old, "late")))
    right.take(["here"])
    late.take(["here"])
    assert not late.holds()
    assert right.holds()
    assert claim_of(folder, given.attempt)["run"] == "right"
    late.take(["here"])
    right.end(0)
    late.end(1)
    assert claim_of(folder, given.attempt)["exit_code"] == 0


@pytest.mark.slow
def test_a_trial_of_this_machine_waits_for_the_job_of_another_launcher(folder):
    """The job of a killed sweep is at work there; its order ends when the trial starts here."""
    job = start_runner(order(folder, BEAT))
    until(lambda: beats(folder))
    try:
        [trial], _ = run(folder.parent, [plan("trial", "finish()")])
        last = len(beats(folder).popitem()[1])
        until(lambda: job.poll() is not None or len(beats(folder).popitem()[1]) > last)
        assert job.poll() == STOPPED
    finally:
        job.kill()
        job.wait()
    assert trial.status == "finished"
    [times] = beats(folder).values()
    assert max(times) < trial.metrics["begin"]


def test_a_trial_is_never_started_beside_one_that_stays(folder, monkeypatch):
    """Its runner is dead, it lives: on a system that does not let it die with its parent."""
    monkeypatch.setattr(claims, "TAKE_OVER_SECONDS", 0.5)
    stays = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)"], process_group=0
    )
    given = order(folder, "finish()")
    first = claims.Claim(folder, given.attempt, "x")
    first.take(["here"])
    first.note_group(stays.pid)
    content = json.loads((folder / ".claim.json").read_text())
    (folder / ".claim.json").write_text(json.dumps(content | {"runner": [1, 0]}))
    try:
        assert run_order(given) == STOPPED
        said = claim_of(folder, given.attempt)
        assert said["state"] == "ended"
        assert str(stays.pid) in said["reason"]
        assert not (folder / "result.json").exists()
    finally:
        stays.kill()
        stays.wait()
    assert run_order(given) == 0


def start_runner(given: Order) -> subprocess.Popen:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from dpo_lightning.sweeps.places.runner import Order, run_order\n"
        f"sys.exit(run_order({given!r}))"
    )
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_a_trial_dies_at_once_with_its_runner_and_takes_its_ranks_along(folder):
    """SIGKILL to the runner, as when a machine is lost; the trial ignores every request to end.

    It would be given an hour to end by itself.
    """
    rank = (
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r}); "
        "from dpo_lightning.processes.lifeline import watch_lifeline; watch_lifeline(); "
        f"open('{folder}/rank', 'w').write(str(os.getpid())); time.sleep(999)"
    )
    act = (
        "from dpo_lightning.processes import lifeline; lifeline._GRACE_SECONDS = 3600\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"subprocess.Popen([sys.executable, '-c', {rank!r}])\n"
        f"{BEAT}"
    )
    runner = start_runner(order(folder, act))
    rank_file = folder / "rank"
    until(lambda: beats(folder) and rank_file.exists() and rank_file.read_text())
    runner.kill()
    runner.wait()
    until(lambda: not alive(folder.parent / "train.py"))
    pid = int(rank_file.read_text())
    until(lambda: not Path(f"/proc/{pid}").exists())


def test_a_runner_that_is_interrupted_leaves_its_folder_to_the_next(folder):
    given = order(folder, f"exec({BEAT!r})")
    runner = start_runner(given)
    until(lambda: beats(folder))
    runner.send_signal(signal.SIGINT)
    runner.wait(120)
    assert claim_of(folder, given.attempt)["state"] == "left"
    assert alive(folder) == []
    (folder / "enough").touch()
    assert run_order(given) == 0
    assert claim_of(folder, given.attempt)["starts"] == 2


def test_a_trial_that_is_lost_again_and_again_is_given_up(folder):
    given = order(folder, "finish()", max_starts=2)
    for starts in (1, 2, 3):
        claims.Claim(folder, given.attempt, f"run {starts}").take(["here"])
        claims.Claim(folder, given.attempt, f"run {starts}").leave()
        content = json.loads((folder / ".claim.json").read_text())
        (folder / ".claim.json").write_text(json.dumps(content | {"state": "left"}))
    assert run_order(given) == STOPPED
    assert "lost 3 times" in claim_of(folder, given.attempt)["reason"]
    assert not (folder / "result.json").exists()


@pytest.mark.slow
def test_the_tasks_of_a_job_end_together(folder, monkeypatch):
    """The second rank fails: the first one, which would wait for it for ever, is ended."""
    monkeypatch.setattr("dpo_lightning.sweeps.places.runner._OTHER_RANKS_SECONDS", 0.2)
    act = (
        "if 'hydra.output_subdir=null' in sys.argv: sys.exit(5)\n"
        "print('first', flush=True); time.sleep(600)"
    )
    given = order(folder, act)
    (folder.parent / "train.py").write_text(
        (folder.parent / "train.py").read_text().replace(
            "*_, act, folder, mode = [a for a in sys.argv if not a.startswith(\"resume=\")]",
            "_, act, folder, mode, *_ = [a for a in sys.argv if not a.startswith(\"resume=\")]",
        )
    )  # fmt: skip
    one = Thread(given, run="7.0")
    two = Thread(given, run="7.0", rank=1)
    one.join(120)
    two.join(120)
    assert (one.code, two.code) == (5, 5)
    assert claim_of(folder, given.attempt)["exit_code"] == 5
    assert "first" in (folder / "trial.log").read_text()
    assert (folder / "trial-rank-1.log").exists()
