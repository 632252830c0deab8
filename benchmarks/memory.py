"""The estimate of a run's memory beside what its process took at most; for docs/memory.md.

``python benchmarks/memory.py --out FILE`` trains a random Llama of 58 million weights for a few
steps in each of several ways, every one in a process of its own. A CPU that does other work gives
the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]

LAYERS, HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS, VOCABULARY = 8, 512, 1408, 8, 4, 32000

COMMON = (
    *("trainer.accelerator=cpu", "trainer.threads=1", "trainer.max_steps=3", "data.batch_size=16"),
    *("data.eval_fraction=0.1", "evaluation.samples=0", "evaluation.partition_samples=0"),
    *("checkpoint.every_n_steps=null", "checkpoint.last=false", "logger=none"),
    "evaluation.every_n_steps=9",
)
# Variables of glibc, and of the caches of kernels; a run leaves them alone where they are set.
LEAN = {
    **{"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    **{"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "16"},
}
# A step of so many groups fills its micro-batches.
LARGE = ("data.micro_batch_tokens=2048", "data.batch_size=64")
WAYS = {
    "float32": (),
    "bfloat16 behind float32 masters": ("trainer.precision=bf16-mixed",),
    "bfloat16, stochastic rounding": ("model.dtype=bfloat16",),
    "float32, 8-bit Adam": ("optimizer=adamw_8bit",),
    "bfloat16, 8-bit Adam": ("model.dtype=bfloat16", "optimizer=adamw_8bit"),
    "float32, 2,048 tokens": LARGE,
    "float32, 2,048 tokens, checkpointing": (*LARGE, "model.gradient_checkpointing=true"),
    "float32, live reference": ("reference=live",),
}


def measure(work: Path, settings: tuple[str, ...], out: Path) -> dict[str, Any]:
    """Trains in this process; its peak is above what it had after the imports."""
    os.environ["DPO_LIGHTNING_CACHE"] = str(work / "cache")
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    import torch
    from arm import process_memory

    import dpo_lightning.run.session  # noqa: F401
    from dpo_lightning.cli import main

    # What torch itself takes for its first products is not the run's.
    (torch.randn(256, 256, requires_grad=True) @ torch.randn(256, 256)).sum().backward()
    base = process_memory("VmRSS")
    model = [f"model.config={work / 'model'}", f"data.train={work / 'rows.jsonl'}"]
    # The second of two environments measures in the folder of the first.
    code = main([f"hydra.run.dir={out}", "overwrite=true", *model, *COMMON, *settings])
    if code:
        raise SystemExit(code)
    memory = json.loads((out / "result.json").read_text())["memory"]
    return {
        "estimated": sum(memory["estimated_bytes"].values()),
        "measured": memory["training_peak_bytes"] - base,
        "parts": memory["estimated_bytes"],
    }


def make_work(work: Path) -> None:
    """The model's config, its tokenizer, and rows."""
    from workload import Shape, Size, make_model, make_rows

    size = Size(VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KEY_HEADS)
    make_model(work / "model", size)
    make_rows(work / "rows.jsonl", Shape(96, 48, 0.4), count=96, vocabulary=VOCABULARY)


def main() -> None:
    """Measures all ways, or in this process the one that ``--way`` names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--way")
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    if arguments.way is not None:
        found = measure(arguments.work, WAYS[arguments.way], arguments.out.with_suffix(""))
        arguments.out.write_text(json.dumps(found))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_work(work)
        for number, way in enumerate(WAYS):
            out = work / f"run-{number}.json"
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                "--way",
                way,
                "--work",
                folder,
                "--out",
                str(out),
            ]
            runs = []
            for environment in (LEAN, {}):
                subprocess.run(
                    command,
                    check=True,
                    stdout=subprocess.DEVNULL,
                    timeout=1200,
                    env=os.environ | environment,
                )
                runs.append(json.loads(out.read_text()))
            results[way] = runs[0] | {"resident": runs[1]["measured"]}
            numbers = [results[way][name] for name in ("estimated", "measured", "resident")]
            columns = " | ".join(f"{number / 2**20:,.0f}" for number in numbers)
            print(f"| {way} | {columns} | {numbers[0] / numbers[1] - 1:+.0%} |", flush=True)
            arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
