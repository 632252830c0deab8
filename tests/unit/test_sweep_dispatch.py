"""The dispatcher with quick stand-ins for trials: leases, failures, retries, interrupts."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.runs import ROOT
from tests.support.sweeps import alive
from tests.support.trials import plan, run


def test_uneven_trials_keep_two_slots_busy_and_never_share_one(tmp_path):
    """Lengths 3, 0.2, 0.2, 0.2, 0.5 s on two slots: while any waits, both slots are at work.

    Round robin would put the first, third and fifth on one slot and leave the other idle.
    """
    lengths = [3, 0.2, 0.2, 0.2, 0.5]
    plans = [plan(f"t{i}", f"time.sleep({s}); finish()") for i, s in enumerate(lengths)]
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
        plan("one", "time.sleep(0.5); finish()"),
        plan("two", "time.sleep(0.2); finish()", width=2),
        plan("three", "time.sleep(0.2); finish()"),
    ]
    trials, _ = run(tmp_path, plans)
    one, two, three = trials
    assert two.devices == ["cpu:0", "cpu:1"]
    assert two.metrics["begin"] >= max(one.metrics["end"], three.metrics["end"])
    # A narrow one passes a wide one that has to wait.
    assert three.metrics["begin"] < one.metrics["end"]


@pytest.mark.parametrize(
    ("act", "status", "code"),
    [
        ("raise RuntimeError('boom')", "failed", 1),
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed", -9),
        ("sys.exit(0)", "failed", 0),
        ("sys.exit(7)", "failed", 7),
        ("os._exit(137)", "failed", 137),
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
    act = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', str(folder)])"
    [trial], _ = run(tmp_path, [plan("a", f"{act}; os._exit(1)")])
    assert trial.status == "failed"
    assert alive(tmp_path) == []


def test_the_environment_and_the_threads_of_a_trial(tmp_path):
    act = "finish(); assert os.environ['GROUP'] == 'g' and os.getpid() == os.getpgrp()"
    [trial], _ = run(tmp_path, [plan("a", act)], slots=64, environment={"GROUP": "g"})
    assert (trial.status, trial.metrics["threads"]) == ("finished", os.environ["OMP_NUM_THREADS"])


SWEEP = """
import pathlib, sys
sys.path.insert(0, {root!r})
from tests.support.trials import plan
from tests.support.trials import run
act = "signal.signal(signal.SIGINT, signal.SIG_IGN); " * {stubborn}
act += "(folder / 'up').touch(); time.sleep(99)"
run(pathlib.Path({folder!r}), [plan("a", act), plan("b", act), plan("c", act)])
"""


def start_sweep(folder: Path, *, stubborn: bool = False) -> subprocess.Popen:
    code = SWEEP.format(root=str(ROOT), folder=str(folder), stubborn=int(stubborn))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 30
    while not all((folder / name / "up").exists() for name in "ab"):
        assert time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.02)
    return process


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, -2), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_and_leaves_nothing_running(tmp_path, signum, code):
    process = start_sweep(tmp_path)
    process.send_signal(signum)
    process.communicate(timeout=20)
    assert process.returncode in (code, 128 + signal.SIGINT if signum == signal.SIGINT else code)
    assert alive(tmp_path) == []
    for name in "ab":
        assert json.loads((tmp_path / name / "trial.json").read_text())["status"] == "stopped"
    assert not (tmp_path / "c").exists()


def test_a_second_interrupt_does_not_wait_for_stubborn_trials(tmp_path):
    process = start_sweep(tmp_path, stubborn=True)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=15)
    assert alive(tmp_path) == []


def test_trials_stop_when_the_dispatcher_is_killed(tmp_path):
    process = start_sweep(tmp_path)
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 10
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert alive(tmp_path) == []
