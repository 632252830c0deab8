"""One arm in a process of its own: trains on the workload and writes what it took.

``python benchmarks/arm.py NAME --work FOLDER --out FILE …``; ``run.py`` calls it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STARTED = time.perf_counter()
STARTED_AT = time.time()

# Ours, from what everybody does to all there is.
LADDER = ("padded", "flat", "shared", "cached")
LORA = ("trl_lora", "lora")


def process_memory(name: str) -> int:
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
        self.imports = 0.0
        self._base = 0

    def imported(self) -> None:
        """Notes the memory now that everything is imported: from here on memory counts."""
        import torch

        self.imports = time.perf_counter() - STARTED
        self._base = process_memory("VmRSS")
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def trained(self) -> None:
        """Notes the end of the training: later memory and time do not count."""
        import torch

        if torch.cuda.is_available():
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.peak = process_memory("VmHWM") - self._base


def ours(arguments: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """Trains through the command line, as a user would."""
    os.environ["DPO_LIGHTNING_CACHE"] = str(arguments.cache)
    import lightning.pytorch as pl
    from lightning.pytorch.loops.fit_loop import _FitLoop

    import dpo_lightning.run.session  # noqa: F401
    from dpo_lightning.cli import main

    meter.imported()
    fit, advance = pl.Trainer.fit, _FitLoop.advance
    loop_seconds = 0.0

    def looped(self: Any) -> None:
        nonlocal loop_seconds
        start = time.perf_counter()
        advance(self)
        loop_seconds += time.perf_counter() - start

    def fitted(self: Any, *positional: Any, **named: Any) -> None:
        fit(self, *positional, **named)
        meter.trained()

    pl.Trainer.fit, _FitLoop.advance = fitted, looped  # type: ignore[method-assign]
    _take_away(arguments.arm)
    run = arguments.out.with_suffix("")
    code = main(
        [
            *(f"model.pretrained={arguments.model}", f"data.train={arguments.rows}"),
            *(f"data.batch_size={arguments.pairs}", f"trainer.max_steps={arguments.steps}"),
            *(f"trainer.precision={arguments.precision}", f"hydra.run.dir={run}"),
            *("data.eval_fraction=0", "evaluation.samples=0", "logger=none"),
            *("data.max_length=1024", "trainer.log_every_n_steps=1", "checkpoint.last=false"),
            *("optimizer.schedule=constant", "optimizer.warmup=0", "optimizer.max_grad_norm=1.0"),
            *(f"beta={arguments.beta}", f"optimizer.lr={arguments.lr}"),
            f"trainer.threads={arguments.threads}",
            f"reference={'cached' if arguments.arm in ('cached', 'lora') else 'live'}",
            f"model.dtype={arguments.dtype}",
            *(["peft=lora", f"peft.adapter={arguments.adapter}"] if arguments.adapter else []),
        ]
    )
    if code:
        raise SystemExit(code)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "train/loss" in row]
    meter.times = [row["time"] for row in rows]
    result = json.loads((run / "result.json").read_text())
    return {
        "losses": [row["train/loss"] for row in rows],
        "reported_pairs_per_second": result["throughput"]["pairs_per_second"],
        "loop_seconds": loop_seconds,
    }


def _take_away(arm: str) -> None:
    """Turns optimizations off, for the ladder."""
    if arm == "padded":
        from dpo_lightning.models.scoring import Scorer
        from dpo_lightning.reference import pair

        pair.choose_path = lambda *_, **__: (  # type: ignore[attr-defined]
            Scorer("padded"),
            "the benchmark asks for it",
        )
    elif arm == "flat":
        from dpo_lightning.data import packing
        from dpo_lightning.models.scoring import Scorer

        collate = packing.collate_groups

        def apart(groups: Any, rows: Any, **options: Any) -> Any:
            """Lays each response out behind a prompt of its own: no padding, no sharing."""
            alone = [
                dataclasses.replace(group, responses=(response,), ranks=(1,), reference_logps=None)
                for group in groups
                for response in group.responses
            ]
            layout = collate(alone, range(len(alone)), **options)
            whole = collate(groups, rows, gathers="none")
            names = ["group", "rank", "weight", "chosen", "rejected", "rows", "best"]
            names += ["pair_share", "target_margin", "places"]
            return dataclasses.replace(layout, **{name: getattr(whole, name) for name in names})

        packing.collate_groups = apart
        # What a group costs, prompts counted once for each response.
        Scorer.shared = property(lambda _: False)  # type: ignore[assignment]


def trl(arguments: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """Trains with TRL: its defaults, or without checkpointing and with precomputed references."""
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(arguments.threads)
    meter.imported()
    options: dict[str, Any] = {}
    if arguments.arm in ("trl_tuned", "trl_lora"):
        options = {"gradient_checkpointing": False, "precompute_ref_log_probs": True}
    config = DPOConfig(
        output_dir=str(arguments.out.with_suffix("")),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.pairs,
        per_device_eval_batch_size=arguments.pairs,
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

    dtype = getattr(torch, arguments.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
    if arguments.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, arguments.adapter, is_trainable=True)

    class Times(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            meter.times.append(time.time())

    def rows(path: Path) -> Any:
        return load_dataset("json", data_files=str(path), split="train", cache_dir=arguments.cache)

    trainer = DPOTrainer(
        model=model,
        args=config,
        train_dataset=rows(arguments.ordered),
        eval_dataset=None if arguments.evaluation is None else rows(arguments.evaluation),
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        callbacks=[Times()],
    )
    built = time.time()
    trainer.train()
    meter.trained()
    found = {
        "losses": [row["loss"] for row in trainer.state.log_history if "loss" in row],
        "built": built,
    }
    if arguments.evaluation is not None:
        begin = time.perf_counter()
        trainer.evaluate()
        found["evaluation_seconds"] = time.perf_counter() - begin
    return found


def head(arguments: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """Memory of one float32 step at a vocabulary of 128k and 4,096 response tokens.

    Weights, gradients and the optimizer's state are there before it counts.
    """
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from dpo_lightning.data.packing import make_step_batch
    from dpo_lightning.data.tokens import TokenGroup
    from dpo_lightning.memory.budget import LEAST_TOKENS
    from dpo_lightning.memory.peaks import keep_freed_memory
    from dpo_lightning.models.probe import choose_path
    from dpo_lightning.objectives.comparison import Logps, compare_responses
    from dpo_lightning.objectives.objective import ObjectiveSettings

    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    config = LlamaConfig(
        vocab_size=131072,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=6,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    scorer, _ = choose_path(model, max_length=512)
    draw = np.random.default_rng(0)

    def ids(n: int) -> Any:
        return draw.integers(3, config.vocab_size, n).astype(np.int32)

    groups = [
        TokenGroup(ids(64), (ids(128), ids(128)), (1, 2), 1.0, f"bench:{i}", str(i))
        for i in range(16)
    ]
    batch = make_step_batch(
        groups,
        range(16),
        rank=0,
        world_size=1,
        # What a run chooses on a CPU for layers of this width.
        micro_batch_tokens=LEAST_TOKENS["cpu"],
        shared=scorer.shared,
    )
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step() -> None:
        for micro_batch in batch.micro_batches:
            logps = scorer.logps(model, micro_batch)
            compare_responses(
                ObjectiveSettings(terms={"sigmoid": 1.0}),
                micro_batch,
                Logps(policy=logps, reference=logps.detach()),
                beta=0.1,
            ).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-9)
    optimizer.step()
    meter.imported()
    step()
    meter.trained()
    return {
        "response_tokens": sum(int(micro.lengths.sum()) for micro in batch.micro_batches),
        "vocabulary": config.vocab_size,
    }


def main() -> None:
    """Runs one arm."""
    parser = argparse.ArgumentParser()
    parser.add_argument("arm", choices=[*LADDER, *LORA, "trl_default", "trl_tuned", "head"])
    parser.add_argument("--out", type=Path, required=True)
    for name in ("model", "rows", "ordered", "evaluation", "cache", "adapter"):
        parser.add_argument(f"--{name}", type=Path)
    for name in ("steps", "pairs", "threads"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--lr", type=float, default=5e-7)
    arguments = parser.parse_args()
    meter = Meter()
    work: Callable[..., dict[str, Any]] = ours
    if arguments.arm == "head":
        work = head
    elif arguments.arm.startswith("trl"):
        work = trl
    found = work(arguments, meter)
    record = {
        "arm": arguments.arm,
        "times": meter.times,
        "peak_bytes": meter.peak,
        "import_seconds": meter.imports,
        "started": STARTED_AT,
        "total_seconds": time.perf_counter() - STARTED,
    }
    arguments.out.write_text(json.dumps(record | found))


if __name__ == "__main__":
    main()
