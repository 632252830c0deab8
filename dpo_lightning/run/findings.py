"""Measurements of a run that has ended, as plain values for the signs of a failed training."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.evaluation.signs import Facts
from dpo_lightning.files import json_object

_ACCURACIES = "train/rewards/accuracies"


def gather_facts(
    *,
    metrics: Mapping[str, float],
    metrics_file: Path,
    steps: int,
    learning_rate: float,
    greedy: Sequence[Mapping[str, str]],
    samples: Sequence[Mapping[str, Any]],
    longest: int,
    groups: Sequence[TokenGroup],
    accuracies: Sequence[float],
) -> Facts:
    """Facts of a run, for :func:`~dpo_lightning.evaluation.signs.find_signs`.

    Args:
        metrics: The last value of each metric.
        metrics_file: The run's ``metrics.jsonl``.
        steps: Optimizer steps taken.
        learning_rate: The peak.
        greedy: Greedy answers, ``before`` and ``after``.
        samples: Drawn answers, ``policy`` and ``preferred``.
        longest: Most tokens of a drawn answer.
        groups: Held-out groups.
        accuracies: The policy's accuracy on each; empty where it was not evaluated.
    """
    best = [len(group.preferred) for group in groups if group.preferred is not None]
    return Facts(
        metrics=dict(metrics),
        accuracies=training_accuracies(metrics_file),
        steps=steps,
        learning_rate=learning_rate,
        greedy=[(row["before"], row["after"]) for row in greedy],
        answers=[row["policy"] for row in samples],
        preferred=[row["preferred"] for row in samples],
        longest=longest if samples else None,
        preferred_tokens=statistics.fmean(best) if best else None,
        pairs=[
            (len(group.responses[0]), len(group.responses[1]), accuracy)
            for group, accuracy in zip(groups, accuracies, strict=False)
            if group.ranks == (1, 2)
        ],
    )


def training_accuracies(path: Path) -> list[tuple[int, float]]:
    """Steps and accuracies of the training; a line that is damaged is passed over."""
    found = []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    for line in lines:
        row = json_object(line)
        if row is not None and isinstance(row.get(_ACCURACIES), int | float):
            found.append((int(row.get("step") or 0), float(row[_ACCURACIES])))
    return found
