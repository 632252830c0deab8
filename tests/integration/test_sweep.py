"""Sweeps of real trials, each a process of its own: faults, reruns, interrupts, ranks, records."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, TINY, Run

# A user's module that makes trials fail at their third step for as long as the file "broken" is
# there. It knows which trial it is in by its command line.
FAULTS = """
import os, signal, sys
from pathlib import Path
import torch
from dpo_lightning.module import DPOModule

def boom(module):
    raise RuntimeError("boom")

def kill(module):
    os.kill(os.getpid(), signal.SIGKILL)

def leave(module):
    sys.exit(7)

def diverge(module):
    with torch.no_grad():
        next(module.policy.parameters()).fill_(float("nan"))

FAULTS = {"beta=0.2": boom, "beta=0.3": kill, "beta=0.4": leave, "beta=0.5": diverge}
step = DPOModule.training_step

def training_step(self, batch, index):
    if self.global_step == 3 and Path("broken").exists() and self.trainer.is_global_zero:
        for key, fault in FAULTS.items():
            if key in sys.argv:
                fault(self)
    return step(self, batch, index)

DPOModule.training_step = training_step
"""

SMALL = (*TINY, "trainer.accelerator=cpu", "hydra.launcher.devices=2")


@dataclass(frozen=True)
class Sweep:
    """A finished sweep, as other programs see it."""

    code: int
    folder: Path
    stdout: str
    stderr: str

    def trial(self, name: str) -> Run:
        return Run(0, self.folder / name)

    @property
    def only_trial(self) -> Run:
        [name] = self.trials
        return self.trial(name)

    @property
    def trials(self) -> list[str]:
        return sorted(path.parent.name for path in self.folder.glob("*/trial.json"))

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "sweep.json").read_text())


def sweep(place: Path, *overrides: str, logger: str = "none", **environment: str) -> Sweep:
    """Runs a sweep from a folder of one's own, with a cache of its own."""
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra.sweep.dir=sweep"]
    done = subprocess.run(
        [*command, f"logger={logger}", *overrides],
        cwd=place,
        env=os.environ | {"DPO_LIGHTNING_CACHE": str(place / "cache")} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return Sweep(done.returncode, place / "sweep", done.stdout, done.stderr)


def alive(folder: Path) -> list[str]:
    """Command lines of the processes that have to do with a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                where = (entry / "cwd").resolve()
            except OSError:
                continue
            if state != "Z" and (str(folder) in line or where == folder):
                found.append(line)
    return found


# Faults ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("faults")
    (place / "faults.py").write_text(FAULTS)
    (place / "broken").touch()
    return place


GRID = ("beta=0.1,0.2,0.3,0.4,0.5,0.6", "plugins=[faults]", *SMALL)


@pytest.fixture(scope="module")
def faulty(place: Path) -> Sweep:
    return sweep(place, *GRID, logger="wandb")


@pytest.mark.parametrize(
    ("beta", "status", "code", "error"),
    [
        ("0.1", "finished", 0, None),
        ("0.2", "failed", 1, "RuntimeError: boom"),
        ("0.3", "failed", -9, "killed by signal 9"),
        ("0.4", "failed", 7, "exit code 7"),
        ("0.5", "diverged", 3, "nan"),
        ("0.6", "finished", 0, None),
    ],
)
def test_a_trial_that_ends_badly_is_one_row(faulty: Sweep, beta, status, code, error):
    result = faulty.trial(f"beta-{beta}").result
    about = json.loads((faulty.folder / f"beta-{beta}" / "trial.json").read_text())
    assert (result["status"], about["status"], about["exit_code"]) == (status, status, code)
    assert result["error"] is None if error is None else error in result["error"]
    assert result["beta"] == float(beta)


def test_the_sweep_says_so_and_names_the_logs(faulty: Sweep):
    assert faulty.code == 1
    assert faulty.report["statuses"] == {"failed": 3, "finished": 2, "diverged": 1}
    assert "6 trials: 2 finished, 3 failed, 1 diverged" in faulty.stdout
    for beta in ("0.2", "0.3", "0.4", "0.5"):
        log = faulty.folder / f"beta-{beta}" / "trial.log"
        assert str(log.relative_to(faulty.folder.parent)) in faulty.stdout
        assert log.stat().st_size > 0
    assert "boom" in (faulty.folder / "beta-0.2" / "trial.log").read_text()
    assert "Traceback" not in faulty.stderr


def test_the_reference_was_computed_once_in_all(faulty: Sweep):
    counts = [faulty.trial(f"beta-{beta}").result["reference"] for beta in ("0.1", "0.6")]
    assert [count["rows"] for count in counts] == [136, 136]
    parts = list((faulty.folder.parent / "cache" / "reference").glob("*/*.safetensors"))
    assert len(parts) == 1
    assert sorted(count["computed"] for count in counts) in ([0, 0], [0, 136])


def wandb_runs(folder: Path) -> list[dict[str, Any]]:
    """Every run that was recorded under a folder, with wandb's own inspector."""
    found = []
    for path in sorted(folder.rglob("wandb/offline-run-*/run-*.wandb")):
        command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", "--json"]
        lines = subprocess.run(
            [*command, str(path)], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        records = [json.loads(line) for line in lines]
        begun = [record["run"] for record in records if record["type"] == "run"]
        if not begun:
            continue  # killed before wandb had written anything
        summary = subprocess.run(
            [*command, "--summary", str(path)], capture_output=True, text=True, check=True
        ).stdout
        text = path.parent.rglob("media/*/*")
        media = sorted(file.suffix for file in text if file.is_file())
        found.append({"run": begun[0], "media": media, **json.loads(summary)})
    return found


def test_wandb_has_a_run_per_trial_in_one_group_and_one_with_the_report(faulty: Sweep):
    runs = wandb_runs(faulty.folder)
    assert {run["run"]["run_group"] for run in runs} == {"sweep"}
    reports = [run for run in runs if run["run"].get("job_type") == "report"]
    trials = [run for run in runs if run["run"].get("job_type") != "report"]
    assert len(reports) == 1
    assert {".png", ".json"} <= set(reports[0]["media"])
    assert reports[0]["exit_code"] == 0
    # Each has its own settings and nobody else's; of the one that was killed there may be nothing.
    codes = {run["config"]["beta"]: run.get("exit_code") for run in trials}
    codes.pop(0.3, None)
    assert codes == {0.1: 0, 0.2: 1, 0.4: 7, 0.5: 3, 0.6: 0}
    for run in trials:
        values = run.get("summary", {})
        assert values.get("beta", run["config"]["beta"]) == run["config"]["beta"]
    assert len({run["run"]["run_id"] for run in runs}) == len(runs) >= 6


@pytest.fixture(scope="module")
def mended(faulty: Sweep, place: Path) -> Sweep:
    (place / "broken").unlink()
    for name in ("beta-0.1", "beta-0.6"):
        (faulty.folder / name / "result.json").chmod(0o444)
        os.utime(faulty.folder / name / "result.json", (1, 1))
    return sweep(place, *GRID)


def test_a_rerun_does_only_what_is_missing(mended: Sweep):
    assert mended.code == 0, mended.stdout + mended.stderr
    assert mended.report["statuses"] == {"finished": 6}
    assert mended.trials == [f"beta-0.{i}" for i in range(1, 7)]
    for name in ("beta-0.1", "beta-0.6"):
        assert (mended.folder / name / "result.json").stat().st_mtime == 1
    assert mended.stdout.count("finished already, not run again") == 2
    assert [mended.trial(f"beta-0.{i}").result["reference"]["computed"] for i in (2, 3, 4, 5)] == [
        0
    ] * 4


def test_a_finished_sweep_is_left_as_it_is(mended: Sweep, place: Path):
    begin = time.monotonic()
    again = sweep(place, *GRID)
    assert again.code == 0
    assert time.monotonic() - begin < 30
    assert again.stdout.count("not run again") == 6
    # Another grid in the same folder is another set of trials.
    more = sweep(place, "beta=0.1", "seed=9", "trainer.max_steps=2", *SMALL)
    assert more.code == 0
    assert len(more.trials) == 7


# Interrupts --------------------------------------------------------------------------------------

LONG = ("beta=0.1,0.2,0.3", "data.batch_size=2", "trainer.max_steps=50000",
        "checkpoint.every_n_steps=50", "trainer.log_every_n_steps=1", *SMALL[:2],
        "evaluation.samples=0", "hydra.launcher.devices=2")  # fmt: skip


def steps(folder: Path, name: str) -> int:
    try:
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        return max((json.loads(line)["step"] for line in lines), default=0)
    except (OSError, ValueError):
        return 0


def start(place: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "train.py"), "-m", "hydra.sweep.dir=sweep", "logger=none"]
    return subprocess.Popen(
        [*command, *LONG],
        cwd=place,
        env=os.environ | {"DPO_LIGHTNING_CACHE": str(place / "cache")},
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )


def wait_for_steps(process: subprocess.Popen, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while min(steps(folder, "beta-0.1"), steps(folder, "beta-0.2")) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_ctrl_c_leaves_nothing_running_and_the_same_command_goes_on(tmp_path):
    folder = tmp_path / "sweep"
    process = start(tmp_path)
    wait_for_steps(process, folder, 60)
    # As a terminal does: to the whole foreground group, of which the trials are none.
    os.killpg(process.pid, signal.SIGINT)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert alive(tmp_path) == []
    assert "the same command goes on from here" in stdout
    stopped = {}
    for name in ("beta-0.1", "beta-0.2"):
        result = Run(130, folder / name).result
        assert result["status"] == "stopped"
        assert 60 <= result["step"] < 50000
        stopped[name] = result["step"]
    assert not (folder / "beta-0.3").exists()

    again = start(tmp_path)
    wait_for_steps(again, folder, max(stopped.values()) + 20)
    # Even a dispatcher that has no time to stop them leaves no trial behind.
    again.kill()
    again.communicate()
    deadline = time.monotonic() + 25
    while alive(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(tmp_path) == []
    for name in stopped:
        assert "resume=auto" in (folder / name / ".hydra" / "overrides.yaml").read_text()
        # Steps 1 to 50 are those of the first attempt; nothing is there twice.
        seen = [row["step"] for row in Run(0, folder / name).rows if "train/loss" in row]
        assert seen == list(range(1, len(seen) + 1))
    # Shorter, so that it ends: the settings changed, so these are other trials.
    rest = sweep(tmp_path, *LONG, "trainer.max_steps=100")
    assert rest.code == 0, rest.stdout
    assert len(rest.trials) == 5


def test_a_stopped_trial_goes_on_from_its_checkpoint(tmp_path):
    """With a scorer that stops the whole thing once: the training is not done again."""
    (tmp_path / "once.py").write_text(
        "import os, signal\nfrom pathlib import Path\n\n"
        "def score(prompts, responses):\n"
        "    if not Path('seen').exists():\n"
        "        Path('seen').touch()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return [len(response) for response in responses]\n"
    )
    grid = ("beta=0.5", "plugins=[once]", "evaluation.scorer=once.score", *SMALL[:3],
            "evaluation.samples=8", "checkpoint.every_n_steps=2")  # fmt: skip
    first = sweep(tmp_path, *grid)
    assert first.code == 1
    assert first.only_trial.result["error"] == "killed by signal 9"
    times = [row["time"] for row in first.only_trial.rows]
    second = sweep(tmp_path, *grid)
    assert second.code == 0, second.stdout
    run = second.only_trial
    assert run.result["step"] == 6
    assert run.result["metrics"]["samples/score"] > 0
    assert [row["time"] for row in run.rows if "train/loss" in row] == times[:6]
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "once.py", tmp_path / "other")
    (tmp_path / "other" / "seen").touch()
    undisturbed = sweep(tmp_path / "other", *grid)
    assert undisturbed.code == 0
    weights = [
        (done.only_trial.folder / "model" / "model.safetensors").read_bytes()
        for done in (second, undisturbed)
    ]
    assert weights[0] == weights[1]


def test_two_sweeps_do_not_work_in_one_folder(tmp_path):
    from filelock import FileLock

    (tmp_path / "sweep").mkdir()
    with FileLock(tmp_path / "sweep" / ".lock"):
        refused = sweep(tmp_path, "beta=0.1", *SMALL)
    assert refused.code == 2
    assert "another sweep is at work there" in refused.stderr


# Grids -------------------------------------------------------------------------------------------


def test_a_grid_over_references_and_seeds_is_pooled(tmp_path):
    done = sweep(
        tmp_path, "beta=0.05,0.1", "reference=auto,none", "seed=1,2", *SMALL,
        "trainer.max_steps=2",
    )  # fmt: skip
    assert done.code == 0, done.stdout + done.stderr
    assert len(done.trials) == 8
    assert "beta-0.05_reference-auto_seed-1" in done.trials
    found = done.report["configurations"]
    assert len(found) == 4
    assert all(c["seeds"] == [1, 2] for c in found)
    assert {c["label"] for c in found} == {
        f"β {beta}, reference {kind}" for beta in ("0.05", "0.1") for kind in ("auto", "none")
    }
    # The evaluation pairs are the same for both seeds, so the error is over groups and seeds.
    assert all(c["value"]["stderr"] is not None for c in found)


def test_ranks_of_one_trial_never_meet_those_of_another(tmp_path):
    """Two gloo ranks a trial; the middle one fails on rank 0 while rank 1 waits for it."""
    (tmp_path / "faults.py").write_text(FAULTS)
    (tmp_path / "broken").touch()
    done = sweep(
        tmp_path, "beta=0.1,0.2,0.6", "plugins=[faults]", *SMALL, "trainer.devices=2",
        "strategy=ddp",
    )  # fmt: skip
    assert done.code == 1
    assert done.trials == ["beta-0.1", "beta-0.2", "beta-0.6"]
    statuses = [done.trial(f"beta-{beta}").result["status"] for beta in ("0.1", "0.2", "0.6")]
    assert statuses == ["finished", "failed", "finished"]
    assert alive(tmp_path) == []
    about = json.loads((done.folder / "beta-0.6" / "trial.json").read_text())
    assert about["devices"] == ["cpu:0", "cpu:1"]
    (tmp_path / "broken").unlink()
    alone = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "beta=0.6", "hydra.run.dir=alone", "logger=none",
         *TINY, "trainer.accelerator=cpu"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert alone.returncode == 0, alone.stderr
    rows = Run(0, tmp_path / "alone").values("train/loss")
    assert done.trial("beta-0.6").values("train/loss") == pytest.approx(rows, rel=1e-5)


def test_ranks_with_different_settings_are_refused(tmp_path):
    """Two processes of one group that were given different betas: an outside launcher's mistake."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        command = [
            sys.executable, str(ROOT / "train.py"), f"beta=0.{rank + 1}", "hydra.run.dir=run",
            "logger=none", *TINY, "trainer.accelerator=cpu", "trainer.devices=2", "strategy=ddp",
        ]  # fmt: skip
        environment = os.environ | {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
            "NODE_RANK": "0", "LOCAL_RANK": str(rank),
            "DPO_LIGHTNING_CACHE": str(tmp_path / "cache"),
        }  # fmt: skip
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        processes.append(process)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    assert "different settings" in outputs[0]


def test_a_sampler_chooses_the_next_trials_by_the_last_ones(tmp_path):
    """Optuna's sweeper, in two batches; a trial that diverges has no value and stops nothing."""
    done = sweep(
        tmp_path, "hydra/sweeper=optuna", "hydra/sweeper/sampler=random",
        "hydra.sweeper.sampler.seed=5", "hydra.sweeper.n_jobs=2",
        "hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=4", "beta=choice(0.1,1)",
        "optimizer.lr=choice(0.01,1e30)", "optimizer.max_grad_norm=null", *SMALL,
    )  # fmt: skip
    assert done.code == 1
    statuses = done.report["statuses"]
    assert (statuses["finished"], statuses["diverged"]) == (2, 2)
    chosen = yaml.safe_load((done.folder / "optimization_results.yaml").read_text())
    best = max(
        (run.result for name in done.trials if (run := done.trial(name)).result["metrics"]),
        key=lambda result: result["metrics"].get("controlled/expected_reward", -1),
    )
    assert chosen["best_value"] == best["metrics"]["controlled/expected_reward"]
    assert chosen["best_params"] == {"beta": best["beta"], "optimizer.lr": 0.01}


# The experiments ---------------------------------------------------------------------------------


def test_the_frontier_of_a_short_sweep(tmp_path):
    """KL falls as beta grows, and every point is on or under the closed-form curve."""
    done = sweep(
        tmp_path, "experiment=frontier", "beta=0.5,2,8", "data.controlled.train_groups=8192",
        "evaluation.samples=64",
    )  # fmt: skip
    assert done.code == 0, done.stdout + done.stderr
    runs = [done.trial(f"beta-{beta}").result["metrics"] for beta in ("0.5", "2", "8")]
    kls = [run["controlled/kl_policy_reference"] for run in runs]
    assert kls == sorted(kls, reverse=True)
    for run in runs:
        assert run["controlled/expected_reward"] <= run["controlled/optimal_reward_at_kl"] + 1e-6
        assert run["controlled/gain_ratio"] > 0.85
        error = run["samples/kl_stderr"]
        assert abs(run["samples/kl"] - run["controlled/kl_policy_reference"]) < 4 * error
    assert sum(done.trial(t).result["reference"]["computed"] for t in done.trials) == 9216
    assert done.report["metric"] == "controlled/expected_reward"
    assert len(done.report["optimum"]) == 60


SCORER = """
from dpo_lightning.plugins import register_scorer

@register_scorer("polite")
def polite(prompts, answers):
    return [float("please" in a.lower()) + len(a) / 1000 for a in answers]
"""


def test_a_sweep_on_real_data_with_a_scorer(shared: Path, tmp_path):
    (tmp_path / "mine.py").write_text(SCORER)
    done = sweep(
        tmp_path, "beta=0.03,0.1,0.3,1", "plugins=[mine]", "evaluation.scorer=polite",
        f"model.pretrained={shared / 'models' / 'stories260k'}",
        f"data.train={shared / 'data' / 'politeness.jsonl'}",
        "optimizer.lr=5e-4", "trainer.max_steps=20", "data.batch_size=16",
        "trainer.accelerator=cpu", "hydra.launcher.devices=2", "evaluation.samples=64",
        "evaluation.max_new_tokens=24",
    )  # fmt: skip
    assert done.code == 0, done.stdout + done.stderr
    results = [done.trial(name).result for name in done.trials]
    assert len(results) == 4
    rows = results[0]["reference"]["rows"]
    assert rows == sum(results[0]["data"][f"{part}_groups"] for part in ("train", "eval"))
    assert sum(result["reference"]["computed"] for result in results) == rows
    report = done.report
    assert report["metric"] == "samples/score"
    assert report["kl_metric"] == "samples/kl"
    # The pick by the rule, worked out again from what the trials say.
    found = [
        (c["value"]["mean"], c["value"]["stderr"], c["kl"]["mean"], c["beta"])
        for c in report["configurations"]
    ]
    best = max(found)
    within = [c for c in found if c[0] >= best[0] - best[1]]
    assert report["pick"]["beta"] == min(within, key=lambda c: c[2])[3]
    for result in results:
        metrics = result["metrics"]
        assert 0 <= metrics["samples/win_rate"] <= 1
        assert metrics["samples/kl"] > 0
        assert metrics["samples/kl_stderr"] > 0
    # The same draws of the reference in every trial.
    assert len({result["metrics"]["samples/reference_score"] for result in results}) == 1
    # From the strongest tie to the weakest the KL does not fall.
    kls = {result["beta"]: result["metrics"]["samples/kl"] for result in results}
    assert kls[1] < kls[0.03]
    assert "win rate over the reference" in (done.folder / "report.md").read_text()
