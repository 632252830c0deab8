"""On-policy rounds beside one round of the reference's answers, on the embedded task.

``make bench-rounds`` trains with one round, all of whose answers are the reference's, and with
several, at equal steps and labels: pairs labelled by Bradley-Terry, rankings of four by Plackett-
Luce. Each round's end is measured exactly, by enumeration of all answers. A second call goes on
where the first was ended. Processors that do other work give the same numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback
from machine import describe_machine
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpo_lightning.cli import main as train
from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.plugins import register_callback
from dpo_lightning.sweeps.report.theme import STYLE

BETAS = (0.1, 0.3, 1.0)
ROUNDS = (1, 3)
STEPS = 512
# Settings of each kind of label; a step has 32 pairs, or 16 rankings of four: 64 answers.
KINDS = {
    "pairs": ("rounds.groups=pairs", "data.batch_size=32"),
    "rankings": ("rounds.groups=ranking", "loss=plackett_luce", "data.batch_size=16"),
}
COMMON = (
    *("evaluation.samples=0", "evaluation.partition_samples=0", "logger=none"),
    *("trainer.accelerator=cpu", "trainer.threads=1", "trainer.enable_progress_bar=false"),
    *("checkpoint.every_n_steps=null", "checkpoint.last=false", "data.controlled.eval_groups=64"),
    *("plugins=[rounds]", "trainer.callbacks=[round_probe]"),
)
RESULTS = Path(__file__).parent / "results" / "rounds.json"
# Quantile of Student's t at 97.5%, by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@register_callback("round_probe")
class RoundProbe(Callback):
    """Measures all that is exactly known at the end of each round."""

    def __init__(self) -> None:
        self._found: list[dict[str, float]] = []
        self._reference: Any = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Enumerates the reference: the policy as it starts."""
        self._reference = self._outcomes(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Measures where a round ends."""
        if trainer.global_step % trainer.datamodule.steps_per_epoch:
            return
        beta = pl_module.beta_plan.start
        report = ControlledTask().report(self._outcomes(pl_module), self._reference, beta=beta)
        self._found.append({"step": trainer.global_step, **report})
        path = Path(trainer.default_root_dir) / "rounds-measured.json"
        path.write_text(json.dumps(self._found))

    def _outcomes(self, module: Any) -> Any:
        with module.scorer.plain(module.policy) as plain:
            return ControlledTask().outcome_logps(plain)


def measured(place: Path, *, kind: str, beta: float, rounds: int, seed: int) -> list[Any]:
    """The exact measures at each round's end of a run; trained unless that was done before."""
    folder = place / f"{kind}_beta-{beta:g}_rounds-{rounds}_seed-{seed}"
    path = folder / "rounds-measured.json"
    steps = STEPS // rounds
    if not path.exists() or len(json.loads(path.read_text())) < rounds:
        words = [f"seed={seed}", f"beta={beta}", f"rounds.count={rounds}", f"rounds.steps={steps}"]
        code = train([*words, *KINDS[kind], f"hydra.run.dir={folder}", "overwrite=true", *COMMON])
        if code:
            raise SystemExit(f"{folder}: ended with exit code {code}")
    found: list[Any] = json.loads(path.read_text())
    return found


def interval(differences: Sequence[float]) -> list[float]:
    """Mean of paired differences with its 95% interval by Student's t: mean, low, high."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return [mean, mean, mean]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    reach = _T[len(differences) - 1] * error
    return [mean, mean - reach, mean + reach]


def cell(place: Path, kind: str, beta: float, seeds: Sequence[int]) -> dict[str, Any]:
    """The figures of one kind of label and one beta."""
    runs = {
        rounds: [measured(place, kind=kind, beta=beta, rounds=rounds, seed=s) for s in seeds]
        for rounds in ROUNDS
    }
    one, several = runs[ROUNDS[0]], runs[ROUNDS[1]]
    first = one[0][-1]
    falls = [
        statistics.fmean(run[number]["kl_policy_optimum"] for run in several)
        for number in range(ROUNDS[1])
    ]
    gains = {rounds: [run[-1]["gain_ratio"] for run in found] for rounds, found in runs.items()}
    return {
        "kind": kind,
        "beta": beta,
        "gain_ratio": {rounds: statistics.fmean(own) for rounds, own in gains.items()},
        "difference": interval(
            [after - before for before, after in zip(*gains.values(), strict=True)]
        ),
        "kl_policy_optimum_by_round": falls,
        "kl_policy_optimum_of_one": statistics.fmean(run[-1]["kl_policy_optimum"] for run in one),
        "points": {
            rounds: [[run[-1]["kl_policy_reference"], run[-1]["expected_reward"]] for run in found]
            for rounds, found in runs.items()
        },
        "optimum": [first["kl_optimum_reference"], first["optimal_reward"]],
        "reference_reward": first["reference_reward"],
    }


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws reward over KL for pairs, with one round and with several, under the closed form."""
    cells = [own for own in result["cells"] if own["kind"] == "pairs"]
    with rc_context(STYLE):
        figure = Figure(figsize=(7.4, 4.2), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        axes.plot(*zip(*result["frontier"], strict=True), color="#1f2937", lw=1.6,
                  label="closed-form optimum")  # fmt: skip
        ends = {
            rounds: [
                [statistics.fmean(column) for column in zip(*own["points"][rounds], strict=True)]
                for own in cells
            ]
            for rounds in ("1", "3")
        }
        for own, one, several in zip(cells, *ends.values(), strict=True):
            axes.plot(*zip(one, several, strict=True), ":", color="#9ca3af", lw=1, zorder=1)
            # Below and to the right of both there is no curve.
            axes.annotate(f"β {own['beta']:g}", one, (8, -12), textcoords="offset points")
        axes.plot(*zip(*ends["1"], strict=True), "s", ms=8, color="#dc6803",
                  label="one round: answers of the reference")  # fmt: skip
        axes.plot(*zip(*ends["3"], strict=True), "o", ms=8, color="#2563eb", label="three rounds")
        axes.plot([0], [cells[0]["reference_reward"]], "X", color="#6b7280", label="reference")
        axes.set_xlabel("KL(policy ‖ reference), nats per response")
        axes.set_ylabel("expected reward")
        axes.set_xlim(-0.3, 1.1 * max(own["optimum"][0] for own in cells))
        axes.legend(loc="lower right")
        figure.savefig(path, metadata={"Software": None})


def main() -> int:
    """Trains what is missing, writes the figures and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the figures go")
    parser.add_argument("--runs", type=Path, default=Path("outputs/bench-rounds"))
    parser.add_argument("--picture", type=Path, default=None, help="where the picture goes, a PNG")
    arguments = parser.parse_args()
    seeds = range(1, arguments.seeds + 1)
    result: dict[str, Any] = {
        "machine": describe_machine(threads=1, packages=("torch", "lightning", "dpo-lightning")),
        "seeds": arguments.seeds,
        "steps": STEPS,
        "frontier": [],
        "cells": [],
    }
    for kind, beta in itertools.product(arguments.kinds, BETAS):
        result["cells"].append(cell(arguments.runs, kind, beta, seeds))
        print(json.dumps(result["cells"][-1]), flush=True)
    result["frontier"] = frontier()
    # As it is read back: keys of JSON are texts.
    result = json.loads(json.dumps(result))
    arguments.out.write_text(f"{json.dumps(result, indent=2)}\n")
    if arguments.picture is not None:
        draw(result, arguments.picture)
    good = [own for own in result["cells"] if is_better(own)]
    total = len(result["cells"])
    print(f"rounds are better by the interval, and nearer each round: {len(good)} of {total}")
    return 0


def frontier() -> list[list[float]]:
    """Points (KL, reward) of the closed-form optimum."""
    from transformers import AutoModelForCausalLM

    from dpo_lightning import assets

    model = AutoModelForCausalLM.from_pretrained(Path(assets.__path__[0]) / "tiny_llama").eval()
    task = ControlledTask()
    return [[own["kl"], own["reward"]] for own in task.frontier(task.outcome_logps(model))]


def is_better(own: dict[str, Any]) -> bool:
    """True if rounds gain more at equal KL for sure, and each came nearer to the optimum."""
    falls = own["kl_policy_optimum_by_round"]
    return own["difference"][1] > 0 and all(a > b for a, b in itertools.pairwise(falls))


if __name__ == "__main__":
    sys.exit(main())
