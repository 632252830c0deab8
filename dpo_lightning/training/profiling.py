"""Lightning's profilers, with their tables and traces as files of the run's folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.profilers import (
    AdvancedProfiler,
    Profiler,
    PyTorchProfiler,
    SimpleProfiler,
)

PROFILE = "profile"
"""Folder of these files in that of a run."""


def make_profiler(name: str | None, run: Path) -> Profiler | None:
    """The profiler of a run, which writes a table for each stage and rank.

    ``pytorch`` records the operations of three steps, behind one that waits and one that warms up,
    and writes their trace too.

    Args:
        name: ``trainer.profiler``; None is none.
        run: The run's folder.
    """
    folder = run / PROFILE
    if name == "simple":
        return SimpleProfiler(dirpath=folder, filename="table")
    if name == "advanced":
        return AdvancedProfiler(dirpath=folder, filename="table")
    if name is None:
        return None

    # Else it says in two lines of its own that it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")

    def write_trace(profiler: Any) -> None:
        path = folder / f"trace-rank-{os.environ.get('LOCAL_RANK', '0')}.json"
        if not path.exists():  # else it is of the evaluation, which comes later
            folder.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(path))

    return PyTorchProfiler(
        dirpath=folder,
        filename="table",
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=write_trace,
        acc_events=True,
    )
