"""Frontiers of single policies in a report: what ``interpolate`` left in the trials' folders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

from dpo_lightning.run.page.colours import EDGE
from dpo_lightning.run.page.text import MISSING, clean, cut, number_text
from dpo_lightning.run.page.values import as_mapping, as_rows, number
from dpo_lightning.sweeps.report.analysis import Analysis
from dpo_lightning.sweeps.report.pooling import MARK, REWARD
from dpo_lightning.sweeps.report.read import TrialResult

_WAYS = {"decoded": "decoded", "weights": "by weights"}

_MOST_PLACES = 7


@dataclass(frozen=True, slots=True)
class PolicyFrontier:
    """The frontier of one trial's policy, in words.

    Attributes:
        label: The trial.
        heads: Heads of the table.
        rows: Its cells, a row a point.
        notes: What has to be known to read it, a sentence each.
        places: Names of the places whose answers are shown.
        answers: A prompt, and the answer at each place.
    """

    label: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...]
    places: tuple[str, ...]
    answers: tuple[tuple[str, tuple[str, ...]], ...]


def policy_frontiers(trials: Iterable[TrialResult]) -> tuple[PolicyFrontier, ...]:
    """The frontiers that trials have, as tables."""
    return tuple(_in_words(trial) for trial in trials if _points(trial))


def _points(trial: TrialResult) -> list[Mapping[str, Any]]:
    """Points that can be read."""
    points = as_rows(trial.interpolation.get("points"))
    return [
        point
        for point in points
        if number(point.get("lambda")) is not None and number(point.get("kl")) is not None
    ]


def _in_words(trial: TrialResult) -> PolicyFrontier:
    found, points = trial.interpolation, _points(trial)
    has_beta = found.get("axis") == "beta"
    heads = [*(["β"] if has_beta else []), "λ", "way", "reward", "KL in nats", "answers worth"]
    exact = any(number(point.get("gain_ratio")) is not None for point in points)
    rows = []
    for point in points:
        names = [*(["beta"] if has_beta else []), "lambda"]
        cells = [number_text(number(point.get(name))) for name in names]
        cells.append(_WAYS.get(str(point.get("method")), MISSING))
        cells += [_with_interval(point, name) for name in ("reward", "kl")]
        cells.append(number_text(number(point.get("ess"))))
        if exact:
            cells.append(number_text(number(point.get("gain_ratio"))))
        rows.append(tuple(cells))
    places, answers = _answers(points, "beta" if has_beta else "lambda")
    said = found.get("notes")
    notes = [cut(note) for note in said if isinstance(note, str)] if isinstance(said, list) else []
    hidden = as_rows(found.get("not_shown"))
    notes += [
        f"Not shown: λ {number_text(number(one.get('lambda')))} by weights, as {cut(one['why'])}."
        for one in hidden
        if isinstance(one.get("why"), str)
    ]
    return PolicyFrontier(
        label=clean(trial.name),
        heads=(*heads, *(["gain / best at this KL"] if exact else [])),
        rows=tuple(rows),
        notes=tuple(notes),
        places=places,
        answers=answers,
    )


def _with_interval(point: Mapping[str, Any], name: str) -> str:
    value, interval = number(point.get(name)), point.get(f"{name}_interval")
    ends = [number(end) for end in interval] if isinstance(interval, list) else []
    if value is None or len(ends) != 2 or ends[0] is None or ends[1] is None:
        return number_text(value)
    return f"{value:.2f} ± {(ends[1] - ends[0]) / 2:.2f}".replace("-", "−")


def _answers(
    points: Iterable[Mapping[str, Any]], axis: str
) -> tuple[tuple[str, ...], tuple[tuple[str, tuple[str, ...]], ...]]:
    """Places with answers, and the answers to each prompt."""
    sign = {"beta": "β", "lambda": "λ"}[axis]
    places: list[str] = []
    prompts: list[list[str]] = []
    for point in points:
        samples = as_rows(point.get("samples"))
        if not samples or len(places) == _MOST_PLACES:
            continue
        value = number(point.get(axis))
        places.append("reference" if point.get("lambda") == 0 else f"{sign} {number_text(value)}")
        prompts.append([cut(str(row.get("prompt", ""))) for row in samples])
    shown = [p for p in points if as_rows(p.get("samples"))][: len(places)]
    columns = [[cut(str(r.get("response", ""))) for r in as_rows(p["samples"])] for p in shown]
    # The same prompts stand at every place.
    rows = list(zip(*columns, strict=False)) if columns else []
    asked = prompts[0] if prompts else []
    return tuple(places), tuple(zip(asked, rows, strict=False))


def draw_policies(axes: Axes, analysis: Analysis) -> None:
    """Draws the frontiers of single policies over KL, where they are of the plotted metric.

    A judge's marks are the metric of a sweep only if that judge marked them, on answers that were
    as long.
    """
    if analysis.metric not in (REWARD, MARK):
        return
    named: set[str] = set()
    for configuration in analysis.configurations:
        for trial in configuration.trials:
            drawn = as_mapping(trial.interpolation.get("drawn"))
            if drawn.get("as_run") is not True:
                continue
            for way, style in (("weights", "-"), ("decoded", "x")):
                pairs = [
                    (kl, reward)
                    for point in _points(trial)
                    if point.get("method") == way
                    and (kl := number(point.get("kl"))) is not None
                    and (reward := number(point.get("reward"))) is not None
                ]
                if not pairs:
                    continue
                label = None if way in named else f"one policy, {_WAYS[way]}"
                named.add(way)
                xs, ys = zip(*sorted(pairs), strict=True)
                axes.plot(xs, ys, style, color=EDGE, lw=1.0, ms=5, label=label, zorder=2)
