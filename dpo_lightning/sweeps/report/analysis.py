"""Results of a sweep: configurations ranked, one picked, the best two compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from dpo_lightning.run.page.text import number_text
from dpo_lightning.run.page.values import as_rows, number
from dpo_lightning.sweeps.report.comparable import comparable_parts
from dpo_lightning.sweeps.report.objectives import Objectives, objectives_of
from dpo_lightning.sweeps.report.paired import paired_items
from dpo_lightning.sweeps.report.pick import PickDecision, PickRule, decide
from dpo_lightning.sweeps.report.pooling import (
    MARK,
    METRICS,
    REWARD,
    WIN_RATE,
    Configuration,
    choose_kl,
    choose_metric,
    pool,
)
from dpo_lightning.sweeps.report.read import Sweep, TrialResult
from dpo_lightning.sweeps.report.reason import reason_of
from dpo_lightning.sweeps.report.statistics import PairedTest, paired_test


@dataclass(frozen=True, slots=True)
class BestTwo:
    """The best configuration and the pick, else the next one, compared by item or by seed.

    Attributes:
        first: The best one.
        second: The pick, or the next where that is the best.
        unit: Unit of pairing, None where nothing could be paired.
        test: The outcome, None where nothing could be tested.
        sentence: The outcome in words.
    """

    first: Configuration
    second: Configuration
    unit: str | None
    test: PairedTest | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Analysis:
    """Results that the report shows.

    Attributes:
        metric: Metric that the trials are ranked by, None where no trial has any.
        kl_metric: Metric that gives the KL, None where no trial has one.
        configurations: Best first; those without the metric last.
        pick: The chosen one.
        reason: Reason why it was chosen, or why none was.
        comparison: The best against the pick, or the next; None where there are fewer.
        optimum: Points (KL, reward, beta) of the closed-form optimum, by KL.
        reference_value: The metric of the reference itself, where it is known.
        decision: How the pick came about.
        objectives: The objectives side by side.
        of: What the trials are of, empty where all of the sweep's are ranked together.
        others: Results of trials that may not be ranked with these.
    """

    metric: str | None
    kl_metric: str | None
    configurations: tuple[Configuration, ...]
    pick: Configuration | None
    reason: str
    comparison: BestTwo | None
    optimum: tuple[tuple[float, float, float | None], ...]
    reference_value: float | None
    decision: PickDecision = field(default_factory=PickDecision)
    objectives: Objectives = field(default_factory=Objectives)
    of: str = ""
    others: tuple[Analysis, ...] = ()

    @property
    def exact(self) -> bool:
        """True if the metric is computed over all responses, not estimated."""
        return self.metric == REWARD

    @property
    def ranked(self) -> tuple[Configuration, ...]:
        """The configurations that have the metric."""
        return tuple(c for c in self.configurations if c.value is not None)


def analyse(sweep: Sweep, metric: str | None = None, rule: PickRule | None = None) -> Analysis:
    """Ranks a sweep and picks a configuration.

    Args:
        sweep: The trials; those of other rows, models or judges are ranked by themselves.
        metric: One of ``METRICS``; None takes the first that every finished trial has.
        rule: The rule of the pick; None is the default one.

    Raises:
        UserError: If the metric is none of these, or no finished trial has it.
    """
    parts = comparable_parts(sweep)
    choose_metric(sweep.finished, metric)  # that some trial has it
    first, *others = [_analyse_part(part, of, metric, rule or PickRule()) for of, part in parts]
    return replace(first, others=tuple(others))


def _analyse_part(sweep: Sweep, of: str, metric: str | None, rule: PickRule) -> Analysis:
    """Results of trials that may be ranked together."""
    if of and metric is not None and all(t.metric(metric) is None for t in sweep.finished):
        metric = None  # another part has it
    metric = choose_metric(sweep.finished, metric)
    kl_metric = choose_kl(sweep.finished, exact=metric == REWARD)
    found = [c for c in pool(sweep.trials, metric, kl_metric) if c.trials]
    found.sort(key=lambda c: -math.inf if c.value is None else c.value.mean, reverse=True)
    ranked = [c for c in found if c.value is not None]
    reference_value = _reference_value(sweep.finished, metric)
    decision, reason, comparison = PickDecision(), _no_pick(sweep), None
    objectives = Objectives()
    if ranked and metric is not None:
        decision = decide(
            ranked, metric, rule, kl_metric=kl_metric, reference_value=reference_value
        )
        reason = reason_of(decision, metric)
        objectives = objectives_of(
            ranked,
            sweep.trials,
            folder=str(sweep.folder),
            kl_budget=rule.kl_budget,
            reference_value=reference_value,
        )
        if len(ranked) > 1:
            first = decision.best or ranked[0]
            moved = decision.pick is not None and decision.pick is not first
            rest = [c for c in ranked if c is not first]
            comparison = _compare(first, decision.pick if moved else rest[0], metric)
    return Analysis(
        metric=metric,
        kl_metric=kl_metric,
        configurations=tuple(found),
        pick=decision.pick,
        reason=reason,
        comparison=comparison,
        optimum=_optimum(sweep.finished) if metric == REWARD else (),
        reference_value=reference_value,
        decision=decision,
        objectives=objectives,
        of=of,
    )


def _no_pick(sweep: Sweep) -> str:
    if not sweep.finished:
        return "No trial has finished, so there is nothing to rank."
    return "No finished trial has a metric to rank by."


def _compare(one: Configuration, other: Configuration | None, metric: str) -> BestTwo:
    assert other is not None
    assert one.value is not None
    assert other.value is not None
    gap = one.value.mean - other.value.mean
    names = f"{one.label} against {other.label}"
    unit, differences = _differences(one, other, metric)
    if differences is None or unit is None:
        why = "their items or seeds cannot be paired, so the difference was not tested"
        if metric == REWARD:
            why = "both values are exact for their trials, and with fewer than two seeds in common"
            why += " there is nothing to test"
        text = f"{names}: a difference of {number_text(gap)} in {METRICS[metric]}; {why}."
        return BestTwo(one, other, None, None, text)
    test = paired_test(differences)
    text = (
        f"{names}, paired over {test.count} {unit}: a difference of "
        f"{number_text(test.difference)} in {METRICS[metric]}, 95% interval "
        f"{number_text(test.low)} to {number_text(test.high)}; permutation test "
        f"p {_p_text(test.p)}"
    )
    smallest = 2.0 ** (1 - test.count)
    if smallest > 0.05:
        text += f" (with {test.count} {unit} no p could be below {smallest:g})"
    elif test.p > 0.05:
        text += ", so the order of the two may be chance"
    return BestTwo(one, other, unit, test, text + ".")


def _p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3f}"


def _differences(
    one: Configuration, other: Configuration, metric: str
) -> tuple[str | None, NDArray[np.float64] | None]:
    """Unit of pairing, and the differences: items averaged over seeds, or one value per seed."""
    found = paired_items([list(one.trials), list(other.trials)], metric)
    if found is not None:
        ours_by_item, theirs_by_item = found.values
        return found.unit, ours_by_item.mean(axis=0) - theirs_by_item.mean(axis=0)
    ours, theirs = _by_seed(one, metric), _by_seed(other, metric)
    common = sorted(set(ours) & set(theirs))
    if len(common) < 2:
        return None, None
    return "seeds", np.array([ours[seed] - theirs[seed] for seed in common])


def _by_seed(configuration: Configuration, metric: str) -> Mapping[int, float]:
    return {
        trial.seed: value
        for trial in configuration.trials
        if trial.seed is not None and (value := trial.metric(metric)) is not None
    }


def _optimum(trials: Sequence[TrialResult]) -> tuple[tuple[float, float, float | None], ...]:
    for trial in trials:
        points = []
        for row in as_rows(trial.evaluation.get("optimum")):
            kl, reward = number(row.get("kl")), number(row.get("reward"))
            if kl is not None and reward is not None:
                points.append((kl, reward, number(row.get("beta"))))
        if points:
            return tuple(sorted(points, key=lambda point: point[:2]))
    return ()


def _reference_value(trials: Sequence[TrialResult], metric: str | None) -> float | None:
    if metric == WIN_RATE and trials:
        return 0.5  # against itself
    name = {REWARD: "controlled/reference_reward", MARK: "samples/reference_judge"}.get(
        metric or ""
    )
    values = [t.metric(name) for t in trials] if name is not None else []
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
