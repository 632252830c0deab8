"""The content of ``sweep.json``, for other programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from dpo_lightning.sweeps.report.analysis import Analysis
from dpo_lightning.sweeps.report.content import commands_of
from dpo_lightning.sweeps.report.pooling import Configuration
from dpo_lightning.sweeps.report.read import Sweep, TrialResult
from dpo_lightning.sweeps.report.sections import (
    decision_entry,
    headline,
    objectives_entry,
    origin_of,
    rankings_entry,
)
from dpo_lightning.sweeps.report.text import own_words


def summary(sweep: Sweep, analysis: Analysis) -> dict[str, Any]:
    """The content of ``sweep.json``, for other programs."""
    pick, reason = headline(analysis)
    return {
        "metric": analysis.metric,
        "kl_metric": analysis.kl_metric,
        "statuses": sweep.status_counts,
        "pick": None if pick is None else _pick(analysis, pick),
        "reason": reason,
        "decision": decision_entry(analysis),
        "objectives": objectives_entry(analysis),
        "rankings": rankings_entry([analysis, *analysis.others] if analysis.others else []),
        "configurations": [
            _configuration(c) | {"kl_origin": _origin(part, c)}
            for part in (analysis, *analysis.others)
            for c in part.configurations
        ],
        "comparison": _comparison(analysis),
        "optimum": [{"kl": kl, "reward": r, "beta": beta} for kl, r, beta in analysis.optimum],
        "reference_value": analysis.reference_value,
        "trials": [_trial(trial) for trial in sweep.trials],
        "notes": list(sweep.notes),
    }


def _pick(analysis: Analysis, pick: Configuration) -> dict[str, Any]:
    return {
        "label": pick.label,
        "settings": list(pick.settings),
        "beta": pick.beta,
        "reason": analysis.reason,
        "undecided": analysis.decision.undecided,
        "trials": [trial.folder for trial in pick.trials],
        "commands": commands_of(pick),
    }


def _origin(analysis: Analysis, configuration: Configuration) -> dict[str, Any] | None:
    found = origin_of(analysis, configuration)
    return None if found is None else asdict(found)


def _configuration(configuration: Configuration) -> dict[str, Any]:
    estimates = {
        name: None if value is None else asdict(value)
        for name, value in (
            ("value", configuration.value),
            ("kl", configuration.kl),
            ("sampled_kl", configuration.sampled_kl),
            ("accuracy", configuration.accuracy),
            ("win_rate", configuration.win_rate),
        )
    }
    return {
        "label": configuration.label,
        "settings": list(configuration.settings),
        "beta": configuration.beta,
        "loss": configuration.loss,
        "seeds": configuration.seeds,
        "unfinished": configuration.unfinished,
        **estimates,
        "pairs_per_second": configuration.pairs_per_second,
        "trials": [trial.folder for trial in configuration.trials],
        "commands": commands_of(configuration),
    }


def _comparison(analysis: Analysis) -> dict[str, Any] | None:
    found = analysis.comparison
    if found is None:
        return None
    return {
        "first": found.first.label,
        "second": found.second.label,
        "unit": found.unit,
        "test": None if found.test is None else asdict(found.test),
        "sentence": found.sentence,
    }


def _trial(trial: TrialResult) -> dict[str, Any]:
    metrics: Mapping[str, Any] = trial.section("metrics")
    return {
        "name": trial.name,
        "folder": trial.folder,
        "overrides": list(trial.overrides),
        "status": trial.status,
        "error": trial.error,
        "log": trial.log,
        "beta": trial.beta,
        "loss": trial.loss,
        "seed": trial.seed,
        "step": trial.step,
        "command": None if trial.command is None else own_words(trial.command),
        "reference": dict(trial.section("reference")),
        "throughput": dict(trial.section("throughput")),
        "metrics": {name: trial.metric(name) for name in metrics},
        "signs": list(trial.signs),
    }
