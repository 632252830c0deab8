"""Trials that are forked from a warm process: the same as cold ones, whatever happens to it."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_lightning.processes import warm_server
from dpo_lightning.processes.lifeline import DIE_WITH_PARENT, LIFELINE
from dpo_lightning.processes.ownership import INHERITED_LOCK
from dpo_lightning.sweeps.places import warm_starts
from dpo_lightning.sweeps.places.warm_starts import MODULES, close_all
from tests.support.runs import ROOT
from tests.support.sweeps import alive
from tests.support.trials import plan, run, warm_stand_in
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="trials start warm on Linux")


@pytest.fixture(autouse=True)
def closed(tmp_path) -> Iterator[None]:
    yield
    close_all()
    assert alive(tmp_path) == []


def the_process() -> int:
    """Process id of the only warm process."""
    [process] = warm_starts._processes.values()
    return process._process.pid


# Everything that a program can see of how it was started.
LOOK = """
import logging, threading
def link(path): return os.readlink(path).split(":")[0]
handlers = {str(n): str(signal.getsignal(n)) for n in signal.valid_signals()}
facts = dict(
    environment=dict(os.environ), cwd=os.getcwd(), arguments=sys.argv[-3:],
    leads=os.getpid() == os.getpgrp(), session=os.getsid(0), handlers=handlers,
    blocked=[int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    threads=[t.name for t in threading.enumerate()], stdin=os.readlink("/proc/self/fd/0"),
    output=[os.readlink(f"/proc/self/fd/{n}") for n in (1, 2)],
    streams=[(s.encoding, s.errors, s.line_buffering) for s in (sys.stdout, sys.stderr)],
    descriptors=sorted(map(link, filter(os.path.lexists, DESCRIPTORS))),
    root=logging.getLogger().handlers, nice=os.nice(0), cores=sorted(os.sched_getaffinity(0)),
)
(folder / "facts.json").write_text(json.dumps(facts))
print("said", file=sys.stderr)
finish()
sys.exit(0)
"""
BEFORE = "DESCRIPTORS = ['/proc/self/fd/' + n for n in os.listdir('/proc/self/fd')]\n"


def test_a_warm_trial_sees_what_a_cold_one_sees(tmp_path):
    """Environment, folder, signals, output, descriptors: all but the numbers of descriptors."""
    seen = {}
    for name in ("cold", "warm"):
        folder = tmp_path / name
        folder.mkdir()
        warm, environment = warm_stand_in(folder)
        environment["ONLY"] = "here"
        options = {"warm": warm} if name == "warm" else {}
        [trial] = run(folder, [plan("a", BEFORE + LOOK)], environment=environment, **options)[0]
        said = (trial.folder / "trial.log").read_text()
        assert (trial.status, trial.exit_code, said) == ("finished", 0, "said\n")
        facts = json.loads((trial.folder / "facts.json").read_text())
        for variable in (LIFELINE, INHERITED_LOCK):
            facts["environment"].pop(variable, None)
        text = json.dumps(facts).replace(str(folder), "FOLDER").replace("warm_cold", "warm_warm")
        seen[name] = json.loads(text)
    assert seen["warm"] == seen["cold"]


def test_trials_are_forks_of_one_process_and_end_as_they_do_cold(tmp_path):
    warm, environment = warm_stand_in(tmp_path)
    note = "(folder / 'parent').write_text(str(os.getppid())); "
    ends = ["finish()", "sys.exit(7)", "os.kill(os.getpid(), 9)", "raise RuntimeError('boom')"]
    plans = [plan(f"t{n}", note + end) for n, end in enumerate(ends)]
    trials, view = run(tmp_path, plans, warm=warm, environment=environment)
    assert {(t.folder / "parent").read_text() for t in trials} == {str(the_process())}
    assert [(t.status, t.exit_code) for t in trials] == [
        ("finished", 0),
        ("failed", 7),
        ("failed", -9),
        ("failed", 1),
    ]
    assert "RuntimeError: boom" in (tmp_path / "t3" / "trial.log").read_text()
    assert len(view.said) == 8
    # Another batch of the same sweep.
    before = the_process()
    run(tmp_path, [plan("u", "finish()")], warm=warm_stand_in(tmp_path)[0], environment=environment)
    assert the_process() == before


def test_if_the_warm_process_dies_trials_are_judged_by_files_and_new_ones_start_cold(
    tmp_path, caplog
):
    """The first two run while it is killed: one finishes, one fails, and nobody sees how."""
    warm, environment = warm_stand_in(tmp_path)
    go = "(folder / 'up').touch()\nwhile not (folder.parent / 'go').exists(): time.sleep(0.01)\n"
    kill = "while not (folder.parent / 'a' / 'up').exists(): time.sleep(0.01)\n"
    kill += "os.kill(parent, 9)\nwhile os.getppid() == parent: time.sleep(0.01)\n"
    late = "(folder / 'parent').write_text(str(os.getppid())); finish()"
    plans = [
        plan("a", go + "finish()"),
        plan("b", f"parent = os.getppid()\n{kill}(folder.parent / 'go').touch(); sys.exit(5)"),
        plan("c", late),
    ]
    trials, _ = run(tmp_path, plans, warm=warm, environment=environment)
    assert [(t.status, t.exit_code) for t in trials] == [
        ("finished", None),
        ("failed", None),
        ("finished", 0),
    ]
    assert trials[1].error == "its process vanished"
    assert (tmp_path / "c" / "parent").read_text() == str(os.getpid())
    assert "cannot be used (it was killed by signal 9)" in caplog.text


@pytest.mark.parametrize(
    ("imports", "why"),
    [
        ("raise ImportError('no such library')", "exit code 1: ImportError: no such library"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9"),
        ("import threading; threading.Timer(60, print).start()", "it has 2 threads"),
    ],
    ids=["raises", "killed", "threads"],
)
def test_a_process_that_cannot_be_forked_is_named_once_and_all_start_cold(
    tmp_path, caplog, imports, why
):
    warm, environment = warm_stand_in(tmp_path, imports)
    plans = [plan(name, f"assert os.getppid() == {os.getpid()}; finish()") for name in "abc"]
    trials, _ = run(tmp_path, plans, warm=warm, environment=environment)
    assert [t.status for t in trials] == ["finished"] * 3
    [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert why in record.getMessage()


def test_another_environment_than_at_import_starts_cold(tmp_path, caplog, monkeypatch):
    """A variable of the sweep's own process is changed by its first trial's end."""
    warm, environment = warm_stand_in(tmp_path)
    parent = "(folder / 'parent').write_text(str(os.getppid())); finish()"
    run(tmp_path, [plan("a", parent)], warm=warm, environment=environment)
    monkeypatch.setenv("READ_AT_IMPORT", "1")
    run(tmp_path, [plan("b", parent)], warm=warm, environment=environment)
    assert (tmp_path / "a" / "parent").read_text() == str(the_process())
    assert (tmp_path / "b" / "parent").read_text() == str(os.getpid())
    assert "READ_AT_IMPORT changed meanwhile" in caplog.text


def test_where_nothing_may_outlive_its_parent_the_sweep_is_the_parent(tmp_path):
    warm, environment = warm_stand_in(tmp_path)
    environment[DIE_WITH_PARENT] = "1"
    parent = "(folder / 'parent').write_text(str(os.getppid())); finish()"
    run(tmp_path, [plan("a", parent)], warm=warm, environment=environment)
    assert (tmp_path / "a" / "parent").read_text() == str(os.getpid())


def test_several_ranks_start_cold(tmp_path):
    """They start each other by a command, and meet once all have imported."""
    warm, environment = warm_stand_in(tmp_path)
    parent = "(folder / 'parent').write_text(str(os.getppid())); finish()"
    run(tmp_path, [plan("a", parent, width=2)], warm=warm, environment=environment)
    assert (tmp_path / "a" / "parent").read_text() == str(os.getpid())


# A sweep of its own process, whose warm process imports for ever, or has done so.
SWEEP = """
import pathlib, sys
sys.path.insert(0, {root!r})
from tests.support.trials import plan, run, warm_stand_in
folder = pathlib.Path({folder!r})
warm, environment = warm_stand_in(folder, {imports!r})
act = "(folder / 'up').write_text(str(os.getppid()))\\nwhile True: time.sleep(1)"
run(folder, [plan(name, act) for name in "abc"], warm=warm, environment=environment)
"""
FOR_EVER = "import pathlib, time; pathlib.Path(__file__).with_name('busy').touch(); time.sleep(999)"


def start_sweep(folder: Path, imports: str = "") -> subprocess.Popen:
    code = SWEEP.format(root=str(ROOT), folder=str(folder), imports=imports)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, process_group=0)
    files = [folder / "busy"] if imports else [folder / name / "up" for name in "ab"]
    until(lambda: all(file.exists() for file in files))
    return process


@pytest.mark.parametrize("imports", ["", FOR_EVER], ids=["running", "importing"])
@pytest.mark.parametrize(
    "signum",
    [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGKILL],
)
def test_whatever_ends_the_sweep_leaves_nothing_running(tmp_path, signum, imports):
    """Sent to the whole group, as a terminal does; a trial that has not begun is left to wait."""
    process = start_sweep(tmp_path, imports)
    os.killpg(process.pid, signum)
    process.wait(120)
    until(lambda: alive(tmp_path) == [])
    if signum != signal.SIGKILL:
        for name in "ab":
            status = json.loads((tmp_path / name / "trial.json").read_text())["status"]
            assert status == ("waiting" if imports else "stopped")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("target", "why"),
    [("/dev/nvidia0", "it has opened /dev/nvidia0"), ("/dev/null", None), ("socket:[1]", None)],
)
def test_a_process_with_a_device_open_is_not_forked(tmp_path, target, why):
    """CUDA that was initialized before a fork cannot be used in it."""
    (tmp_path / "task" / "1").mkdir(parents=True)
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd" / "3").symlink_to(target)
    assert warm_server.unfit(tmp_path) == why
    (tmp_path / "task" / "2").mkdir()
    assert warm_server.unfit(tmp_path) == "it has 2 threads"


ASKS = """
import sys, torch
def asked(*_, **__): raise AssertionError("a device was asked for")
for name in ("is_available", "device_count", "init", "_lazy_init", "current_device"):
    setattr(torch.cuda, name, asked)
for name in ("_cuda_getDeviceCount", "_cuda_init"):
    if hasattr(torch._C, name): setattr(torch._C, name, asked)
for name in sys.argv[1:]: __import__(name)
from dpo_lightning.processes.warm_server import unfit
assert "lightning.pytorch" in sys.modules
print(unfit())
from transformers.quantizers import quantizer_torchao
from transformers.utils import import_utils
assert quantizer_torchao.is_torchao_available is import_utils.is_torchao_available
assert callable(quantizer_torchao.flatten_tensor_state_dict)
print("torchao" in sys.modules, import_utils.is_torchao_available())
"""


@pytest.mark.slow  # imports everything once more
def test_imports_ask_for_no_device_and_start_no_thread():
    """Not even through torchao, which is there, and which transformers finds when it needs it."""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ASKS, *MODULES],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "None\nFalse True\n"), done.stderr
