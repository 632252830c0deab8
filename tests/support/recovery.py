"""Helpers for tests of saving and resuming: an exact comparison, a callback that draws."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from dpo_lightning.plugins import register_callback
from tests.support.runs import Run

# Nothing of a checkpoint is left out. Of a row of metrics the time is, which is the wall clock's.
WALL_CLOCK = ("time",)


@register_callback("noise")
class Noise(pl.Callback):
    """Draws from every generator in every step, as an adapter's dropout draws from torch's."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        scale = 1e-3 * (1 + random.random() + np.random.rand())
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad += scale * torch.randn_like(parameter.grad)


DRAWING = ("plugins=[tests.support.recovery]", "trainer.callbacks=[noise]")


def checkpoint(run: Run, step: int) -> Path:
    return run.folder / "checkpoints" / f"step-{step:06d}.ckpt"


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places where two values differ in type, shape or any bit; NaNs of the same bits are equal."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__}, {type(b).__name__}"]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [f"{where}: {list(a)}, {list(b)}"]
        return [d for key in a for d in differences(a[key], b[key], f"{where}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [f"{where}: {len(a)} items, {len(b)} items"]
        return [d for i in range(len(a)) for d in differences(a[i], b[i], f"{where}[{i}]")]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        if same:
            same = a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
        return [] if same else [where]
    return [] if a == b or (a != a and b != b) else [f"{where}: {a}, {b}"]


def rows(run: Run, *, after: int = 0) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in row.items() if key not in WALL_CLOCK}
        for row in run.rows
        if row["step"] > after
    ]


def assert_same_end(run: Run, whole: Run, *, after: int) -> None:
    """Rows, checkpoints, export and last metrics of both are the same to the bit.

    An evaluation that was due at the step of the checkpoint is done, and has its rows, later.
    """
    assert run.code == whole.code == 0
    due = [row for row in rows(whole, after=after - 1) if row["step"] == after]
    own = [row for row in rows(run, after=after - 1) if row["step"] == after]
    assert own in (due, [row for row in due if "train/loss" not in row])
    assert rows(run, after=after) == rows(whole, after=after)
    saved = sorted((run.folder / "checkpoints").glob("step-*.ckpt"))
    compared = [path for path in saved if int(path.stem[5:]) > after]
    for path in compared:
        assert differences(load(path), load(whole.folder / "checkpoints" / path.name)) == []
    names = sorted(path.name for path in (whole.folder / "model").iterdir())
    assert {"model.safetensors", "adapter_model.safetensors"} & {*names}
    for name in {*names} - {"README.md"}:  # which names the run's folder
        exported = [r.folder / "model" / name for r in (run, whole)]
        assert exported[0].read_bytes() == exported[1].read_bytes(), name
    assert run.result["metrics"] == whole.result["metrics"]
    answers = [(r.folder / "evaluation.json").read_bytes() for r in (run, whole)]
    assert answers[0] == answers[1]
