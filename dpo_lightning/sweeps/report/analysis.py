"""Results of a sweep: configurations ranked, one picked, the best two compared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpo_lightning.sweeps.report.pooling import (
    ACCURACY,
    METRICS,
    REWARD,
    SCORE,
    WIN_RATE,
    Configuration,
    choose_kl,
    choose_metric,
    item_values,
    pool,
)
from dpo_lightning.sweeps.report.read import Sweep, TrialResult, as_rows, number, override_key
from dpo_lightning.sweeps.report.statistics import Choice, Estimate, PairedTest, choose, paired_test
from dpo_lightning.sweeps.report.text import number_text

_UNITS = {SCORE: "samples", WIN_RATE: "samples", ACCURACY: "evaluation groups"}
_SHAPES_ONLY = ("data.batch_size", "data.micro_batch_tokens")


@dataclass(frozen=True, slots=True)
class BestTwo:
    """The best two configurations, compared item by item or seed by seed.

    Attributes:
        first: The better one.
        second: The next.
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
        comparison: The best two, None where there are fewer.
        optimum: Points (KL, reward, beta) of the closed-form optimum, by KL.
        reference_value: The metric of the reference itself, where it is known.
    """

    metric: str | None
    kl_metric: str | None
    configurations: tuple[Configuration, ...]
    pick: Configuration | None
    reason: str
    comparison: BestTwo | None
    optimum: tuple[tuple[float, float, float | None], ...]
    reference_value: float | None

    @property
    def exact(self) -> bool:
        """True if the metric is computed over all responses, not estimated."""
        return self.metric == REWARD

    @property
    def ranked(self) -> tuple[Configuration, ...]:
        """The configurations that have the metric."""
        return tuple(c for c in self.configurations if c.value is not None)


def analyse(sweep: Sweep, metric: str | None = None) -> Analysis:
    """Ranks a sweep and picks a configuration.

    Args:
        sweep: The trials.
        metric: One of ``METRICS``; None takes the first that every finished trial has.

    Raises:
        UserError: If the metric is none of these, or no finished trial has it.
    """
    metric = choose_metric(sweep.finished, metric)
    kl_metric = choose_kl(sweep.finished, exact=metric == REWARD)
    found = [c for c in pool(sweep.trials, metric, kl_metric) if c.trials]
    found.sort(key=lambda c: -math.inf if c.value is None else c.value.mean, reverse=True)
    ranked = [(c, c.value) for c in found if c.value is not None]
    pick, reason = None, _no_pick(sweep)
    if ranked and metric is not None:
        values = [value for _, value in ranked]
        choice = choose(values, [None if c.kl is None else c.kl.mean for c, _ in ranked])
        pick = ranked[choice.pick][0]
        reason = _reason([c for c, _ in ranked], values, choice, metric)
    comparison = None
    if len(ranked) > 1 and metric is not None:
        comparison = _compare(ranked[0], ranked[1], metric)
    return Analysis(
        metric=metric,
        kl_metric=kl_metric,
        configurations=tuple(found),
        pick=pick,
        reason=reason,
        comparison=comparison,
        optimum=_optimum(sweep.finished) if metric == REWARD else (),
        reference_value=_reference_value(sweep.finished, metric),
    )


def _no_pick(sweep: Sweep) -> str:
    if not sweep.finished:
        return "No trial has finished, so there is nothing to rank."
    return "No finished trial has a metric to rank by."


def _reason(
    ranked: Sequence[Configuration], values: Sequence[Estimate], choice: Choice, metric: str
) -> str:
    name = METRICS[metric]
    best, pick = ranked[choice.best], ranked[choice.pick]
    top = number_text(values[choice.best].mean)
    own = number_text(values[choice.pick].mean)
    stderr = values[choice.best].stderr
    error = number_text(stderr) if stderr else "0"
    kl = None if pick.kl is None else number_text(pick.kl.mean)
    others = len(choice.within) - 1
    if len(ranked) == 1:
        text = f"{pick.label} is the only finished configuration: {name} {own}"
    elif choice.pick != choice.best:
        text = (
            f"{pick.label}: its {name}, {own}, is within one standard error ({error}) of the best, "
            f"{top} of {best.label}, and of the {len(choice.within)} configurations within it, it "
            f"stays closest to the reference: KL {kl} nats"
        )
        if best.kl is not None:
            text += f", not {number_text(best.kl.mean)}"
    else:
        text = f"{pick.label} has the best {name}, {own}"
        if others and kl is None:
            text += f"; {_others(others)} within one standard error ({error}) of it, and without "
            text += "a KL nothing says which is closer to the reference"
        elif others:
            known = all(ranked[i].kl is not None for i in choice.within)
            text += ", and the other" if others == 1 else f", and none of the {others} others"
            text += f" within one standard error ({error}) of it is"
            text += f"{' not' if others == 1 else ''}{'' if known else ' known to be'} closer to "
            text += f"the reference (KL {kl} nats)"
        elif stderr:
            text += f", and no other comes within one standard error ({error}) of it"
    if pick.unfinished:
        text += f". Of its trials {pick.unfinished} did not finish and do not count"
    return text + "."


def _others(count: int) -> str:
    return "another is" if count == 1 else f"{count} others are"


def _compare(
    first: tuple[Configuration, Estimate], second: tuple[Configuration, Estimate], metric: str
) -> BestTwo:
    one, other = first[0], second[0]
    gap = first[1].mean - second[1].mean
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
    if metric in _UNITS and _same_items(one, other, metric):
        both = item_values([*one.trials, *other.trials], metric)
        if both is not None:
            split = len(one.trials)
            return _UNITS[metric], both[:split].mean(axis=0) - both[split:].mean(axis=0)
    ours, theirs = _by_seed(one, metric), _by_seed(other, metric)
    common = sorted(set(ours) & set(theirs))
    if len(common) < 2:
        return None, None
    return "seeds", np.array([ours[seed] - theirs[seed] for seed in common])


def _same_items(one: Configuration, other: Configuration, metric: str) -> bool:
    """True if item n of one is item n of the other."""
    if metric == ACCURACY:
        changed = set(one.settings) ^ set(other.settings)
        keys = {override_key(line) for line in changed} - set(_SHAPES_ONLY)
        return not any(key.partition(".")[0] == "data" for key in keys)
    prompts = {
        tuple(str(row.get("prompt")) for row in as_rows(trial.evaluation.get("samples")))
        for trial in (*one.trials, *other.trials)
    }
    return len(prompts) == 1


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
    name = {REWARD: "controlled/reference_reward", SCORE: "samples/reference_score"}.get(
        metric or ""
    )
    values = [t.metric(name) for t in trials] if name is not None else []
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None
