"""Facts about a step whose loss or gradient is not finite, and the message about it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dpo_lightning.data.packing import GroupBatch
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.objectives.comparison import Comparison

# Rows that a message names.
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Scored:
    """Results of a micro-batch, kept until its step is known to be finite.

    Attributes:
        batch: The micro-batch.
        policy_logps: Log-probability of each response under the policy, shape (N,).
        reference_logps: The same under the reference, or None.
        losses: Loss of each group, shape (G,).
    """

    batch: GroupBatch
    policy_logps: Tensor
    reference_logps: Tensor | None
    losses: Tensor

    @classmethod
    def of(cls, batch: GroupBatch, comparison: Comparison) -> Scored:
        """A micro-batch with what its comparison found."""
        return cls(batch, comparison.policy_logps, comparison.reference_logps, comparison.losses)


def rows_of_step(step: Sequence[Scored], groups: Sequence[TokenGroup]) -> list[dict[str, Any]]:
    """One rank's rows of a step, as plain values.

    Args:
        step: Its micro-batches.
        groups: The data set that they index.
    """
    rows = []
    for scored in step:
        policy = scored.policy_logps.tolist()
        reference = None if scored.reference_logps is None else scored.reference_logps.tolist()
        losses = scored.losses.tolist()
        start = 0
        for number, (row, segments) in enumerate(
            zip(scored.batch.rows, scored.batch.segments, strict=True)
        ):
            end = start + len(segments) - 1
            logps = policy[start:end]
            reference_logps = None if reference is None else reference[start:end]
            values = [losses[number], *logps, *(reference_logps or [])]
            rows.append(
                {
                    "source": groups[row].source,
                    "row": row,
                    "finite": all(map(math.isfinite, values)),
                    "loss": losses[number],
                    "prompt_tokens": segments[0],
                    "response_tokens": list(segments[1:]),
                    "policy_logps": logps,
                    "reference_logps": reference_logps,
                }
            )
            start = end
    return rows


def report(
    step: int, *, loss: float, grad_norm: float, rows: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The content of ``diverged.json``: the rows of all ranks, those that are not finite first.

    Numbers that are not finite are the strings ``nan``, ``inf`` and ``-inf``.
    """
    ordered = sorted(rows, key=lambda row: (row["finite"], row["row"]))
    content = {"step": step, "loss": loss, "grad_norm": grad_norm, "rows": ordered}
    named: dict[str, Any] = _named(content)
    return named


def _named(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_named(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def what_happened(report: dict[str, Any]) -> str:
    """One clause: the step, its loss and gradient, and up to three rows that it is about."""
    culprits = [row for row in report["rows"] if not row["finite"]]
    rows = culprits or report["rows"]
    names = ", ".join(row["source"] for row in rows[:_NAMED])
    more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
    what = "not finite in" if culprits else "finite in each of its rows,"
    return (
        f"step {report['step']}: the loss is {_shown(report['loss'])}, {what} {names}{more}, "
        f"and the gradient norm is {_shown(report['grad_norm'])}; the step was not taken"
    )


def _shown(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
