"""Time of a run by its FLOPs, and by the speed of an earlier run of the same model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.files import RESULT_FILE, read_json

RULE = (
    "2 FLOPs a weight and token forward, 2 backward, 2 more where the weight is trained, 2 more "
    "with activation checkpointing; scores of attention, evaluation and sampling left out"
)
"""Rule of the count of FLOPs."""

# Results that are looked at, the newest first.
_LOOKED_AT = 200


@dataclass(frozen=True, slots=True)
class Workload:
    """Tokens that a run computes, and the weights that it computes them with.

    Attributes:
        parameters: Weights of the model.
        trained: Those of them, or of an adapter, that are trained.
        adapters: True if those are of an adapter beside the model.
        recomputed: True if the forward pass is computed again in the backward pass.
        tokens: Tokens of all training steps.
        reference_tokens: Tokens of the reference passes; 0 without a reference.
    """

    parameters: int
    trained: int
    adapters: bool
    recomputed: bool
    tokens: int
    reference_tokens: int

    @property
    def training_flops(self) -> int:
        """FLOPs of all steps: forward, backward to the states, and gradients of trained weights."""
        passes = 6 if self.recomputed else 4
        return (passes * self.parameters + 2 * self.trained) * self.tokens

    @property
    def reference_flops(self) -> int:
        """FLOPs of the reference passes."""
        return 2 * self.parameters * self.reference_tokens


def estimated_time(work: Workload, *, name: str, outputs: Path) -> dict[str, Any]:
    """FLOPs of a run, and the time of its steps where an earlier run tells the speed.

    Args:
        work: Tokens and weights.
        name: The model's name, as ``result.json`` has it.
        outputs: Parent of the folders of runs and sweeps.

    Returns:
        ``tokens``, ``reference_tokens``, ``training_flops``, ``reference_flops``, ``rule``,
        ``seconds`` of the training loop and ``measured``, the earlier run: its ``run`` and
        ``tokens_per_second``; both None where there is none.
    """
    earlier = _earlier(work, name=name, outputs=outputs)
    return {
        "tokens": work.tokens,
        "reference_tokens": work.reference_tokens,
        "training_flops": work.training_flops,
        "reference_flops": work.reference_flops,
        "rule": RULE,
        "seconds": None if earlier is None else work.tokens / earlier["tokens_per_second"],
        "measured": earlier,
    }


def _earlier(work: Workload, *, name: str, outputs: Path) -> dict[str, Any] | None:
    """The newest finished run of the same model with as many trained weights."""
    held = work.parameters + (work.trained if work.adapters else 0)
    wanted = {"name": name, "parameters": held, "trainable": work.trained}
    for path in _results(outputs):
        result = read_json(path)
        throughput = result.get("throughput")
        speed = throughput.get("tokens_per_second") if isinstance(throughput, dict) else None
        is_same = result.get("status") == "finished" and result.get("model") == wanted
        if is_same and isinstance(speed, int | float) and 0 < speed < math.inf:
            return {"run": str(path.parent), "tokens_per_second": float(speed)}
    return None


def _results(outputs: Path) -> Iterator[Path]:
    """Records of runs and trials, the newest first."""
    found = []
    for pattern in (f"runs/*/{RESULT_FILE}", f"sweeps/*/*/{RESULT_FILE}"):
        for path in outputs.glob(pattern):
            try:
                found.append((path.stat().st_mtime, str(path)))
            except OSError:
                continue  # it went meanwhile
    yield from (Path(path) for _, path in sorted(found, reverse=True)[:_LOOKED_AT])
