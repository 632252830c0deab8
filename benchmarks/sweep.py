"""Measures whole sweeps: eight tiny trials beside an older commit, eight of 20M beside TRL.

``make bench-sweep`` does both, ``ARGS="--part tiny"`` or ``--part large`` one of them, ``--against
COMMIT`` runs the tree of that commit in turns. Each sweep is one command as a user types it, with a
cache and a folder of its own: imports, reference pass, evaluation and report count.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from against import ROOT, checkout
from machine import describe_machine
from run import run_arm
from sweep_results import MARKS, QUIET, table, write
from workload import SHAPES, SIZES, Workload, make_rows

HERE = Path(__file__).resolve().parent
BETAS = (0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
TINY = ("trainer.max_steps=20",)
# Pruned sweeps: with the default rungs, and with one, after which two of eight trials go on.
PRUNED: dict[str, tuple[str, ...]] = {"pruned": ("sweep.prune=halving", "sweep.prune_within=[]")}
PRUNED["one rung"] = (*PRUNED["pruned"], "sweep.prune_at=[0.125]", "sweep.prune_keep=0.25")
# Steps of TRL that are timed, after those in which caches and allocators fill.
STEADY, WARM = 200, 8


@dataclass(frozen=True, slots=True)
class Scale:
    """Size of the large sweep."""

    betas: tuple[float, ...]
    size: str
    rows: int
    evaluated: int
    pairs: int
    steady: int


LARGE = Scale(BETAS, "small", 2048, 256, 8, STEADY)
TOY = Scale(BETAS[:2], "toy", 64, 16, 4, 4)


@dataclass(frozen=True, slots=True)
class Spent:
    """A sweep's wall time and the CPU seconds of all its processes."""

    wall: float
    cpu: float


def cpu_seconds() -> float:
    """CPU seconds of all ended processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def adopt_orphans() -> None:
    """Makes this process the parent of what its children leave behind, so that it is counted."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def reap() -> None:
    """Waits for all that is left of a sweep."""
    try:
        while True:
            os.wait()
    except ChildProcessError:
        return


def environment(tree: Path, folder: Path) -> dict[str, str]:
    """The environment of a sweep: the code of a tree, and caches below a folder."""
    return os.environ | {
        "PYTHONPATH": str(tree),
        "DPO_LIGHTNING_CACHE": str(folder.with_suffix(".cache")),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def check_tree(tree: Path, work: Path) -> None:
    """Makes sure that a tree runs its own code, not what is installed.

    Raises:
        SystemExit: If it does not.
    """
    code = "import dpo_lightning; print(dpo_lightning.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=environment(tree, work / "none"), cwd=work,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    if not Path(found.stdout.strip()).is_relative_to(tree.resolve()):
        raise SystemExit(f"{tree} would run {found.stdout.strip()}: not timed")


def knows(tree: Path, settings: Sequence[str], work: Path) -> bool:
    """True if a tree has these settings."""
    done = subprocess.run(
        [sys.executable, str(tree / "train.py"), *settings, "--cfg", "job"],
        env=environment(tree, work / "none"), cwd=work, capture_output=True, check=False,
    )  # fmt: skip
    return done.returncode == 0


def run_sweep(
    tree: Path, folder: Path, settings: Sequence[str], *, betas: Sequence[float] = BETAS
) -> Spent:
    """Runs a sweep from its command to its end.

    Raises:
        SystemExit: If it fails, with the end of what it wrote, or a trial is missing.
    """
    cpu, begin = cpu_seconds(), time.perf_counter()
    done = subprocess.run(
        [
            *(sys.executable, str(tree / "train.py"), "-m", f"beta={','.join(map(str, betas))}"),
            *(*settings, "logger=none", f"hydra.sweep.dir={folder}"),
        ],
        env=environment(tree, folder),
        cwd=folder.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    wall = time.perf_counter() - begin
    reap()
    if done.returncode:
        raise SystemExit(f"the sweep failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    ended = [trial for trial in trials if trial["status"] in ("finished", "pruned")]
    if len(ended) != len(betas):
        raise SystemExit(f"{folder}: {len(ended)} of {len(betas)} trials ended")
    return Spent(wall, cpu_seconds() - cpu)


def losses(folder: Path) -> dict[str, list[float]]:
    """Training losses of each trial, by its folder's name."""
    found = {}
    for path in sorted(folder.glob("*/metrics.jsonl")):
        rows = map(json.loads, path.read_text().splitlines())
        found[path.parent.name] = [row["train/loss"] for row in rows if "train/loss" in row]
    return found


def take_turns(
    arms: Mapping[str, tuple[Path, Sequence[str]]],
    work: Path,
    *,
    rounds: int,
    part: str,
    betas: Sequence[float] = BETAS,
) -> list[dict[str, Any]]:
    """Runs sweeps in turns, the other way round every other time.

    Args:
        arms: The tree and the settings of each, by name.
        work: An empty folder.
        rounds: Number of times that each runs.
        part: Name for people.
        betas: The trials.

    Returns:
        A record for each run: arm, round, wall time and CPU seconds.
    """
    records = []
    for turn in range(rounds):
        for arm in list(arms)[:: -1 if turn % 2 else 1]:
            tree, settings = arms[arm]
            folder = work / f"{part}-{arm}-{turn}"
            spent = run_sweep(tree, folder, settings, betas=betas)
            records.append(
                {"arm": arm, "round": turn, "wall_seconds": spent.wall, "cpu_seconds": spent.cpu}
            )
            print(
                f"{part:6} round {turn + 1}  {arm:14} {spent.wall:8.1f} s  {spent.cpu:8.1f} CPU-s",
                flush=True,
            )
        whole = [losses(work / f"{part}-{arm}-{turn}") for arm in arms if arm not in PRUNED]
        if any(one != whole[0] for one in whole[1:]):
            print(f"{part}: the losses differ, so the work may differ too", flush=True)
    return records


def trl_seconds(record: dict[str, Any], *, steps: int) -> dict[str, float]:
    """Seconds of one run of TRL, from an arm that took fewer steps over the same rows.

    Args:
        record: Of ``arm.py``: ``started``, ``built`` with the reference of all rows in it,
            ``times`` of the ends of its steps, ``evaluation_seconds``.
        steps: Optimizer steps of the run.
    """
    times = record["times"][WARM if len(record["times"]) > WARM + 1 else 0 :]
    step = (times[-1] - times[0]) / (len(times) - 1)
    start = record["built"] - record["started"]
    evaluation = record["evaluation_seconds"]
    return {
        "start_and_reference_seconds": start,
        "step_seconds": step,
        "steady_steps": float(len(times) - 1),
        "evaluation_seconds": evaluation,
        "run_seconds": start + steps * step + evaluation,
    }


def large(
    trees: dict[str, Path],
    work: Path,
    *,
    scale: Scale,
    rounds: int,
    threads: int,
    precision: str = "bf16-mixed",
    shape: str = "lognormal",
    again: Sequence[str] = (),
) -> dict[str, Any]:
    """Eight β of one model: our whole grid, our pruned sweeps, and TRL one run after the other.

    Args:
        trees: The code of each name.
        work: An empty folder.
        scale: Size of it all.
        rounds: Runs of each arm.
        threads: Of TRL.
        precision: Of both sides.
        shape: Lengths of the rows.
        again: Arms that are timed alone, beside kept figures; none: all of them, and TRL.
    """
    workload = Workload.make(work / "workload", SIZES[scale.size], SHAPES[shape], rows=scale.rows)
    evaluation = work / "evaluation.jsonl"
    vocabulary = SIZES[scale.size].vocabulary
    make_rows(evaluation, SHAPES[shape], count=scale.evaluated, vocabulary=vocabulary)
    steps = scale.rows // scale.pairs
    settings = (
        *(f"model.pretrained={workload.model}", f"data.train={workload.rows}"),
        *(f"data.eval={evaluation}", f"data.batch_size={scale.pairs}", "data.max_length=1024"),
        *(f"trainer.max_steps={steps}", f"trainer.precision={precision}"),
        *("evaluation.samples=0", "evaluation.partition_samples=0"),  # the other arm draws nothing
        f"evaluation.every_n_steps={steps}",  # at the end alone, like the other arm
        *("optimizer.schedule=constant", "optimizer.warmup=0", "optimizer.lr=1e-5"),
    )
    arms: dict[str, tuple[Path, Sequence[str]]] = {
        f"grid {name}": (tree, settings) for name, tree in trees.items()
    }
    if knows(trees["here"], PRUNED["pruned"], work):
        arms |= {name: (trees["here"], (*settings, *own)) for name, own in PRUNED.items()}
    else:
        print(f"this checkout does not know {PRUNED['pruned'][0]}: the whole grid alone")
    if again:
        arms = {name: arms[name] for name in again}
    records = take_turns(arms, work, rounds=rounds, part="large", betas=scale.betas)
    facts: dict[str, Any] = {"betas": scale.betas, "rows": scale.rows, "evaluated": scale.evaluated}
    facts |= {"pairs": scale.pairs, "steps": steps, "precision": precision, "shape": shape}
    facts |= {"model": SIZES[scale.size].describe(), "runs": records}
    if again:
        return facts
    options = workload.options() | {
        "evaluation": evaluation, "cache": work / "datasets-cache", "precision": precision,
        "steps": min(steps, WARM + 1 + scale.steady), "pairs": scale.pairs, "threads": threads,
        "lr": 1e-5,
    }  # fmt: skip
    theirs = []
    for turn in range(rounds):
        record = run_arm("trl_tuned", work / f"trl-{turn}.json", options=options)
        theirs.append(trl_seconds(record, steps=steps) | {"round": turn})
        print(
            f"large  round {turn + 1}  TRL tuned, a β {theirs[-1]['run_seconds']:8.1f} s",
            flush=True,
        )
    return facts | {"trl": theirs}


def merged(kept: dict[str, Any], found: dict[str, Any], arms: Sequence[str]) -> dict[str, Any]:
    """Kept figures of the large part with those of arms that were timed again in their place.

    Raises:
        SystemExit: If the two are not of the same work on the same machine.
    """
    for name in ("betas", "rows", "evaluated", "pairs", "steps", "precision", "shape", "model"):
        if json.loads(json.dumps(found[name])) != kept.get(name):
            raise SystemExit(f"--again: the kept figures have another {name}: {kept.get(name)}")
    if found["machine"]["cpu"] != kept["machine"]["cpu"]:
        raise SystemExit("--again: the kept figures are of another machine")
    runs = [run for run in kept["runs"] if run["arm"] not in arms]
    again = {"arms": [*arms], "machine": found["machine"], "load": found["load"]}
    return kept | {"runs": [*runs, *found["runs"]], "again": again}


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=("tiny", "large"), help="this one alone")
    parser.add_argument("--against", metavar="COMMIT", help="the tree of that commit, in turns")
    parser.add_argument("--rounds", type=int, help="runs of each arm (3; of the large ones 1)")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of TRL")
    parser.add_argument(
        "--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed",
        help="of the large part, on both sides: the one that is faster on this machine",
    )  # fmt: skip
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), default="lognormal",
        help="lengths of the large part's rows: short halves them, and the time that it takes",
    )  # fmt: skip
    parser.add_argument(
        "--again", nargs="+", choices=("grid here", *PRUNED), default=(),
        help="times these arms of the large part alone, once more",
    )  # fmt: skip
    parser.add_argument("--toy", action="store_true", help="tries the program out; needs --out")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    kept = arguments.out / "sweep.json"
    readme = HERE / "README.md"
    if arguments.toy:
        if arguments.out == HERE / "results":
            raise SystemExit("--toy: its numbers mean nothing; name another folder with --out")
        arguments.out.mkdir(parents=True, exist_ok=True)
        readme = arguments.out / "README.md"
        readme.write_text("\n".join(MARKS))
    report = json.loads(kept.read_text()) if kept.exists() else {}
    adopt_orphans()
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as name:
        work = Path(name)
        trees = {"here": ROOT}
        full = None
        if arguments.against:
            trees["there"] = work / "there"
            full = checkout(arguments.against, trees["there"])
        for tree in trees.values():
            check_tree(tree, work)
        load = os.getloadavg()[0]
        if load > QUIET:
            print(f"load {load:.1f}: other work runs, so wall times mean little", flush=True)
        head: dict[str, Any] = {
            "machine": describe_machine(arguments.threads), "against": full, "load": load
        }  # fmt: skip
        if arguments.part in (None, "tiny"):
            arms = {name: (tree, TINY) for name, tree in trees.items()}
            runs = take_turns(arms, work, rounds=arguments.rounds or 3, part="tiny")
            report["tiny"] = head | {"betas": list(BETAS), "settings": list(TINY), "runs": runs}
            write(arguments.out, report, readme)
        if arguments.part in (None, "large"):
            scale = TOY if arguments.toy else LARGE
            rounds = arguments.rounds or 1
            found = large(
                trees, work, scale=scale, rounds=rounds, threads=arguments.threads,
                precision=arguments.precision, shape=arguments.shape, again=arguments.again,
            )  # fmt: skip
            found = head | found
            if arguments.again:
                found = merged(report["large"], found, arguments.again)
            report["large"] = found
            write(arguments.out, report, readme)
    print(table(report))


if __name__ == "__main__":
    main()
