"""Rungs of a pruned sweep, as a trial and its sweep tell each other of them. Imports no torch.

The sweep writes the goal into a trial's folder before it starts it; the trial stops there, writes
its report as lines of ``rungs.jsonl`` and ends. What is decided is the sweep's business.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.files import finite, json_object, read_json, write_json, write_whole
from dpo_lightning.settings.conduct import RUNG_WARMUPS

RUNGS_FILE = "rungs.jsonl"
GOAL_FILE = ".rung.json"


class AtRung(SystemExit):
    """The run has reached its rung: it is saved, evaluated, and may go on later.

    Args:
        step: The optimizer step.
    """

    def __init__(self, step: int) -> None:
        super().__init__(0)
        self.step = step


@dataclass(frozen=True, slots=True)
class Goal:
    """The rung at which a trial stops.

    Attributes:
        rung: Its number, from 0.
        at: Share of the steps at each rung.
        metric: The metric that trials are compared by.
    """

    rung: int
    at: tuple[float, ...]
    metric: str

    def steps(self, *, total: int, warmup: int) -> tuple[int, ...]:
        """Step of each rung of a run.

        Args:
            total: Steps of the whole run.
            warmup: Those of them that are warm-up.
        """
        return tuple(max(math.ceil(share * total), RUNG_WARMUPS * warmup) for share in self.at)


@dataclass(frozen=True, slots=True)
class RungReport:
    """The report of a trial at a rung: a line of ``rungs.jsonl``.

    Attributes:
        rung: Number of the rung, from 0.
        step: Optimizer steps completed.
        total_steps: Steps of the whole run.
        metric: The metric.
        value: Its mean.
        values: Its value for each held-out item, in an order that all trials share.
        work: Work of measuring them, in optimizer steps that take as long.
    """

    rung: int
    step: int
    total_steps: int
    metric: str
    value: float
    values: tuple[float, ...]
    work: float = 0.0


def write_goal(folder: Path, goal: Goal | None) -> None:
    """Tells a trial where to stop; None lets it run to its end."""
    path = folder / GOAL_FILE
    if goal is None:
        path.unlink(missing_ok=True)
    else:
        write_json(path, asdict(goal))


def read_goal(folder: Path) -> Goal | None:
    """The goal in a trial's folder, if there is one."""
    found = read_json(folder / GOAL_FILE)
    if not found:
        return None
    return Goal(int(found["rung"]), tuple(map(float, found["at"])), str(found["metric"]))


def write_reports(folder: Path, reports: Sequence[RungReport]) -> None:
    """Adds lines to ``rungs.jsonl``, whole or not at all; a rung has one line, the newest."""
    new = {report.rung: asdict(report) | {"time": round(time.time(), 3)} for report in reports}
    lines: dict[int, Mapping[str, Any]] = {row["rung"]: row for row in _rows(folder)}
    text = "".join(
        f"{json.dumps(finite(dict(row)), allow_nan=False)}\n"
        for _, row in sorted((lines | new).items())
    )
    write_whole(folder / RUNGS_FILE, text.encode())


def read_reports(folder: Path, metric: str) -> dict[int, RungReport]:
    """The reports of a trial by rung; those of another metric, and damaged lines, are left out."""
    found: dict[int, RungReport] = {}
    for row in _rows(folder):
        values = row.get("values")
        if row.get("metric") != metric or not isinstance(values, list) or not values:
            continue
        numbers = [row.get("step"), row.get("total_steps"), row.get("value"), *values]
        if all(isinstance(number, int | float) for number in numbers):
            found[row["rung"]] = RungReport(
                rung=row["rung"],
                step=int(row["step"]),
                total_steps=int(row["total_steps"]),
                metric=metric,
                value=float(row["value"]),
                values=tuple(map(float, values)),
                work=_work(row.get("work")),
            )
    return found


def _work(value: Any) -> float:
    """The work of a report; one of an earlier version says none."""
    is_number = isinstance(value, int | float) and math.isfinite(value)
    return max(0.0, float(value)) if is_number else 0.0


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / RUNGS_FILE).read_bytes().splitlines()
    except OSError:
        return []
    rows = [row for line in lines if (row := json_object(line)) is not None]
    return [row for row in rows if type(row.get("rung")) is int]
