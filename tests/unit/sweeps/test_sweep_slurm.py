"""The SLURM launcher with submitit itself and a SLURM of one machine."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.sweeps.places import base as places
from dpo_lightning.sweeps.places import slurm_jobs
from dpo_lightning.sweeps.places.base import Demand
from dpo_lightning.sweeps.places.claims import order
from dpo_lightning.sweeps.trials import Plan
from tests.support.fake_slurm import cancel_all, jobs, set_state, wait_for
from tests.support.runs import ROOT
from tests.support.slurm_sweeps import DEFAULTS, run, site, slurm_here
from tests.support.sweeps import alive
from tests.support.trials import Silent, plan
from tests.support.waiting import until


def test_the_defaults_above_are_those_of_the_launcher():
    from hydra.core.config_store import ConfigStore

    import hydra_plugins.dpo_lightning_slurm  # noqa: F401

    node = dict(ConfigStore.instance().load("hydra/launcher/slurm.yaml").node)
    assert node.pop("_target_") == "hydra_plugins.dpo_lightning_slurm.SlurmLauncher"
    assert node == DEFAULTS


# What is asked for -------------------------------------------------------------------------------


def trial_plan(**changes) -> Plan:
    values = {"name": "a", "overrides": (), "arguments": (), "settings_hash": "h", "kind": "cuda",
              "width": 4, "nodes": 2, "accelerator": "gpu"}  # fmt: skip
    return Plan(**(values | changes))


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ({}, {}, {"nodes": 2, "tasks_per_node": 4, "gpus_per_node": 4, "timeout_min": 60}),
        ({}, {"accelerator": "cpu"}, {"tasks_per_node": 4, "gpus_per_node": None}),
        ({}, {"accelerator": "auto", "width": 1}, {"tasks_per_node": 1, "gpus_per_node": 1}),
        ({"gpus_per_node": 0}, {"accelerator": "auto"}, {"gpus_per_node": None}),
        ({"gpus_per_node": 8}, {}, {"gpus_per_node": 8}),
        ({"partition": "p", "qos": "q", "account": "a", "constraint": "h100"}, {},
         {"slurm_partition": "p", "slurm_qos": "q", "slurm_account": "a",
          "slurm_constraint": "h100"}),
        ({"signal_delay_s": 30, "mem_gb": 1.5, "cpus_per_task": 6}, {},
         {"slurm_signal_delay_s": 30, "mem_gb": 1.5, "cpus_per_task": 6}),
        ({"cluster": "local"}, {"nodes": 1}, {"tasks_per_node": 1, "gpus_per_node": 4}),
    ],
)  # fmt: skip
def test_a_job_asks_for_a_task_and_a_gpu_per_device(options, changes, expected):
    asked = site(**options).parameters(trial_plan(**changes))
    assert {name: asked.get(name) for name in expected} == expected


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cluster": "pbs"}, "cluster=pbs: must be slurm or local"),
        ({"timeout_min": 0}, "timeout_min=0: must be a whole number >= 1"),
        ({"max_parallel": 0}, "max_parallel=0"),
        ({"cpus_per_task": 0}, "cpus_per_task=0"),
        ({"mem_gb": 0.0}, "mem_gb=0.0: must be a number > 0"),
        ({"retries": -1}, "retries=-1"),
        ({"max_timeouts": -1}, "max_timeouts=-1"),
        ({"gpus_per_node": -1}, "gpus_per_node=-1"),
        ({"partition": ""}, "partition=''"),
        ({"qos": "a\n#SBATCH -n 9"}, "qos='a"),
        ({"timeout_min": 1, "signal_delay_s": 60}, "signal_delay_s=60: must be less than"),
        ({"additional_parameters": {"time": 3}}, "hydra.launcher.timeout_min decides it"),
        ({"additional_parameters": {"ntasks-per-node": 3}}, "trainer.devices decides it"),
        ({"additional_parameters": {"job-name": "x"}}, "job-name=x: the launcher decides it"),
        ({"additional_parameters": {"reservation": [1]}}, "reservation=[1]: must be a text"),
        ({"cluster": "local", "setup": ["module load cuda"]}, "setup=['module load cuda']"),
    ],
)
def test_wrong_settings_are_named(options, said):
    with pytest.raises(UserError) as error:
        site(**options).check()
    assert said in str(error.value)


def test_what_is_missing_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "dpo-lightning\[slurm\]"'):
        site().check_trials([])
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"there is no sbatch here.*cluster=local"):
        site().check_trials([])
    site(cluster="local").check_trials([])


def test_gpus_of_the_nodes_are_not_judged_from_here(slurm):
    site().check_trials([Demand("gpu", 64, 16)])
    with pytest.raises(UserError, match="num_nodes=2"):
        site(cluster="local").check_trials([Demand("cpu", 1, 2)])


# Jobs --------------------------------------------------------------------------------------------

GOOD = "time.sleep(0.1); finish()"


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Iterator[Path]:
    """The folder of a SLURM whose jobs run here."""
    yield slurm_here(tmp_path, monkeypatch)
    cancel_all()


def test_trials_are_jobs_that_ask_for_what_the_settings_say(tmp_path, slurm):
    trials, _ = run(
        tmp_path, [plan("a", GOOD), plan("b", GOOD)], partition="fast", mem_gb=2.5,
        setup=["export FROM_SETUP=1"], additional_parameters={"reservation": "r 1"},
    )  # fmt: skip
    assert [trial.status for trial in trials] == ["finished"] * 2
    assert [trial.devices[0] for trial in trials] == ["slurm:1000", "slurm:1001"]
    script = (slurm / "jobs" / "1000" / "script.sh").read_text()
    for line in ("--partition=fast", "--mem=2560MB", "--time=60", "--signal=USR2@90", "--nodes=1",
                 "--ntasks-per-node=1", "--reservation='r 1'"):  # fmt: skip
        assert f"#SBATCH {line}\n" in script
    assert "export FROM_SETUP=1" in script
    # Its name is the trial's, and that of the order by which it is found again.
    attempt = order(trials[0].folder)["attempt"]
    assert f"#SBATCH --job-name=a.{attempt}\n" in script
    logs = tmp_path / "sweep" / ".submitit"
    assert not list(logs.glob(f"{attempt}*"))
    assert (logs / "1000_0_log.out").exists()
    # What was sent is a name and plain values: nothing of a config, nothing of torch.
    sent = (logs / "1000_submitted.pkl").read_bytes()
    assert b"TrialJob" in sent
    assert not [word for word in (b"omegaconf", b"hydra.core", b"torch") if word in sent]
    # The same again: nothing is missing.
    _, view = run(tmp_path, [plan("a", GOOD), plan("b", GOOD)])
    assert view.said == []


@pytest.mark.parametrize(
    ("act", "status", "code"),
    [
        pytest.param("raise RuntimeError('boom')", "failed", 1, marks=pytest.mark.slow),
        ("os.kill(os.getpid(), signal.SIGKILL)", "failed", -9),
        pytest.param("finish('diverged'); sys.exit(3)", "diverged", 3, marks=pytest.mark.slow),
    ],
)
def test_a_trial_that_ends_badly_ends_alone(tmp_path, slurm, act, status, code):
    trials, _ = run(tmp_path, [plan("a", GOOD), plan("bad", act), plan("c", GOOD)])
    assert [trial.status for trial in trials] == ["finished", status, "finished"]
    assert trials[1].exit_code == code
    assert json.loads((trials[1].folder / "result.json").read_text())["status"] == status


@pytest.mark.slow
def test_a_crashed_trial_is_a_new_job_that_goes_on_from_its_checkpoint(tmp_path, slurm):
    act = (
        "first = not (folder / 'checkpoints').exists()\n"
        "(folder / 'checkpoints').mkdir(exist_ok=True)\n"
        "(folder / 'checkpoints' / 'step-000003.ckpt').touch()\n"
        "sys.exit(1) if first else finish()"
    )
    [trial], _ = run(tmp_path, [plan("a", act)], retries=1)
    assert (trial.status, trial.attempts, trial.devices[0]) == ("finished", 2, "slurm:1001")
    assert trial.metrics["resumed"] is True


@pytest.mark.slow
def test_max_parallel_and_max_failures(tmp_path, slurm):
    plans = [plan(name, "sys.exit(1)") for name in "abcd"]
    trials, view = run(tmp_path, plans, max_parallel=1, max_failures=1)
    assert [trial.status for trial in trials] == ["failed", "failed", "waiting", "waiting"]
    assert [name for name, *_ in view.said] == ["a", "a", "b", "b"]


HANG = "print('up', flush=True); time.sleep(600)"


def lose(slurm: Path, state: str) -> None:
    """The job's processes go without a word, and SLURM says so."""
    folder = slurm / "jobs" / "1000"
    tasks = wait_for(folder / "tasks").split()
    set_state(folder, state)
    for pid in tasks:
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("state", "asked", "said"),
    [
        pytest.param(
            "CANCELLED by 1000",
            "sacct",
            "SLURM: job 1000 is CANCELLED by 1000",
            marks=pytest.mark.slow,
        ),
        ("NODE_FAIL", "sacct", "is NODE_FAIL"),
        pytest.param(
            "OUT_OF_MEMORY",
            "sacct",
            "is OUT_OF_MEMORY; give it more with hydra.launcher.mem_gb=",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "TIMEOUT",
            "squeue",
            "is TIMEOUT; give it more with hydra.launcher.timeout_min=",
            marks=pytest.mark.slow,
        ),
        ("FAILED", "nobody", "SLURM no longer knows its job 1000"),
    ],
)
def test_a_job_that_vanishes_is_a_failed_row_with_the_reason(
    tmp_path, slurm, monkeypatch, state, asked, said
):
    if asked != "sacct":
        (slurm / "no-accounts").touch()
    if asked == "nobody":
        (slurm / "forgetful").touch()
    monkeypatch.setattr(slurm_jobs, "_REQUEUE_SECONDS", 1.0)
    log = tmp_path / "sweep" / "a" / "trial.log"
    thread = threading.Thread(target=lambda: (wait_for(log), lose(slurm, state)))
    thread.start()
    [trial], _ = run(tmp_path, [plan("a", HANG)])
    thread.join()
    assert (trial.status, trial.exit_code) == ("failed", None)
    assert said in trial.error
    assert "1000_0_log.err" in trial.error
    result = json.loads((trial.folder / "result.json").read_text())
    assert (result["status"], result["error"]) == ("failed", trial.error)
    until(lambda: alive(tmp_path / "sweep" / "a") == [])


def test_a_job_that_never_starts_and_is_cancelled_is_no_hang(tmp_path, slurm):
    (slurm / "hold").touch()
    job = slurm / "jobs" / "1000"

    def cancel() -> None:
        wait_for(job / "state")
        set_state(job, "CANCELLED by 0")

    thread = threading.Thread(target=cancel)
    thread.start()
    [trial], _ = run(tmp_path, [plan("a", HANG)], retries=5)
    thread.join()
    # Somebody meant it: it is not started again.
    assert (trial.status, trial.attempts) == ("failed", 0)
    assert "CANCELLED" in trial.error


def test_what_sbatch_refuses_is_one_line(tmp_path, slurm):
    (slurm / "refuse").touch()
    with pytest.raises(UserError, match=r"sbatch refused the job: .*Invalid account"):
        run(tmp_path, [plan("a", GOOD)])
    # Nothing is in the queue: nothing is looked for, and the trial has its folder.
    (slurm / "refuse").unlink()
    (slurm / "no-queue").touch()
    [trial], _ = run(tmp_path, [plan("a", GOOD)])
    assert (trial.status, trial.folder.name) == ("finished", "a")


@pytest.mark.slow
def test_a_preempted_trial_saves_itself_is_queued_again_and_goes_on(tmp_path, slurm):
    """submitit's signal, as SLURM sends it before a job is preempted or at its limit."""
    act = (
        "if 'resume=auto' in sys.argv:\n"
        "    finish()\n"
        "else:\n"
        "    def save(*_):\n"
        "        (folder / 'checkpoints').mkdir()\n"
        "        (folder / 'checkpoints' / 'step-000003.ckpt').touch()\n"
        "        finish('stopped'); sys.exit(143)\n"
        "    signal.signal(signal.SIGTERM, save)\n"
        "    print('up', flush=True); time.sleep(600)"
    )
    log, tasks = tmp_path / "sweep" / "a" / "trial.log", slurm / "jobs" / "1000" / "tasks"
    view = Silent()

    def preempt() -> None:
        wait_for(log)
        while not view.said:  # two starts between two looks at it would be said as one
            time.sleep(0.05)
        for pid in wait_for(tasks).split():
            os.kill(int(pid), signal.SIGUSR2)

    thread = threading.Thread(target=preempt, daemon=True)
    thread.start()
    [trial], _ = run(tmp_path, [plan("a", act)], view=view)
    thread.join()
    assert (trial.status, trial.attempts, trial.devices[0]) == ("finished", 2, "slurm:1000")
    assert trial.metrics["resumed"] is True
    assert [name for name, what, _ in view.said if what.startswith("slurm")] == ["a", "a"]
    assert len(list((slurm / "jobs").iterdir())) == 1


SWEEP = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from dpo_lightning.sweeps import slurm_jobs
from tests.support.slurm_sweeps import run
from tests.support.trials import plan
slurm_jobs._STATE_SECONDS = slurm_jobs._STATE_SECONDS_STOPPING = 0.3
slurm_jobs._LATE_SECONDS = 0.5
run(Path({folder!r}), [plan(name, {act!r}) for name in "abc"], max_parallel=2)
"""


def start_sweep(folder: Path, act: str) -> subprocess.Popen:
    code = SWEEP.format(root=str(ROOT), folder=str(folder), act=act)
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    for name in "ab":
        wait_for(folder / "sweep" / name / "trial.log")
    return process


def test_ctrl_c_cancels_the_jobs(tmp_path, slurm):
    process = start_sweep(tmp_path, HANG)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode in (-2, 130)
    assert list(jobs().values()) == ["CANCELLED by 1000"] * 2
    until(lambda: alive(tmp_path / "sweep") == [])
    for name in "ab":
        about = json.loads((tmp_path / "sweep" / name / "trial.json").read_text())
        assert about["status"] == "stopped"
    assert not (tmp_path / "sweep" / "c").exists()


def test_jobs_outlive_a_sweep_that_is_killed_and_the_same_command_goes_on_with_them(
    tmp_path, slurm
):
    """They may be at work, or have just come to their end, when the next command looks."""
    act = (
        "(folder / 'runs').open('a').write('once\\n'); print('up', flush=True)\n"
        "while not (folder.parent / 'enough').exists(): time.sleep(0.05)\n"
        "finish()"
    )
    process = start_sweep(tmp_path, act)
    process.kill()
    process.communicate()
    (tmp_path / "sweep" / "enough").touch()
    trials, _ = run(tmp_path, [plan(name, act) for name in "abc"])
    assert [trial.status for trial in trials] == ["finished"] * 3
    # No job was submitted a second time, and none was ended for another.
    assert len(jobs()) == 3
    for trial in trials:
        assert (trial.folder / "runs").read_text() == "once\n"
