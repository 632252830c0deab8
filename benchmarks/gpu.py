"""Measures training beside TRL on one GPU, and writes one JSON file that can be sent in.

``make bench-gpu``: sizes that fit the card, from 24 GB on, within 30 minutes. Arms are fresh
processes that take turns, and nothing is timed before the losses of both sides agree. Exit code 2
where there is no GPU. ``--device cpu`` tries the program out on a model of toy size.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from machine import describe_machine, matrix_rate
from results import summarise
from run import HERE, LORA, Bench, Case
from workload import SIZES

NO_GPU = 2
"""Exit code where the machine has no GPU."""

MINUTES = 30.0
_MOST_ROUNDS = 5
_GIB = 2**30
_SHAPE, _PRECISION = "lognormal", "bf16-mixed"

# Dense bfloat16 products with float32 sums, in FLOPs per second, as the makers give them.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A40": 150e12,
    "A6000": 155e12,
    "RTX 5090": 209e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}


@dataclass(frozen=True, slots=True)
class Part:
    """A size of model, and the arms that are compared on it.

    Attributes:
        size: Name of the size, in ``workload.SIZES``.
        arms: The arms; they take turns.
        pairs: Pairs of a step.
        steps: Steps of a run, the first of which is not timed.
    """

    size: str
    arms: tuple[str, ...]
    pairs: int
    steps: int

    @property
    def case(self) -> Case:
        """The measurement, in the words of ``run.py``."""
        return Case(_SHAPE, _PRECISION, self.arms, self.steps)


ALL_WEIGHTS = ("trl_tuned", "cached")


def parts_of(device: str, memory: int | None) -> tuple[Part, ...]:
    """Parts that fit a card: all weights of one size, and LoRA on a larger one.

    All weights take 18 bytes each (float32 weights, gradients, moments; a copy in bfloat16), and
    the activations of TRL's padded pairs, without checkpointing, about as much again.

    Args:
        device: ``cuda`` or ``cpu``.
        memory: Bytes of the card.
    """
    if device == "cpu":
        return Part("toy", ALL_WEIGHTS, 2, 3), Part("toy", LORA, 2, 3)
    large = memory is not None and memory >= 70 * _GIB
    pairs = 16 if large else 8
    return Part("1b" if large else "half", ALL_WEIGHTS, pairs, 8), Part("1b", LORA, pairs, 8)


def peak_of(card: str | None) -> float | None:
    """The maker's number for a card's products in bfloat16; None for a card that is not listed."""
    words = re.sub(r"[-_ ]+", " ", card or "")
    found = [name for name in PEAKS if re.search(rf"\b{name}\b", words)]
    return PEAKS[max(found, key=len)] if found else None


def describe_card(device: str) -> dict[str, Any]:
    """The card: name, memory, driver, and the most that it could compute."""
    import torch

    if device == "cpu":
        return {"name": None, "memory_bytes": None, "driver": None, "peak_flops_per_second": None}
    card = torch.cuda.get_device_properties(0)
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        said = ""
    return {
        "name": card.name,
        "memory_bytes": card.total_memory,
        "driver": next(iter(said.split()), None),
        "peak_flops_per_second": peak_of(card.name),
    }


def rounds(benches: list[tuple[Part, Bench]], deadline: float) -> Iterator[int]:
    """Measures all parts, round after round, as long as another round fits before the deadline."""
    longest = 0.0
    for turn in range(_MOST_ROUNDS):
        begun = time.monotonic()
        if turn and begun + longest > deadline:
            return
        for part, bench in benches:
            # The other way round every other time, so that drift favours nobody.
            for arm in part.arms[:: -1 if turn % 2 else 1]:
                record = bench.arm(arm, _SHAPE, _PRECISION, part.steps)
                of_part = {"size": part.size, "pairs_per_step": part.pairs}
                bench.records.append(record | of_part | {"round": turn})
                print(
                    f"round {turn + 1}  {part.size:5} {arm:10} "
                    f"{record['pairs_per_second']:8.2f} pairs/s  "
                    f"{record['peak_bytes'] / _GIB:5.1f} GiB",
                    flush=True,
                )
        longest = max(longest, time.monotonic() - begun)
        yield turn + 1


def with_summary(report: dict[str, Any]) -> dict[str, Any]:
    """The report with a row for each arm: medians, intervals, MFU, and TRL's beside ours."""
    rows = summarise(report)
    sizes = {run["arm"]: run["size"] for run in report["runs"]}
    peak = report["card"]["peak_flops_per_second"]
    for row in rows:
        reached = row["utilisation"] * report["matrix_flops_per_second"][row["precision"]]
        row["size"] = sizes[row["arm"]]
        row["mfu"] = None if peak is None else reached / peak
    return report | {"summary": rows}


def measure(device: str, out: Path, *, minutes: float, threads: int) -> dict[str, Any]:
    """Runs the benchmark; what is measured is written after each round.

    Args:
        device: ``cuda`` or ``cpu``.
        out: The JSON file.
        minutes: Time for all of it.
        threads: Threads of the host.
    """
    started = time.monotonic()
    card = describe_card(device)
    parts = parts_of(device, card["memory_bytes"])
    report: dict[str, Any] = {
        "format": 1,
        "device": device,
        "machine": describe_machine(threads),
        "card": card,
        "matrix_flops_per_second": {_PRECISION: matrix_rate(_PRECISION, threads=threads)},
        "parts": [
            {
                "model": SIZES[part.size].describe(),
                "size": part.size,
                "arms": part.arms,
                "pairs_per_step": part.pairs,
            }
            for part in parts
        ],
    }
    with tempfile.TemporaryDirectory(prefix="dpo-bench-") as folder:

        def bench_of(number: int, size: str, pairs: int) -> Bench:
            work = Path(folder) / str(number)
            return Bench(work, size=size, pairs=pairs, threads=threads, rounds=1)

        small = "toy" if device == "cpu" else "small"
        report["equality"] = bench_of(0, small, 4).check_equal(_SHAPE, steps=3)
        benches = [
            (part, bench_of(number, part.size, part.pairs))
            for number, part in enumerate(parts, start=1)
        ]
        for done in rounds(benches, started + 60 * minutes):
            report["rounds"] = done
            report["minutes"] = (time.monotonic() - started) / 60
            report["runs"] = [run for _, bench in benches for run in bench.records]
            report = with_summary(report)
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1) + "\n")
    return report


def show(report: dict[str, Any]) -> None:
    """Prints a line for each arm."""
    for row in report["summary"]:
        speed, low, high = row["pairs_per_second"]
        ratio = row.get("over_trl_tuned", [1.0])[0]
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        print(
            f"{row['size']:5} {row['arm']:10} {speed:8.2f} pairs/s ({low:.2f} to {high:.2f})  "
            f"{ratio:5.2f} x TRL  MFU {mfu}  {row['peak_bytes'] / _GIB:.1f} GiB"
        )


def main() -> int:
    """Runs the benchmark.

    Returns:
        0; 2 where there is no GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="time for all of it (30)")
    parser.add_argument("--threads", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gpu-bench.json")
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        import torch

        if not torch.cuda.is_available():
            print(
                "error: no GPU is visible to torch here, and this measures one; "
                "--device cpu tries the program out",
                file=sys.stderr,
            )
            return NO_GPU
    report = measure(
        arguments.device, arguments.out, minutes=arguments.minutes, threads=arguments.threads
    )
    show(report)
    print(f"written to {arguments.out}: send it in with a report about speed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
