"""Intervals of what was measured on drawn answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_lightning.evaluation.items import numbered
from dpo_lightning.evaluation.uncertainty import bootstrap_mean


def sample_intervals(samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float] | None]:
    """Intervals of the means over answers, drawn anew by prompt.

    Args:
        samples: A row for each answer, with ``prompt``, ``kl``, ``score``, ``reference_score``.
    """
    if not samples:
        return {}
    prompts = numbered([row["prompt"] for row in samples])
    values = {"samples/kl": [row["kl"] for row in samples]}
    if all(row["score"] is not None for row in samples):
        values["samples/score"] = [row["score"] for row in samples]
        values["samples/win_rate"] = [
            0.5 + 0.5 * float(np.sign(row["score"] - row["reference_score"])) for row in samples
        ]
    found = {}
    for name, own in values.items():
        interval = bootstrap_mean(np.array(own, dtype=np.float64), prompts)
        found[name] = None if interval is None else list(interval)
    return found
