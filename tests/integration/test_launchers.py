"""Sweeps of real trials through submitit and on a Ray cluster, with what fails there.

They take minutes: `make test-launchers` runs them.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.fake_slurm import install
from tests.support.runs import ROOT, Run
from tests.support.sweeps import Sweep, alive, sweep
from tests.support.waiting import until

pytestmark = pytest.mark.launchers

# Writes a line per step, of each trial into a file of its own, by which processes took it.
BEATS = """
import os, sys, time
from pathlib import Path
from dpo_lightning.training.module import DPOModule

step = DPOModule.training_step
[name] = [a for a in sys.argv if a.startswith("beta=")]
Path("beats").mkdir(exist_ok=True)
beats = (Path("beats") / name).open("a", buffering=1)

def training_step(self, batch, index):
    beats.write(f"{os.getpid()} {time.time()} {self.global_step}\\n")
    time.sleep(0.03)
    return step(self, batch, index)

DPOModule.training_step = training_step
"""

STEPS = 150
LONG = (
    "data.controlled.train_groups=96", "data.controlled.eval_groups=40", "data.batch_size=16",
    "evaluation.samples=0", "evaluation.partition_samples=0", "trainer.threads=1",
    "trainer.accelerator=cpu", f"trainer.max_steps={STEPS}", "checkpoint.every_n_steps=10",
    "trainer.log_every_n_steps=1", "plugins=[beats]",
)  # fmt: skip
GRID = ("beta=0.1,0.2,0.3,0.4", *LONG)
NAMES = [f"beta-0.{i}" for i in (1, 2, 3, 4)]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "beats.py").write_text(BEATS)
    return tmp_path


def start(place: Path, *overrides: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra.sweep.dir=sweep", "logger=none"]
    return subprocess.Popen(
        [*command, *overrides],
        cwd=place,
        env=os.environ | {"DPO_LIGHTNING_CACHE": str(place / "cache")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def end(process: subprocess.Popen, place: Path) -> Sweep:
    stdout, stderr = process.communicate(timeout=400)
    return Sweep(process.returncode, place / "sweep", stdout, stderr)


def beats(place: Path, name: str) -> list[tuple[str, float, int]]:
    path = place / "beats" / name.replace("-", "=")
    lines = path.read_text().splitlines()[:-1] if path.exists() else []
    return [(pid, float(when), int(step)) for pid, when, step in map(str.split, lines)]


def wait_for_step(process: subprocess.Popen, place: Path, names: list[str], step: int) -> str:
    """Waits until a trial is at a step; returns its name."""
    found = []

    def is_there() -> bool:
        found[:] = [name for name in names if (t := beats(place, name)) and t[-1][2] >= step]
        return bool(found)

    until(lambda: is_there() or process.poll() is not None)
    assert found, process.communicate()
    return found[0]


def claim(place: Path, name: str) -> dict:
    return json.loads((place / "sweep" / name / ".claim.json").read_text())


def check_all_finished(done: Sweep, place: Path, resumed: list[str]) -> None:
    """Four finished trials in one report, every step once, and never two writers of a trial."""
    assert done.code == 0, done.stdout + done.stderr
    assert done.report["statuses"] == {"finished": 4}
    assert [trial["name"] for trial in done.report["trials"]] == NAMES
    assert "4 trials" in (done.folder / "report.md").read_text()
    for name in NAMES:
        trial = done.trial(name)
        assert trial.result["step"] == STEPS
        seen = [row["step"] for row in trial.rows if "train/loss" in row]
        assert seen == list(range(1, STEPS + 1))
        by_process: dict[str, list[float]] = {}
        for pid, when, _ in beats(place, name):
            by_process.setdefault(pid, []).append(when)
        spans = list(by_process.values())
        for earlier, later in itertools.pairwise(spans):
            assert max(earlier) < min(later)
        about = json.loads((done.folder / name / "trial.json").read_text())
        assert about["attempts"] == len(spans) == (2 if name in resumed else 1)
        if name in resumed:
            assert "resume=auto" in (done.folder / name / ".hydra" / "overrides.yaml").read_text()
            # It went on from its last checkpoint: the second start began behind step 0.
            second = [step for pid, _, step in beats(place, name) if pid == list(by_process)[1]]
            assert second[0] >= 10
    assert alive(place) == []


# submitit -----------------------------------------------------------------------------------------


def test_a_sweep_through_submitit_with_all_that_may_happen_to_a_job(place):
    """One trial crashes, one is preempted, one loses its whole job; all four finish."""
    process = start(
        place, *GRID, "hydra/launcher=slurm", "hydra.launcher.cluster=local",
        "hydra.launcher.max_parallel=2", "hydra.launcher.retries=1",
    )  # fmt: skip
    wait_for_step(process, place, ["beta-0.1"], 25)
    os.killpg(claim(place, "beta-0.1")["group"][0], signal.SIGKILL)
    wait_for_step(process, place, ["beta-0.2"], 25)
    os.kill(claim(place, "beta-0.2")["runner"][0], signal.SIGUSR2)
    wait_for_step(process, place, ["beta-0.3"], 25)
    runner = claim(place, "beta-0.3")["runner"][0]
    for pid in (parent(runner), runner):
        os.kill(pid, signal.SIGKILL)
    done = end(process, place)
    check_all_finished(done, place, ["beta-0.1", "beta-0.2", "beta-0.3"])
    assert "beta-0.1  failed, will be retried" in done.stdout
    assert "ended before the trial did" in done.stdout
    assert list((done.folder / ".submitit").glob("*_log.out"))
    # The same command does nothing more.
    again = sweep(place, *GRID, "hydra/launcher=slurm", "hydra.launcher.cluster=local")
    assert again.code == 0
    assert again.stdout.count("already finished, skipped") == 4


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_two_ranks_of_a_trial_are_tasks_of_its_job(place):
    """Lightning takes the ranks from SLURM's environment; one process alone gives the numbers."""
    slurm = install(place / "slurm")
    short = ("beta=0.3", *LONG[:7], "trainer.max_steps=6")
    done = sweep(
        place, *short, "hydra/launcher=slurm", "trainer.devices=2", "strategy=ddp", **slurm
    )
    assert done.code == 0, done.stdout
    trial = done.only_trial
    assert "2 x cpu" in (trial.folder / "trial.log").read_text()
    assert (trial.folder / "trial-rank-1.log").exists()
    assert not (trial.folder / "trial-rank-0.log").exists()
    alone = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "hydra.run.dir=alone", "logger=none", *short],
        cwd=place, capture_output=True, text=True,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    losses = Run(0, place / "alone").values("train/loss")
    assert len(losses) == 6
    assert trial.values("train/loss") == pytest.approx(losses, rel=1e-5)


# Ray ----------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch) -> Iterator:
    """A cluster with a head that runs nothing, and two nodes of one core each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": 100_000_000, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **common})
    for _ in range(2):
        cluster.add_node(num_cpus=1, **common)
    yield cluster
    cluster.shutdown()


def kill_node(raylet: int) -> None:
    """Kills all that Ray runs on a node, at once; the trial is not touched."""
    children = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and _parent_or_none(int(entry.name)) == raylet
    ]
    for pid in (raylet, *children):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _parent_or_none(pid: int) -> int | None:
    try:
        return parent(pid)
    except OSError:
        return None


@pytest.mark.parametrize("how", ["machine", "raylet"])
def test_a_lost_node_costs_no_trial(place, cluster, how):
    """A node of two is lost in the middle of its trial, or its raylet alone is: Ray starts the
    trial on the other, and its process must not write there for a moment more."""
    process = start(place, *GRID, "hydra/launcher=ray", RAY_ADDRESS=cluster.address)
    hit = wait_for_step(process, place, NAMES, 25)
    lost = claim(place, hit)
    raylet = parent(lost["runner"][0])
    assert "raylet" in Path(f"/proc/{raylet}/cmdline").read_text()
    if how == "machine":
        kill_node(raylet)
    else:
        os.kill(raylet, signal.SIGKILL)
    # Its workers would take one that nobody has reaped for alive.
    [process_of_raylet] = [
        info.process
        for node in cluster.worker_nodes
        for info in node.all_processes["raylet"]
        if info.process.pid == raylet
    ]
    process_of_raylet.wait()
    done = end(process, place)
    check_all_finished(done, place, [hit])
    assert f"{hit}  started on" in done.stdout
    assert "attempt 2" in done.stdout


def test_ctrl_c_ends_the_trials_of_a_cluster_that_stays(place, cluster):
    process = start(
        place, *GRID, "trainer.max_steps=50000", "hydra/launcher=ray", RAY_ADDRESS=cluster.address
    )
    for name in ("beta-0.1", "beta-0.2"):
        wait_for_step(process, place, [name], 15)
    os.killpg(process.pid, signal.SIGINT)
    done = end(process, place)
    assert done.code == 130, done.stdout + done.stderr
    assert "the same command resumes it" in done.stdout
    assert alive(place) == []
    for name in ("beta-0.1", "beta-0.2"):
        assert done.trial(name).result["status"] == "stopped"
    assert not (done.folder / "beta-0.3" / "result.json").exists()
    assert all(node.all_processes for node in cluster.worker_nodes)


def test_a_sweep_without_a_cluster_starts_and_stops_its_own(place):
    (place / "crash.py").write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "from dpo_lightning.training.module import DPOModule\n\n"
        "step = DPOModule.training_step\n\n"
        "def training_step(self, batch, index):\n"
        "    if self.global_step == 25 and 'beta=0.2' in sys.argv and not Path('hit').exists():\n"
        "        Path('hit').touch()\n"
        "        os.abort()\n"
        "    return step(self, batch, index)\n\n"
        "DPOModule.training_step = training_step\n"
    )
    done = sweep(
        place, *GRID, "plugins=[beats,crash]", "hydra/launcher=ray",
        "hydra.launcher.address=local", "hydra.launcher.retries=1",
    )  # fmt: skip
    check_all_finished(done, place, ["beta-0.2"])
    assert "killed by signal 6" in done.stdout
