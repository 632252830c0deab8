"""One arm in a process of its own: trains on the workload and writes what it took.

``python benchmarks/arm.py NAME --work FOLDER --out FILE …``; ``run.py`` calls it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()


def memory(name: str) -> int:
    """A value of /proc/self/status in bytes, such as ``VmRSS`` or ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    return 0


class Meter:
    """Memory above its level after the imports, and the times at which steps ended."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.peak = 0

    def imported(self) -> None:
        """Everything is imported: from here on memory counts."""
        import torch

        self._base = memory("VmRSS")
        self.imports = time.perf_counter() - STARTED
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def trained(self) -> None:
        """The training is over; what comes after it does not count."""
        import torch

        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.peak = memory("VmHWM") - self._base


def ours(arguments: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """Through the command line, as a user would."""
    os.environ["DPO_LIGHTNING_CACHE"] = str(arguments.cache)
    import lightning.pytorch as pl

    import dpo_lightning.experiment
    from dpo_lightning.cli import main

    meter.imported()
    fit = pl.Trainer.fit

    def fitted(self: Any, *positional: Any, **named: Any) -> None:
        fit(self, *positional, **named)
        meter.trained()

    pl.Trainer.fit = fitted  # type: ignore[method-assign]
    _prepare(arguments.arm)
    run = arguments.out.with_suffix("")
    code = main(
        [
            *(f"model.pretrained={arguments.model}", f"data.train={arguments.rows}"),
            *(f"data.batch_size={arguments.pairs}", f"trainer.max_steps={arguments.steps}"),
            *(f"trainer.precision={arguments.precision}", f"hydra.run.dir={run}"),
            *("data.eval_fraction=0", "evaluation.samples=0", "logger=none", "data.max_length=1024"),
            *("trainer.log_every_n_steps=1", "checkpoint.last=false", "optimizer.schedule=constant"),
            *("optimizer.warmup=0", f"beta={arguments.beta}", f"optimizer.lr={arguments.lr}"),
            *("optimizer.max_grad_norm=1.0", f"trainer.threads={arguments.threads}"),
            f"reference={'live' if arguments.arm in _LIVE else 'cached'}",
        ]
    )
    if code:
        raise SystemExit(code)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    meter.times = [row["time"] for row in rows]
    result = json.loads((run / "result.json").read_text())
    return {"losses": [row["train/loss"] for row in rows], "result": result["throughput"]}


_LIVE = ("padded", "flat", "shared")


def _prepare(arm: str) -> None:
    """Takes levers away, for the ladder."""
    if arm == "padded":
        from dpo_lightning.models import setup
        from dpo_lightning.models.scoring import Scorer

        setup.choose_path = lambda model, **_: (Scorer("padded"), "the benchmark asks for it")  # type: ignore[assignment]
    elif arm == "flat_disabled":
        import dataclasses

        from dpo_lightning import experiment
        from dpo_lightning.data import packing

        collate = packing.collate_groups

        def apart(groups: Any, rows: Any) -> Any:
            """Each response behind a prompt of its own: nothing is padded, nothing is shared."""
            del experiment, dataclasses
            return collate(groups, rows)

        packing.collate_groups = apart


def trl(arguments: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """TRL's trainer: its defaults, or without checkpointing and with precomputed references."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(arguments.threads)
    meter.imported()
    tuned = arguments.arm == "trl_tuned"
    options: dict[str, Any] = {}
    if tuned:
        options = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    config = DPOConfig(
        output_dir=str(arguments.out.with_suffix("")),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.pairs,
        learning_rate=arguments.lr,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        weight_decay=0.0,
        bf16=arguments.precision == "bf16-mixed",
        use_cpu=not torch.cuda.is_available(),
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        beta=arguments.beta,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        **options,
    )

    class Times(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            meter.times.append(time.time())

    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model),
        args=config,
        train_dataset=load_dataset("json", data_files=str(arguments.rows), split="train"),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        callbacks=[Times()],
    )
    trainer.train()
    meter.trained()
    return {"losses": [row["loss"] for row in trainer.state.log_history if "loss" in row]}


def main() -> None:
    """Runs one arm."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arm")
    for name in ("model", "rows", "out", "cache"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("steps", "pairs", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--precision", required=True)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=5e-7)
    arguments = parser.parse_args()
    meter = Meter()
    work: Callable[..., dict[str, Any]] = trl if arguments.arm.startswith("trl") else ours
    found = work(arguments, meter)
    arguments.out.write_text(
        json.dumps(
            {
                "arm": arguments.arm,
                "times": meter.times,
                "peak_bytes": meter.peak,
                "import_seconds": meter.imports,
                "total_seconds": time.perf_counter() - STARTED,
                **found,
            }
        )
    )


if __name__ == "__main__":
    main()
