"""The dispatcher with quick stand-ins for trials: leases, failures, retries, interrupts."""

import fcntl
import io
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from dpo_lightning.sweeps.dispatch import Dispatcher
from dpo_lightning.sweeps.places import leases
from dpo_lightning.sweeps.places import local as local_processes
from dpo_lightning.sweeps.places.leases import DevicePool
from dpo_lightning.sweeps.places.local import open_local
from dpo_lightning.sweeps.trials import Trial, place_trials
from dpo_lightning.sweeps.view import SweepView
from tests.support.runs import ROOT
from tests.support.sweeps import alive
from tests.support.trials import Silent, plan, run, stand_in
from tests.support.waiting import until


def finish_after(name: str) -> str:
    """A trial that finishes when another one has."""
    path = f"folder.parent / {name!r} / 'result.json'"
    return f"while not ({path}).exists(): time.sleep(0.02)\nfinish()"


def test_uneven_trials_keep_two_slots_busy_and_never_share_one(tmp_path):
    """The first of five outlasts the others: while any waits, both slots are at work.

    Round robin would put the first, third and fifth on one slot and leave the other idle.
    """
    plans = [plan("t0", finish_after("t4"))]
    plans += [plan(f"t{i}", "finish()") for i in range(1, 5)]
    trials, view = run(tmp_path, plans)
    assert [trial.status for trial in trials] == ["finished"] * 5
    spans = [(t.metrics["begin"], t.metrics["end"], t.devices) for t in trials]
    for i, (begin, end, devices) in enumerate(spans):
        for other_begin, other_end, other_devices in spans[:i]:
            if begin < other_end and other_begin < end:
                assert devices != other_devices
    kinds = ["start" if what.startswith("cpu") else "end" for _, what, _ in view.said]
    free, waiting = 2, 5
    for kind, events in itertools.groupby(kinds):
        count = len(list(events))
        if kind == "start":
            assert count == min(free, waiting)
            free, waiting = free - count, waiting - count
        else:
            free += count
    assert spans[4][2] == ["cpu:1"]


def test_a_trial_takes_as_many_slots_as_it_has_devices(tmp_path):
    plans = [
        plan("one", finish_after("three")),
        plan("two", "finish()", width=2),
        plan("three", "finish()"),
    ]
    trials, _ = run(tmp_path, plans)
    one, two, three = trials
    assert two.devices == ["cpu:0", "cpu:1"]
    assert two.metrics["begin"] >= max(one.metrics["end"], three.metrics["end"])
    # A narrow one passes a wide one that has to wait.
    assert three.metrics["begin"] < one.metrics["end"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "status", "code"),
    [
        ("raise RuntimeError('boom')", "failed", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed", -9),
        pytest.param("sys.exit(0)", "failed", 0, marks=pytest.mark.slow),
        pytest.param("sys.exit(7)", "failed", 7, marks=pytest.mark.slow),
        pytest.param("os._exit(137)", "failed", 137, marks=pytest.mark.slow),
        ("finish('diverged'); sys.exit(3)", "diverged", 3),
        ("finish('stopped'); sys.exit(143)", "stopped", 143),
    ],
)
def test_a_trial_that_ends_badly_ends_alone(tmp_path, act, status, code):
    good = "time.sleep(0.1); finish()"
    plans = [plan("a", good), plan("bad", act), plan("c", good), plan("d", good)]
    trials, _ = run(tmp_path, plans)
    assert [trial.status for trial in trials] == ["finished", status, "finished", "finished"]
    assert trials[1].exit_code == code
    assert trials[1].error
    about = json.loads((tmp_path / "bad" / "trial.json").read_text())
    assert (about["status"], about["exit_code"], about["log"]) == (status, code, "trial.log")
    if "boom" in act:
        assert "boom" in (tmp_path / "bad" / "trial.log").read_text()
    # The same again: only what did not finish runs.
    times = [trial.metrics["end"] for trial in trials if trial.status == "finished"]
    plans[1] = plan("bad", good)
    trials, view = run(tmp_path, plans)
    assert [trial.status for trial in trials] == ["finished"] * 4
    assert [trial.metrics["end"] for trial in (trials[0], *trials[2:])] == times
    assert {name for name, *_ in view.said} == {"bad"}


def test_retries_start_a_crashed_trial_again_from_its_checkpoint(tmp_path):
    act = (
        "first = not (folder / 'checkpoints').exists()\n"
        "(folder / 'checkpoints').mkdir(exist_ok=True)\n"
        "(folder / 'checkpoints' / 'step-000003.ckpt').touch()\n"
        "sys.exit(1) if first else finish()"
    )
    [trial], view = run(tmp_path, [plan("a", act)], retries=2)
    assert (trial.status, trial.attempts) == ("finished", 2)
    assert trial.metrics["resumed"] is True
    assert view.said[1] == ("a", "waiting", True)


@pytest.mark.parametrize(("act", "attempts"), [("sys.exit(1)", 3), ("sys.exit(2)", 1)])
def test_retries_end_and_a_wrong_setting_has_none(tmp_path, act, attempts):
    [trial], _ = run(tmp_path, [plan("a", act)], retries=2)
    assert (trial.status, trial.attempts) == ("failed", attempts)


@pytest.mark.parametrize(("most", "started"), [(0, 1), (1, 2), (None, 4)])
def test_max_failures_stops_starting(tmp_path, most, started):
    plans = [plan(f"t{i}", "sys.exit(1)") for i in range(4)]
    trials, _ = run(tmp_path, plans, slots=1, max_failures=most)
    assert [trial.status for trial in trials].count("failed") == started
    assert [trial.status for trial in trials].count("waiting") == 4 - started


def test_what_a_trial_leaves_behind_is_ended_with_it(tmp_path):
    """A rank whose first rank died would hold its device and wait for ever."""
    act = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(999)', str(folder)])"
    [trial], _ = run(tmp_path, [plan("a", f"{act}; os._exit(1)")])
    assert trial.status == "failed"
    assert alive(tmp_path) == []


def test_the_environment_and_the_threads_of_a_trial(tmp_path):
    act = "finish(); assert os.environ['GROUP'] == 'g' and os.getpid() == os.getpgrp()"
    [trial], _ = run(tmp_path, [plan("a", act)], slots=64, environment={"GROUP": "g"})
    assert (trial.status, trial.metrics["threads"]) == ("finished", os.environ["OMP_NUM_THREADS"])


def test_threads_do_not_follow_how_many_run(tmp_path, monkeypatch):
    """Eight cores and four slots are two threads each, for the last trial alone, too."""
    monkeypatch.setattr(leases, "_cores", lambda: range(8))
    for name in leases.THREAD_LIMITS:
        monkeypatch.delenv(name, raising=False)
    plans = [plan(f"t{n}", "finish()") for n in range(5)]
    trials, _ = run(tmp_path, plans, slots=4)
    assert [trial.metrics["threads"] for trial in trials] == ["2"] * 5
    trials, _ = run(tmp_path, [*plans, plan("more", "finish()")], slots=4)
    assert trials[-1].metrics["threads"] == "2"


def test_a_trial_that_an_earlier_command_finishes_meanwhile_is_not_run_again(tmp_path):
    """It had not finished when this command looked, and has when its turn comes."""
    trials, said = place_trials([plan("a", "finish()")], tmp_path), io.StringIO()
    assert trials[0].status == "waiting"
    run(tmp_path, [plan("a", "finish()")])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    view = SweepView(trials, Console(file=said))
    with open_local({"cpu": DevicePool("cpu", ["0"])}, stand_in(tmp_path), {}) as place:
        Dispatcher(trials, place=place, max_failures=None, retries=0, view=view).run()
    assert (trials[0].status, trials[0].skipped) == ("finished", True)
    assert said.getvalue() == "a  already finished, skipped\n"
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert after.items() >= before.items()


def test_a_folder_is_its_trials_before_anything_is_started_in_it(tmp_path):
    """Other settings of the same name get another folder, though the first trial never ran."""

    class Fails:
        grace_seconds = 0.0

        def fits(self, trial: Trial) -> bool:
            return True

        def find(self, trial: Trial) -> None:
            return None

        def start(self, trial: Trial) -> None:
            raise OSError("no process could be started")

    trials = place_trials([plan("a", "finish()")], tmp_path)
    with pytest.raises(OSError, match="no process"):
        Dispatcher(trials, place=Fails(), max_failures=None, retries=0, view=Silent()).run()
    other = replace(plan("a", "finish()"), settings_hash="other".ljust(32, "0"))
    assert [t.folder.name for t in place_trials([other], tmp_path)] == ["a-other000"]
    assert [t.folder.name for t in place_trials([plan("a", "finish()")], tmp_path)] == ["a"]


# A trial says when it was asked to end; a stubborn one does not care.
SWEEP = """
import pathlib, sys
sys.path.insert(0, {root!r})
from dpo_lightning.sweeps.places.local import LocalProcesses
from tests.support.trials import plan
from tests.support.trials import run
LocalProcesses.grace_seconds = 3600
act = "stubborn = {stubborn}\\n"
act += "def asked(*_):\\n    (folder / 'asked').touch()\\n    stubborn or sys.exit(130)\\n"
act += "signal.signal(signal.SIGINT, asked)\\n"
act += "(folder / 'up').touch()\\nwhile True: time.sleep(1)"
run(pathlib.Path({folder!r}), [plan("a", act), plan("b", act), plan("c", act)])
"""


def start_sweep(folder: Path, *, stubborn: bool = False) -> subprocess.Popen:
    code = SWEEP.format(root=str(ROOT), folder=str(folder), stubborn=stubborn)
    process = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: all((folder / name / "up").exists() for name in "ab"))
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_and_leaves_nothing_running(tmp_path, signum, code):
    process = start_sweep(tmp_path)
    process.send_signal(signum)
    process.wait(120)
    assert process.returncode in (code, 128 + signal.SIGINT if signum == signal.SIGINT else code)
    assert alive(tmp_path) == []
    for name in "ab":
        assert json.loads((tmp_path / name / "trial.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "c").exists()


def test_a_second_interrupt_does_not_wait_for_stubborn_trials(tmp_path):
    """They would be waited for an hour."""
    process = start_sweep(tmp_path, stubborn=True)
    process.send_signal(signal.SIGINT)
    until(lambda: all((tmp_path / name / "asked").exists() for name in "ab"))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.wait(120)
    assert alive(tmp_path) == []
    for name in "ab":
        assert json.loads((tmp_path / name / "trial.json").read_text())["status"] == "stopped"


def test_trials_stop_when_the_dispatcher_is_killed(tmp_path):
    process = start_sweep(tmp_path)
    process.kill()
    process.wait()
    until(lambda: alive(tmp_path) == [])


@pytest.mark.parametrize("how", ["stopped", "finished"])
def test_the_trial_of_a_killed_sweep_has_ended_before_the_next_sweep_starts_it_again(
    tmp_path, monkeypatch, how
):
    """It takes its time to end, until the next sweep has seen that it is at work."""
    slow = (
        "if (folder / 'up').exists():\n"
        "    assert (folder / 'saved').exists(), 'two at once'\n"
        "    finish(); sys.exit()\n"
        "def save(*_):\n"
        "    while not (folder / 'seen').exists(): time.sleep(0.02)\n"
        f"    finish({how!r}); (folder / 'saved').touch(); os._exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(folder / 'up').touch()\nwhile True: time.sleep(1)"
    )
    sweep = multiprocessing.get_context("fork").Process(
        target=run, args=(tmp_path, [plan("a", slow)])
    )
    sweep.start()
    until((tmp_path / "a" / "up").exists)
    sweep.kill()
    sweep.join()

    def flock(handle: int, how: int) -> None:
        try:
            fcntl.flock(handle, how)
        except BlockingIOError:
            (tmp_path / "a" / "seen").touch()
            raise

    monkeypatch.setattr(local_processes, "fcntl", SimpleNamespace(**vars(fcntl) | {"flock": flock}))
    [trial], _ = run(tmp_path, [plan("a", slow)])
    (tmp_path / "a" / "seen").touch()
    assert trial.status == "finished", (trial.folder / "trial.log").read_text()
    # One that came to its end after all is not run again.
    assert trial.skipped == (how == "finished")
    until(lambda: alive(tmp_path) == [])


def interrupt(*_: object, **__: object) -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_a_trial_is_being_started_stops_it(tmp_path, monkeypatch):
    """It comes when the process is there and the sweep does not know of it yet."""

    class Popen(subprocess.Popen):
        def __init__(self, *args, **options) -> None:
            super().__init__(*args, **options)
            interrupt()

    monkeypatch.setattr(local_processes.subprocess, "Popen", Popen)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [plan("a", "time.sleep(600)")])
    assert json.loads((tmp_path / "a" / "trial.json").read_text())["status"] == "stopped"
    assert alive(tmp_path) == []


def test_a_second_interrupt_while_trials_are_asked_to_end_leaves_none_behind(tmp_path, monkeypatch):
    class Interrupted(Silent):
        refresh = interrupt

    asked = local_processes.signal_group

    def ask(group: int, signum: int) -> None:
        if signum == signal.SIGINT:
            interrupt()
        asked(group, signum)

    monkeypatch.setattr(local_processes, "signal_group", ask)
    trials = place_trials([plan(name, "time.sleep(600)") for name in "ab"], tmp_path)
    pools = {"cpu": DevicePool("cpu", ["0", "1"])}
    with open_local(pools, stand_in(tmp_path), {}) as place, pytest.raises(KeyboardInterrupt):
        Dispatcher(trials, place=place, max_failures=None, retries=0, view=Interrupted()).run()
    assert [trial.status for trial in trials] == ["stopped"] * 2
    assert alive(tmp_path) == []
