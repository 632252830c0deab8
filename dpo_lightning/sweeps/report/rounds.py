"""Rounds in a report: the ranking metric over KL to the start as each round left it.

A curve per round runs over the betas of trials that are otherwise alike; where there is one beta, a
curve runs over the rounds of a configuration. What the last round left are the report's own points.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from dpo_lightning.run.page.colours import EDGE
from dpo_lightning.run.page.text import MISSING, number_text
from dpo_lightning.sweeps.report.analysis import Analysis
from dpo_lightning.sweeps.report.pooling import MARK, METRICS, REWARD, Configuration
from dpo_lightning.sweeps.report.read import TrialResult, override_key
from dpo_lightning.sweeps.report.sections import TextTable

_ROUND = "rounds/round"
# More curves hide each other; the table has more rounds, and metrics.jsonl all.
_MOST_CURVES, _MOST_COLUMNS = 4, 8

Point = tuple[float, float]
"""KL to the start, and the metric."""


@dataclass(frozen=True, slots=True)
class RoundCurve:
    """Points that belong together.

    Attributes:
        label: What they are.
        points: By KL, or by round.
    """

    label: str
    points: tuple[Point, ...]


def points_of(trial: TrialResult, metric: str, kl_metric: str) -> dict[int, Point]:
    """The point at which each round of a trial ended, as far as it was measured there.

    Args:
        trial: A finished trial; one without rounds has no points.
        metric: The ranking metric.
        kl_metric: The metric that gives the KL.
    """
    steps, numbers = trial.series(_ROUND)
    if not steps:
        return {}
    kls = dict(zip(*trial.series(kl_metric), strict=True))
    values = dict(zip(*trial.series(metric), strict=True))
    # A round ends at the step at which the next one begins.
    ends = {int(number) - 1: step for step, number in zip(steps, numbers, strict=True)}
    found = {
        number: (kls[step], values[step])
        for number, step in ends.items()
        if number > 0 and step in kls and step in values
    }
    kl, value = trial.metric(kl_metric), trial.metric(metric)
    if kl is not None and value is not None:
        found[int(max(numbers))] = (kl, value)
    return found


def mean_points(configuration: Configuration, analysis: Analysis) -> dict[int, Point]:
    """The mean over seeds of the points of a configuration, for rounds that all seeds have."""
    metric, kl_metric = analysis.metric, analysis.kl_metric
    if metric not in (REWARD, MARK) or kl_metric is None:
        return {}
    own = [points_of(trial, metric, kl_metric) for trial in configuration.trials]
    shared = set.intersection(*(set(points) for points in own)) if own else set()
    return {number: _mean([points[number] for points in own]) for number in sorted(shared)}


def _mean(points: Sequence[Point]) -> Point:
    count = len(points)
    return math.fsum(kl for kl, _ in points) / count, math.fsum(v for _, v in points) / count


def round_curves(analysis: Analysis) -> list[RoundCurve]:
    """The curves to draw; none where no trial has rounds."""
    families: defaultdict[tuple[str, ...], list[dict[int, Point]]] = defaultdict(list)
    for configuration in analysis.ranked:
        points = mean_points(configuration, analysis)
        if len(points) > 1:
            rest = (line for line in configuration.settings if override_key(line) != "beta")
            families[tuple(rest)].append(points)
    found: list[RoundCurve] = []
    for number in _shown(points for members in families.values() for points in members):
        for members in families.values():
            at = sorted(points[number] for points in members if number in points)
            if len(members) > 1 and len(at) > 1:
                found.append(RoundCurve(f"after round {number}", tuple(at)))
    for members in families.values():
        if len(members) == 1:
            found.append(RoundCurve("round by round", tuple(members[0].values())))
    return found


def _shown(all_points: Iterable[dict[int, Point]]) -> list[int]:
    """A few rounds, evenly spread, without the last, whose points the report has anyway."""
    earlier = sorted({number for points in all_points for number in points})[:-1]
    if len(earlier) <= _MOST_CURVES:
        return earlier
    places = [round(i * (len(earlier) - 1) / (_MOST_CURVES - 1)) for i in range(_MOST_CURVES)]
    return [earlier[place] for place in places]


def draw_rounds(axes: Axes, analysis: Analysis) -> None:
    """Draws a curve per round: the later, the darker."""
    curves = round_curves(analysis)
    labels = list(dict.fromkeys(curve.label for curve in curves))
    named: set[str] = set()
    for curve in curves:
        strength = 0.35 + 0.55 * (labels.index(curve.label) + 1) / len(labels)
        kls, values = zip(*curve.points, strict=True)
        axes.plot(
            kls, values, ".--", color=EDGE, alpha=strength, lw=1.1, ms=5, zorder=1.8,
            label=None if curve.label in named else curve.label,
        )  # fmt: skip
        named.add(curve.label)


def round_tables(analysis: Analysis) -> Iterator[TextTable]:
    """Yields the table of the rounds; nothing where no trial has them."""
    rows = [(c.label, mean_points(c, analysis)) for c in analysis.ranked]
    numbers = sorted({number for _, points in rows for number in points})
    if not numbers or analysis.metric is None:
        return
    shown = [*numbers[: _MOST_COLUMNS - 1], numbers[-1]] if numbers[_MOST_COLUMNS:] else numbers
    yield TextTable(
        "Rounds",
        f"The {METRICS[analysis.metric]} at the end of each round, at its KL to the start in nats.",
        ("settings", *(f"round {number}" for number in shown)),
        tuple((label, *(_cell(points.get(number)) for number in shown)) for label, points in rows),
    )


def _cell(point: Point | None) -> str:
    return MISSING if point is None else f"{number_text(point[1])} at {number_text(point[0])}"
