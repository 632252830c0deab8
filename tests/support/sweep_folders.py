"""Sweep folders made of files alone, for tests of their readers."""

import json
import math
from pathlib import Path
from typing import Any


def write_trial(
    sweep: Path,
    name: str,
    *overrides: str,
    status: str = "finished",
    metrics: dict[str, float] | None = None,
    evaluation: dict[str, Any] | None = None,
    rows: list[dict[str, Any]] | None = None,
    result: bool = True,
    error: str | None = None,
    command: str | None = None,
) -> Path:
    """A trial as the launcher and the run leave it; beta, loss and seed come from the overrides."""
    folder = sweep / name
    folder.mkdir(parents=True)
    values = dict(line.split("=", 1) for line in overrides)
    about = {
        "name": name,
        "overrides": list(overrides),
        "status": status,
        "exit_code": 0 if status == "finished" else 1,
        "log": "trial.log",
    }
    (folder / "trial.json").write_text(json.dumps(about))
    if result:
        said = {
            "status": status,
            "error": error,
            "beta": float(values.get("beta", 0.1)),
            "loss": values.get("loss", "sigmoid"),
            "seed": int(values.get("seed", 1)),
            "step": 100,
            "metrics": metrics or {},
            "command": command or " ".join(["python train.py", *overrides]),
            "throughput": {"pairs_per_second": 12.5},
            "versions": {"torch": "2.13.0"},
        }
        (folder / "result.json").write_text(json.dumps(said))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if rows is not None:
        (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def scored(scores: list[float], references: list[float], kls: list[float]) -> dict[str, Any]:
    """``evaluation.json`` of a run with a judge, one sample per prompt."""
    samples = [
        {
            "prompt": f"prompt {i}",
            "preferred": f"preferred {i}",
            "reference": f"reference {i}",
            "policy": f"policy {i}",
            "kl": kl,
            "judge": score,
            "reference_judge": reference,
        }
        for i, (score, reference, kl) in enumerate(zip(scores, references, kls, strict=True))
    ]
    return {"answers": [], "judge": "s", "samples": samples}


def scored_metrics(evaluation: dict[str, Any]) -> dict[str, float]:
    """The ``samples/…`` metrics that belong to the ``evaluation.json`` of such a run."""
    rows = evaluation["samples"]
    found = {}
    wins = [0.5 + 0.5 * ((r["judge"] > r["reference_judge"]) - (r["judge"] < r["reference_judge"]))
            for r in rows]  # fmt: skip
    for name, values in (
        ("kl", [row["kl"] for row in rows]),
        ("judge", [row["judge"] for row in rows]),
        ("reference_judge", [row["reference_judge"] for row in rows]),
        ("win_rate", wins),
    ):
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        found[f"samples/{name}"] = mean
        found[f"samples/{name}_stderr"] = math.sqrt(variance / len(values))
    return found


def curve(steps: int, *, level: float) -> list[dict[str, float]]:
    """Rows of ``metrics.jsonl``: training at every step, an evaluation at the end."""
    rows = [
        {
            "step": step,
            "train/loss": math.log(2) - level * step / steps,
            "train/rewards/accuracies": 0.5 + level * step / steps,
            "train/logratios/chosen": -level * step,
            "train/logratios/rejected": -2 * level * step,
        }
        for step in range(1, steps + 1)
    ]
    return [*rows, {"step": steps, "eval/rewards/accuracies": 0.5 + level}]
