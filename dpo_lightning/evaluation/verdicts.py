"""A judge's verdicts in the rows and metrics of a run. No torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Sequence
from typing import Any

from dpo_lightning.evaluation.judges import Judged, Mark
from dpo_lightning.evaluation.win_rates import why_withheld, wilson


def put_verdicts(rows: Sequence[dict[str, Any]], judged: Judged) -> None:
    """Puts the verdicts into the rows of the answers.

    Args:
        rows: One for each answer.
        judged: Of these answers.
    """
    nothing: list[Mark] = [None] * len(rows)
    own, other = judged.marks or nothing, judged.other_marks or nothing
    for row, win, mark, other_mark in zip(rows, judged.wins, own, other, strict=True):
        row |= {"win": win, "judge": mark, "reference_judge": other_mark}


def judged_metrics(judged: Judged, owners: Sequence[Hashable]) -> dict[str, float]:
    """Means of the verdicts as ``samples/...``; one that is withheld is left out.

    Args:
        judged: On the policy's answers and the reference's.
        owners: The prompt of each.
    """
    found: dict[str, float] = {}
    for name, marks in (("judge", judged.marks), ("reference_judge", judged.other_marks)):
        if marks is not None and why_withheld(marks) is None:
            found |= sample_mean(name, known(marks))
    wins = known(judged.wins)
    if wins and why_withheld(judged.wins) is None:
        found |= sample_mean("win_rate", wins)
        prompts = {own for own, win in zip(owners, judged.wins, strict=True) if win is not None}
        low, high = wilson(statistics.fmean(wins), len(prompts))
        found |= {"samples/win_rate_low": low, "samples/win_rate_high": high}
    verdicts = judged.wins if judged.marks is None else judged.marks
    if judged.facts and verdicts:
        found["samples/judge_missing"] = 1 - len(known(verdicts)) / len(verdicts)
    return found


def known(values: Sequence[Mark]) -> list[float]:
    """The values that there are."""
    return [value for value in values if value is not None]


def sample_mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """The mean of a sample and its standard error, which one value does not have.

    Args:
        name: Of the metric, without ``samples/``.
        values: At least one.
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {f"samples/{name}": statistics.fmean(values), f"samples/{name}_stderr": error}
