"""Measures training beside TRL and writes what it saw to ``benchmarks/results/``.

``make bench`` does all of it, ``make bench ARGS="--quick"`` a taste, ``--gpu`` the 1B model on one
GPU. Every arm runs in a fresh process, arms take turns, and nothing is timed before the losses of
both sides agree.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from against import compare
from machine import describe_machine, matrix_rate
from results import write_results
from workload import SHAPES, SIZES, Workload, make_adapter

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LORA = ("trl_lora", "lora")
LADDER = ("trl_default", "trl_tuned", "padded", "flat", "shared", "cached")
# Largest difference of a step's loss from TRL's, in float32.
EQUAL = 1e-3


@dataclass(frozen=True, slots=True)
class Case:
    """One shape and precision, and the arms that are compared on it."""

    shape: str
    precision: str
    arms: tuple[str, ...]
    steps: int

    @property
    def name(self) -> str:
        """Name of the case for people and file names."""
        return f"{self.shape} {self.precision}"


def run_arm(arm: str, out: Path, *, options: dict[str, Any]) -> dict[str, Any]:
    """Runs one arm in a process of its own.

    Raises:
        SystemExit: If it fails; its output is shown.
    """
    command = [sys.executable, str(HERE / "arm.py"), arm, "--out", str(out)]
    for key, value in options.items():
        command += [f"--{key}", str(value)]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(options.get("threads", 1)),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(out.parent / "datasets"),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode or not out.exists():
        raise SystemExit(f"{arm} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    record: dict[str, Any] = json.loads(out.read_text())
    shutil.rmtree(out.with_suffix(""), ignore_errors=True)
    return record


class Bench:
    """The measurements, one after the other, and their records."""

    def __init__(self, work: Path, *, size: str, pairs: int, threads: int, rounds: int) -> None:
        self.work = work
        self.size = size
        self.pairs = pairs
        self.threads = threads
        self.rounds = rounds
        self.records: list[dict[str, Any]] = []
        self._workloads: dict[str, Workload] = {}
        self._number = 0

    def workload(self, shape: str, rows: int) -> Workload:
        """Writes the model and the rows of a shape, once."""
        if shape not in self._workloads:
            folder = self.work / shape.replace("/", "-")
            self._workloads[shape] = Workload.make(
                folder, SIZES[self.size], SHAPES[shape], rows=rows
            )
        return self._workloads[shape]

    def arm(
        self, arm: str, shape: str, precision: str, steps: int, *, lr: float = 5e-7
    ) -> dict[str, Any]:
        """Runs one arm once."""
        workload = self.workload(shape, rows=16 * self.pairs)
        self._number += 1
        out = self.work / f"{self._number}-{arm}.json"
        options = workload.options() | {
            # A cache of its own: every run pays for its reference.
            "cache": self.work / f"cache-{self._number}",
            "precision": precision,
            "steps": steps,
            "pairs": self.pairs,
            "threads": self.threads,
            "lr": lr,
        }
        if arm in LORA:
            options["adapter"] = make_adapter(workload.model)
        if self.size == "8b":
            options["dtype"] = "bfloat16"
        record = run_arm(arm, out, options=options)
        times = record["times"]
        record["pairs_per_second"] = self.pairs * (len(times) - 1) / (times[-1] - times[0])
        spent = (times[-1] - times[0]) / (len(times) - 1)
        flops = workload.flops(self.pairs, steps, frozen=arm in LORA)
        record["flops_per_second"] = sum(flops[1:]) / (len(times) - 1) / spent
        return record | {"shape": shape, "precision": precision}

    def check_equal(
        self, shape: str, *, steps: int = 6, arms: tuple[str, str] = ("trl_tuned", "cached")
    ) -> dict[str, float]:
        """Refuses to time arms that do not compute the same.

        Args:
            shape: Of the rows.
            steps: Number of steps that are compared.
            arms: TRL's and ours.

        Raises:
            SystemExit: If step 0 is not ln 2, or a step's loss is not TRL's.
        """
        # A rate at which the losses move.
        lr = 1e-3 if arms == LORA else 1e-4
        runs = {a: self.arm(a, shape, "32-true", steps, lr=lr) for a in arms}
        theirs, ours = (runs[arm]["losses"] for arm in arms)
        for arm, run in runs.items():
            if not abs(run["losses"][0] - math.log(2)) < 1e-5:
                raise SystemExit(f"{arm}: the first loss is {run['losses'][0]}, not ln 2")
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        moved = abs(ours[-1] - math.log(2))
        print(
            f"equality of {' and '.join(arms)}: losses moved by {moved:.3f} and differ by at most "
            f"{apart:.2g}"
        )
        if not apart <= EQUAL:
            raise SystemExit(f"losses of the same rows differ by {apart:.3g} > {EQUAL}: not timed")
        return {"largest_difference": apart, "moved": moved, "steps": steps}

    def measure(self, case: Case) -> None:
        """Measures the arms of a case, taking turns."""
        for turn in range(self.rounds):
            # The other way round every other time, so that drift favours nobody.
            for arm in case.arms[:: -1 if turn % 2 else 1]:
                record = self.arm(arm, case.shape, case.precision, case.steps)
                self.records.append(record | {"round": turn})
                print(
                    f"{case.name:22} round {turn + 1}  {arm:12} "
                    f"{record['pairs_per_second']:7.2f} pairs/s  "
                    f"{record['peak_bytes'] / 1e6:6.0f} MB",
                    flush=True,
                )

    def head(self) -> dict[str, Any]:
        """Measures the peak of a step's activations at a vocabulary of 128k."""
        record = run_arm("head", self.work / "head.json", options={"threads": self.threads})
        print(f"activations at V = 131,072: {record['peak_bytes'] / 1e6:.0f} MB", flush=True)
        return {key: record[key] for key in ("peak_bytes", "response_tokens", "vocabulary")}

    def sweep(
        self,
        *,
        betas: Sequence[float] = (0.05, 0.1, 0.2, 0.5),
        steps: int = 12,
        precision: str = "bf16-mixed",
    ) -> dict[str, Any]:
        """Four values of beta from start to end: ours as one command, TRL's one after the other."""
        workload = Workload.make(
            self.work / "sweep", SIZES[self.size], SHAPES["lognormal"], rows=steps * self.pairs
        )
        common = workload.options() | {
            "precision": precision,
            "steps": steps,
            "pairs": self.pairs,
            "threads": self.threads,
        }
        started = time.perf_counter()
        folder = self.work / "sweep-ours"
        done = subprocess.run(
            [
                *(sys.executable, str(ROOT / "train.py"), "-m"),
                f"beta={','.join(map(str, betas))}",
                *(f"model.pretrained={workload.model}", f"data.train={workload.rows}"),
                *(f"data.batch_size={self.pairs}", f"trainer.precision={precision}"),
                *("data.eval_fraction=0", "evaluation.samples=0", "logger=none"),
                *("optimizer.schedule=constant", "optimizer.warmup=0", "data.max_length=1024"),
                f"hydra.sweep.dir={folder}",
            ],
            env=os.environ | {"DPO_LIGHTNING_CACHE": str(self.work / "cache-sweep")},
            cwd=self.work,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"the sweep failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
        ours = time.perf_counter() - started
        started = time.perf_counter()
        for beta in betas:
            options = common | {"beta": beta, "cache": self.work / "cache-sweep-trl"}
            run_arm("trl_tuned", self.work / f"sweep-{beta}.json", options=options)
        theirs = time.perf_counter() - started
        print(f"four betas: {ours:.0f} s against {theirs:.0f} s", flush=True)
        return {
            "betas": list(betas),
            "pairs": steps * self.pairs,
            "precision": precision,
            "ours_seconds": ours,
            "trl_seconds": theirs,
        }


def cases(arguments: argparse.Namespace) -> list[Case]:
    """Cases to measure."""
    if arguments.gpu:
        return [Case("lognormal", "bf16-mixed", ("trl_tuned", "shared", "cached", *LORA), 6)]
    found = [Case("lognormal", "bf16-mixed", LADDER, 5)]
    if arguments.quick:
        return [Case("lognormal", "bf16-mixed", ("trl_tuned", "cached"), 4)]
    found.append(Case("lognormal", "32-true", ("trl_tuned", "cached"), 4))
    found += [Case("lognormal", precision, LORA, 4) for precision in ("bf16-mixed", "32-true")]
    for precision in ("bf16-mixed", "32-true"):
        found += [
            Case(shape, precision, ("trl_tuned", "cached"), 3)
            for shape in SHAPES
            if shape != "lognormal"
        ]
    return found


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", action="store_true", help="a 1B model on one GPU")
    parser.add_argument("--quick", action="store_true", help="one shape, two arms, two rounds")
    parser.add_argument("--add", action="append", help="one more case, such as '64/128 32-true'")
    parser.add_argument("--lora", action="store_true", help="LoRA alone, into results/lora")
    parser.add_argument(
        "--precision", choices=("bf16-mixed", "32-true"), help="with --lora: this one alone"
    )
    parser.add_argument("--8b", dest="large", action="store_true", help="LoRA of 8B on a GPU")
    parser.add_argument("--sweep", action="store_true", help="the sweep alone, into kept results")
    parser.add_argument("--against", metavar="COMMIT", help="CPU seconds beside an older commit's")
    parser.add_argument(
        "--rounds", type=int, help="runs of each arm (5; with --quick 2, --gpu 3, --against 10)"
    )
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    if arguments.against:
        with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder:
            compare(arguments.against, Path(folder), rounds=arguments.rounds or 10)
        return
    rounds = arguments.rounds or (2 if arguments.quick else 3 if arguments.gpu else 5)
    size, pairs = ("1b", 16) if arguments.gpu else ("8b", 16) if arguments.large else ("small", 8)
    rates = {p: matrix_rate(p, threads=arguments.threads) for p in ("bf16-mixed", "32-true")}
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder:
        bench = Bench(
            Path(folder), size=size, pairs=pairs, threads=arguments.threads, rounds=rounds
        )
        if arguments.sweep or arguments.add:
            kept = json.loads((arguments.out / "cpu.json").read_text())
            if arguments.sweep:
                kept["sweep"] = bench.sweep()
            for case in arguments.add or ():
                shape, precision = case.split()
                bench.measure(Case(shape, precision, ("trl_tuned", "cached"), 3))
            write_results(arguments.out, kept | {"runs": kept["runs"] + bench.records})
            return
        report: dict[str, Any] = {
            "machine": describe_machine(arguments.threads),
            "matrix_flops_per_second": rates,
            "model": SIZES[size].describe(),
            "pairs_per_step": pairs,
        }
        if arguments.large:
            # In float32 it is too large: losses are compared with a smaller one, by --gpu.
            bench.measure(Case("lognormal", "bf16-mixed", LORA, 4))
            write_results(arguments.out / "8b", report | {"runs": bench.records})
            return
        if arguments.lora:
            report["equality_lora"] = bench.check_equal("lognormal", arms=LORA)
            for precision in [arguments.precision] if arguments.precision else list(rates):
                bench.measure(Case("lognormal", precision, LORA, 4))
                write_results(arguments.out / "lora", report | {"runs": bench.records})
            return
        report["equality"] = bench.check_equal("lognormal", steps=3 if arguments.gpu else 6)
        report["equality_lora"] = bench.check_equal("lognormal", steps=3, arms=LORA)
        if not arguments.gpu:
            report["head"] = bench.head()
        if not (arguments.gpu or arguments.quick):
            report["sweep"] = bench.sweep()
        for case in cases(arguments):
            bench.measure(case)
            # What is measured stays, whatever comes next.
            write_results(arguments.out, report | {"runs": bench.records})
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
