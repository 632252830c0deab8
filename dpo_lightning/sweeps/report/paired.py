"""Evidence of a ranking: the held-out items of configurations, paired by item and by seed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dpo_lightning.run.page.values import as_rows
from dpo_lightning.sweeps.report.intervals import Evidence, from_items, from_seeds, unpaired
from dpo_lightning.sweeps.report.pooling import ACCURACY, SHARES, Configuration, item_list
from dpo_lightning.sweeps.report.read import TrialResult

# Fewer shared items than this share of a trial's are another set.
_LEAST_SHARED = 0.9
_PROMPTS = "held-out prompts"

Items = dict[tuple[str, int], float]


@dataclass(frozen=True, slots=True)
class Paired:
    """The metric by item.

    Attributes:
        values: Of each configuration, shape (seeds, items).
        unit: What an item is.
        spread: What one item may differ by between two configurations.
        whole: True if no item is missing.
    """

    values: tuple[NDArray[np.float64], ...]
    unit: str
    spread: float
    whole: bool


def evidence_of(configurations: Sequence[Configuration], metric: str) -> Evidence:
    """Means of configurations with the errors that they have in common.

    Args:
        configurations: All trained with the same number of seeds, each with the metric.
        metric: The ranking metric.
    """
    trials = [list(_by_seed(c, metric).values()) for c in configurations]
    values = [c.value for c in configurations if c.value is not None]
    means = np.array([value.mean for value in values])
    if metric.startswith("controlled/"):
        return from_seeds(np.array([[t.metric(metric) for t in own] for own in trials], float))
    if (found := paired_items(trials, metric)) is not None:
        evidence = from_items(np.stack(found.values), spread=found.spread, unit=found.unit)
        # The metric weighs items, their differences do not; without all items it is of others.
        return replace(evidence, means=means) if found.whole else evidence
    errors = [math.inf if value.stderr is None else value.stderr for value in values]
    return unpaired(means, np.array(errors))


def seeds_of(configuration: Configuration, metric: str) -> tuple[int | None, ...]:
    """The seeds of the trials that have the metric, in their order."""
    return tuple(_by_seed(configuration, metric))


def common_seeds(configurations: Sequence[Configuration], metric: str) -> tuple[int | None, ...]:
    """The seeds that most configurations have, the most of them where that is a tie."""
    counts = Counter(seeds_of(c, metric) for c in configurations)
    return max(counts, key=lambda seeds: (counts[seeds], len(seeds)))


def _by_seed(configuration: Configuration, metric: str) -> dict[int | None, TrialResult]:
    """The trials that have the metric, by seed, so that number n of each is of one block."""
    found = {t.seed: t for t in configuration.trials if t.metric(metric) is not None}
    return dict(sorted(found.items(), key=lambda item: (item[0] is None, item[0] or 0)))


def paired_items(trials: Sequence[Sequence[TrialResult]], metric: str) -> Paired | None:
    """The metric by item, as far as all trials share them; None where they do not.

    Answers to one prompt are one item, whose value is such that the mean over items is the mean
    over all answers.

    Args:
        trials: Those of each configuration.
        metric: The metric.
    """
    items = [[_items(trial, metric) for trial in own] for own in trials]
    flat = [found for own in items for found in own]
    shared = set(flat[0]).intersection(*flat[1:])
    if len(shared) < max(2.0, _LEAST_SHARED * max(map(len, flat))):
        return None
    keys = sorted(key for key in shared if all(math.isfinite(found[key]) for found in flat))
    prompts = {name: place for place, name in enumerate(dict.fromkeys(p for p, _ in keys))}
    if len(prompts) < 2:
        return None
    places = [prompts[prompt] for prompt, _ in keys]
    found, spread = [], 0.0
    for own in items:
        values = np.array([[by_item[key] for key in keys] for by_item in own])
        spread = max(spread, float(values.std()))
        sums = [np.bincount(places, weights=row, minlength=len(prompts)) for row in values]
        found.append(np.array(sums) * len(prompts) / len(keys))
    unit = "held-out rows" if len(prompts) == len(keys) and metric == ACCURACY else _PROMPTS
    whole = len(keys) == max(map(len, flat))
    return Paired(tuple(found), unit, 1.0 if metric in SHARES else spread, whole)


def _items(trial: TrialResult, metric: str) -> Items:
    """Values by prompt and number of the item among those of the prompt; NaN where one has none."""
    values = item_list(trial, metric)
    counts: Counter[str] = Counter()
    found: Items = {}
    names = _names(trial, metric, len(values)) if values else []
    for name, value in zip(names, values, strict=True):
        found[name, counts[name]] = value
        counts[name] += 1
    return found


def _names(trial: TrialResult, metric: str, count: int) -> list[str]:
    """The prompt of each item; by its place where the trial does not say."""
    if metric != ACCURACY:
        rows: Sequence[Mapping[str, object]] = as_rows(trial.evaluation.get("samples"))
        return [str(row.get("prompt")) for row in rows]
    groups = trial.evaluation.get("groups")
    if isinstance(groups, list) and len(groups) == count:
        return [str(group).partition("-")[0] for group in groups]
    return [f"{place:09}" for place in range(count)]
