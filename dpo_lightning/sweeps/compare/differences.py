"""Differences of policies, paired by held-out item and tested; pure numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from dpo_lightning.settings.metric_names import LARGER, SMALLER, direction
from dpo_lightning.sweeps.compare.subjects import Key, Subject
from dpo_lightning.sweeps.report.statistics import paired_test

_BETTER = {LARGER: "higher", SMALLER: "lower"}


@dataclass(frozen=True, slots=True)
class Difference:
    """A metric of two policies on the same items.

    Attributes:
        metric: Its name as in ``metrics.jsonl``.
        a: Label of the first policy.
        b: Label of the second.
        value_a: Mean of the first, over the items.
        value_b: Mean of the second.
        difference: Mean of the second less that of the first.
        interval: Of 95%, from a bootstrap over prompts.
        p: Two-sided, of a test that flips the signs of prompts' differences; corrected for the
            number of pairs of policies.
        p_alone: The same before that.
        items: Items that both have.
        prompts: Prompts that these are of.
        better: ``higher``, ``lower``, or None of a metric of which neither is.
    """

    metric: str
    a: str
    b: str
    value_a: float
    value_b: float
    difference: float
    interval: tuple[float, float]
    p: float
    p_alone: float
    items: int
    prompts: int
    better: str | None


def differences(
    subjects: Sequence[Subject], metrics: Sequence[str]
) -> tuple[list[Difference], list[str]]:
    """Tests all pairs of policies in all metrics.

    Args:
        subjects: Two or more.
        metrics: Metrics that each has.

    Returns:
        The differences, metric by metric, and notes on metrics that could not be tested.
    """
    found: list[Difference] = []
    notes: list[str] = []
    for metric in metrics:
        tested = [_tested(metric, one, other) for one, other in combinations(subjects, 2)]
        known = [own for own in tested if own is not None]
        if len(known) < len(tested):
            notes.append(f"Not compared: {metric}. Fewer than two prompts have it in all policies.")
            continue
        corrected = holm([own.p_alone for own in known])
        found += [replace(own, p=p) for own, p in zip(known, corrected, strict=True)]
    return found, notes


def _tested(metric: str, one: Subject, other: Subject) -> Difference | None:
    """The paired test of one metric; None where fewer than two prompts have it in both."""
    a, b = one.items[metric], other.items[metric]
    keys = [key for key in a if key in b and math.isfinite(a[key]) and math.isfinite(b[key])]
    prompts = [prompt_of(metric, key) for key in keys]
    if len({*prompts}) < 2:
        return None
    by_prompt = prompt_differences(a, b, keys, prompts)
    test = paired_test(by_prompt)
    return Difference(
        metric,
        one.label,
        other.label,
        value_a=math.fsum(a[key] for key in keys) / len(keys),
        value_b=math.fsum(b[key] for key in keys) / len(keys),
        difference=test.difference,
        interval=(test.low, test.high),
        p=test.p,
        p_alone=test.p,
        items=len(keys),
        prompts=test.count,
        better=_BETTER.get(direction(metric) or 0),
    )


def prompt_of(metric: str, key: Key) -> str:
    """The prompt of an item: rows go by names that begin with it, answers by its text."""
    return key[0].partition("-")[0] if metric.startswith("eval/") else key[0]


def prompt_differences(
    a: Mapping[Key, float], b: Mapping[Key, float], keys: Sequence[Key], prompts: Sequence[str]
) -> NDArray[np.float64]:
    """Differences by prompt, such that their mean is the mean over all items, (P,).

    Items of one prompt are not independent, so a prompt is flipped as a whole.

    Args:
        a: Values of the first policy.
        b: Values of the second.
        keys: The items.
        prompts: The prompt of each.
    """
    sums: dict[str, float] = {}
    for key, prompt in zip(keys, prompts, strict=True):
        sums[prompt] = sums.get(prompt, 0.0) + (b[key] - a[key])
    return np.array(list(sums.values())) * (len(sums) / len(keys))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the chance of one false find among all stays at the level.

    Args:
        p_values: Of each test.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    count = len(p_values)
    order = sorted(range(count), key=p_values.__getitem__)
    found, largest = [0.0] * count, 0.0
    for place, number in enumerate(order):
        largest = max(largest, min(1.0, (count - place) * p_values[number]))
        found[number] = largest
    return found
