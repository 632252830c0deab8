"""Compares the speed of this checkout with that of an earlier commit, by CPU seconds.

``make bench ARGS="--against COMMIT"``. The same commands run in fresh processes of both, in turns
and in changing order, each on one thread; before anything is counted both must log the same losses.
CPU seconds of whole processes, imports included, are less disturbed by other work than wall time.
"""

from __future__ import annotations

import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy import stats
from workload import Shape, Size, make_model, make_rows

ROOT = Path(__file__).resolve().parent.parent

JOBS = {
    "embedded task": (
        *("data.controlled.train_groups=4096", "data.controlled.eval_groups=256"),
        *("trainer.max_steps=120", "evaluation.samples=32"),
    ),
    "start and end": (
        *("data.controlled.train_groups=64", "data.controlled.eval_groups=32"),
        *("trainer.max_steps=1", "evaluation.samples=0"),
    ),
    # Few tokens beside 30 million weights, so the optimizer's step is most of it.
    "bfloat16 weights": (
        *("model.config={work}/model", "data.train={work}/short.jsonl", "model.dtype=bfloat16"),
        *("data.batch_size=2", "trainer.max_steps=12", "evaluation.samples=0"),
        *("loss=simpo", "evaluation.partition_samples=0"),
    ),
    "prompts of 2,000 tokens": (
        *("model.config={work}/model", "data.train={work}/long.jsonl", "data.max_length=null"),
        *("data.batch_size=1", "trainer.max_steps=2", "evaluation.samples=0"),
        *("evaluation.partition_samples=0", "trainer.precision=32-true"),
    ),
}
"""Settings of each job that is compared; ``{work}`` has a random model and rows."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """CPU seconds of this checkout over those of the other, over rounds.

    Attributes:
        value: Geometric mean of the rounds' ratios.
        low: Lower end of its 95% interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, here: Sequence[float], there: Sequence[float]) -> Ratio:
        """Ratio of paired measurements; two rounds at least."""
        logs = [math.log(a / b) for a, b in zip(here, there, strict=True)]
        mean = statistics.fmean(logs)
        error = float(stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs))
        return cls(math.exp(mean), math.exp(mean - error), math.exp(mean + error))


def make_work(work: Path) -> None:
    """A random Llama of 30 million weights, and short and long rows."""
    size = Size(4000, 512, 1408, 8, 8, 4)
    make_model(work / "model", size)
    make_rows(work / "short.jsonl", Shape(8, 8), count=64, vocabulary=size.vocabulary)
    shape = Shape(2000, 16)
    make_rows(work / "long.jsonl", shape, count=4, vocabulary=size.vocabulary, longest=2000)


def checkout(commit: str, folder: Path) -> str:
    """Writes the files of a commit to a folder and returns its full hash.

    Raises:
        SystemExit: If git knows no such commit.
    """
    named = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"]
    found = subprocess.run(named, capture_output=True, text=True, check=False)
    if found.returncode:
        raise SystemExit(f"--against {commit}: git knows no such commit; name one of `git log`")
    full = found.stdout.strip()
    folder.mkdir(parents=True)
    archive = folder.parent / f"{folder.name}.tar"
    subprocess.run(["git", "-C", str(ROOT), "archive", "-o", str(archive), full], check=True)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    archive.unlink()
    return full


def spent(tree: Path, run: Path, settings: Sequence[str]) -> float:
    """CPU seconds, of user and system, of a run of a tree's ``train.py``.

    Raises:
        SystemExit: If it fails; its output is shown.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [
            *(sys.executable, str(tree / "train.py"), *settings),
            *(f"hydra.run.dir={run}", "logger=none", "trainer.threads=1"),
        ],
        cwd=run.parent,
        env=os.environ
        | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        | {"DPO_LIGHTNING_CACHE": str(run.with_suffix(".cache")), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{tree}: the run failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def losses(run: Path) -> list[float]:
    """Training losses of a run, in the order of the steps."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["train/loss"] for row in rows if "train/loss" in row]


def compare(commit: str, work: Path, *, rounds: int) -> dict[str, Ratio]:
    """Runs every job in both trees, in turns, and prints the ratios.

    Args:
        commit: The one to compare with.
        work: An empty folder.
        rounds: Number of times that each job runs in each tree.
    """
    trees = {"here": ROOT, "there": work / "there"}
    make_work(work)
    full = checkout(commit, trees["there"])
    print(f"this checkout against {full[:12]}, {rounds} rounds", flush=True)
    ratios = {}
    for number, (job, settings) in enumerate(JOBS.items()):
        seconds: dict[str, list[float]] = {"here": [], "there": []}
        for turn in range(rounds + 1):
            for name in sorted(trees, reverse=bool(turn % 2)):
                run = work / f"{number}-{name}-{turn}"
                took = spent(trees[name], run, [text.format(work=work) for text in settings])
                if turn:  # the first fills the disk's cache
                    seconds[name].append(took)
            if losses(work / f"{number}-here-{turn}") != losses(work / f"{number}-there-{turn}"):
                print(f"{job}: the losses differ, so the work may differ too", flush=True)
        ratio = ratios[job] = Ratio.of(seconds["here"], seconds["there"])
        print(
            f"{job}: {statistics.fmean(seconds['here']):.2f} against "
            f"{statistics.fmean(seconds['there']):.2f} CPU seconds, {ratio.value:.3f} times "
            f"(95% {ratio.low:.3f} to {ratio.high:.3f})",
            flush=True,
        )
    return ratios
