"""Intervals of what was measured on drawn answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_lightning.evaluation.items import numbered
from dpo_lightning.evaluation.uncertainty import bootstrap_mean
from dpo_lightning.evaluation.win_rates import why_withheld


def sample_intervals(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float] | None]:
    """Intervals of the means over answers, drawn anew by prompt.

    Args:
        samples: A row for each answer, with ``prompt``, ``kl`` and of a judge ``judge``, ``win``.
    """
    if not samples:
        return {}
    found = {}
    for name, column in (("kl", "kl"), ("judge", "judge"), ("win_rate", "win")):
        rows = [row for row in samples if row.get(column) is not None]
        if not rows or (column != "kl" and why_withheld([row.get(column) for row in samples])):
            continue
        values = np.array([row[column] for row in rows], dtype=np.float64)
        interval = bootstrap_mean(values, numbered([row["prompt"] for row in rows]))
        found[f"samples/{name}"] = None if interval is None else list(interval)
    return found
