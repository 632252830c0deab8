"""Cost of pruning, and of the metrics to prune by, on the embedded task; for docs/scaling.md.

``python benchmarks/prune_regret.py --out FILE`` trains whole grids, measures every trial at each
rung, and takes the decisions of a sweep on these numbers. Survivors go on to the bit like trials of
the whole grid (``tests/integration/test_rungs.py``), so nothing needs to be trained twice. A
second call goes on where the first was ended. Processors that do other work give the same numbers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from dpo_lightning.cli import main as train
from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.evaluation.rungs import exact_rewards, held_out
from dpo_lightning.plugins import register_callback
from dpo_lightning.processes.signals import SignalWatch
from dpo_lightning.sweeps.halving import Cell, Terms, decide, spent_until

SEEDS = range(1, 11)
SEEDS_OF_METRICS = range(1, 5)
BETAS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
RATE, BETA = 1e-3, 0.5
STEPS, BATCH = 128, 32
FEW = 32
RUNGS = (16, 32, 64)
# Ways to prune: the default one, and one rung after which as many trials stay as two devices run.
WAYS = {
    "three rungs": Terms((0.125, 0.25, 0.5), keep=0.5, budget=0.36),
    "one rung": Terms((0.125,), keep=1 / 3, budget=0.36),
}
REWARD, LOSS, ACCURACY = "reward", "log_loss", "accuracy"
COMMON = (
    *(f"data.controlled.train_groups={STEPS * BATCH}", f"data.batch_size={BATCH}"),
    # Three times five steps of warm-up come before the first rung.
    *("optimizer.warmup=5", "evaluation.samples=0", "evaluation.partition_samples=0"),
    *("trainer.accelerator=cpu", "trainer.threads=1", "checkpoint.every_n_steps=null"),
    *("checkpoint.last=false", "logger=none", "trainer.enable_progress_bar=false"),
    *("plugins=[prune_regret]", "trainer.callbacks=[rung_probe]"),
)


@register_callback("rung_probe")
class RungProbe(Callback):
    """Measures at each rung and at the end, and trains on."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, list[float]]] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Measures where a rung is."""
        if trainer.global_step not in (*RUNGS, STEPS):
            return
        groups, quiet = trainer.datamodule.eval_groups, SignalWatch(lambda code: None)
        measures = {REWARD: exact_rewards(ControlledTask(), pl_module.scorer)}
        if len(groups) > FEW:  # else the reward is all that is asked
            measures[LOSS] = held_out("eval/fitted_log_loss", groups, quiet)
            measures[ACCURACY] = held_out("eval/rewards/accuracies", groups, quiet)
        pl_module.eval()
        found = {name: list(measure(trainer, pl_module)) for name, measure in measures.items()}
        pl_module.train()
        self._found[str(trainer.global_step)] = found
        path = Path(trainer.default_root_dir) / "rungs-of-grid.json"
        path.write_text(json.dumps(self._found))


def measured(place: Path, *, seed: int, beta: float, rate: float) -> dict[str, Any]:
    """A trial of the whole grid at each rung; trained unless that was done before."""
    folder = place / f"seed-{seed}_beta-{beta:g}_lr-{rate:g}"
    path = folder / "rungs-of-grid.json"
    if not path.exists() or str(STEPS) not in json.loads(path.read_text()):
        words = [f"seed={seed}", f"beta={beta}", f"optimizer.lr={rate}", f"hydra.run.dir={folder}"]
        if seed not in SEEDS_OF_METRICS:
            words.append(f"data.controlled.eval_groups={FEW}")
        code = train([*words, "overwrite=true", *COMMON])
        if code:
            raise SystemExit(f"{folder}: ended with exit code {code}")
    found: dict[str, Any] = json.loads(path.read_text())
    final = json.loads((folder / "result.json").read_text())["metrics"]
    reward, kl = final["controlled/expected_reward"], final["controlled/kl_policy_reference"]
    # What the trial was asked for, and how much of what is possible at its KL it has got.
    return found | {"objective": reward - beta * kl, "gain": final["controlled/gain_ratio"]}


def regret(trials: dict[float, dict[str, Any]], terms: Terms) -> dict[str, Any]:
    """Loss of a sweep over beta that prunes over all trials by the true reward."""
    alive, counts = set(trials), []
    for number, share in enumerate(terms.fractions):
        counts.append(len(alive))
        cells = [
            Cell(f"{beta:g}", (), (), beta, 1, {1: trials[beta][f"{share * STEPS:g}"][REWARD]})
            for beta in sorted(alive)
        ]
        spent = spent_until(counts, terms.fractions)
        decision = decide(cells, [], terms, rung=number, spent=spent, trials=len(trials))
        alive = {beta for beta in alive if f"{beta:g}" in decision.kept}
    rewards = {beta: statistics.fmean(found[str(STEPS)][REWARD]) for beta, found in trials.items()}
    best = max(rewards.values())
    return {
        "rewards": rewards,
        "kept": sorted(alive),
        "regret": best - max(rewards[beta] for beta in alive),
        "steps": decision.spent,
    }


def separation(trials: dict[Any, dict[str, Any]], metric: str, truth: str) -> dict[str, float]:
    """Distance between trials at the end by a metric, and its agreement with their true order.

    Args:
        trials: Of one grid.
        metric: What is looked at.
        truth: ``objective``, which trials of one beta are ordered by, or ``gain``.

    Returns:
        ``z``, the median over pairs of trials of the paired difference in standard errors, and
        ``agrees``, the share of pairs that the metric puts into the true order.
    """
    sign = -1 if metric == LOSS else 1
    distances, agree = [], []
    for one, other in itertools.combinations(sorted(trials), 2):
        a, b = (trials[key][str(STEPS)] for key in (one, other))
        differences = [sign * (x - y) for x, y in zip(a[metric], b[metric], strict=True)]
        mean, error = statistics.fmean(differences), statistics.stdev(differences)
        distances.append(abs(mean) / (error / math.sqrt(len(differences))) if error else 0.0)
        better = trials[one][truth] > trials[other][truth]
        agree.append(0.5 if mean == 0 else float((mean > 0) == better))
    return {"z": statistics.median(distances), "agrees": statistics.fmean(agree)}


def early(trials: dict[Any, dict[str, Any]], metric: str, rung: int) -> float:
    """Loss of the objective at the end by taking the best trial of a rung, by a metric."""
    sign = -1 if metric == LOSS else 1
    chosen = max(trials, key=lambda key: sign * statistics.fmean(trials[key][str(rung)][metric]))
    best: float = max(found["objective"] for found in trials.values())
    return best - float(trials[chosen]["objective"])


def main() -> int:
    """Trains what is missing and prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the figures go, a JSON file")
    parser.add_argument("--runs", type=Path, default=Path("outputs/prune_regret"))
    arguments = parser.parse_args()
    regrets, metrics = [], []
    for seed in SEEDS:
        grid = {beta: measured(arguments.runs, seed=seed, beta=beta, rate=RATE) for beta in BETAS}
        for way, terms in WAYS.items():
            regrets.append({"seed": seed, "way": way, **regret(grid, terms)})
            print(json.dumps(regrets[-1]), flush=True)
        if seed not in SEEDS_OF_METRICS:
            continue
        rates = {rate: measured(arguments.runs, seed=seed, beta=BETA, rate=rate) for rate in RATES}
        for name in (LOSS, ACCURACY):
            metrics.append(
                {
                    "seed": seed,
                    "metric": name,
                    "betas": separation(grid, name, "gain"),
                    "rates": separation(rates, name, "objective"),
                    "lost": {rung: early(rates, name, rung) for rung in (*RUNGS, STEPS)},
                }
            )
            print(json.dumps(metrics[-1]), flush=True)
        arguments.out.write_text(json.dumps({"regrets": regrets, "metrics": metrics}, indent=2))
    arguments.out.write_text(json.dumps({"regrets": regrets, "metrics": metrics}, indent=2))
    for way in WAYS:
        own = [entry["regret"] for entry in regrets if entry["way"] == way]
        small = sum(lost <= 0.1 for lost in own)
        print(f"{way}: regret <= 0.1 in {small} of {len(own)} seeds, most {max(own):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
