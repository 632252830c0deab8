"""Curves of the training: for each configuration a mean and a band, one panel for each metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from dpo_lightning.run.page.colours import PAPER, Colours
from dpo_lightning.sweeps.report.pooling import Configuration
from dpo_lightning.sweeps.report.theme import STYLE, inline_svg

# On each side of a step its mean takes a fourteenth of all steps, of few steps none.
_REACHES = 14
_FEWEST = 8
# Places of a curve that are drawn: more cannot be seen, and make a large page.
_MOST_PLACES = 200
_NORMAL_95 = 1.959964


CAPTION = (
    "Lines are running means over training steps and seeds, points are held-out. A band reaches "
    "from the lowest to the highest seed; with one seed it is the 95% interval of the running mean."
)
"""Words below the panels."""


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel: its title, the metric of its lines, and that of its points.

    Attributes:
        name: Short name, for ids.
        title: Title.
        line: Metric of training.
        points: Metric of the evaluations.
    """

    name: str
    title: str
    line: str
    points: str


LEARNING = (
    Panel("loss", "loss", "train/loss", "eval/loss"),
    Panel("accuracy", "accuracy", "train/rewards/accuracies", "eval/rewards/accuracies"),
)
LOGRATIOS = tuple(
    Panel(name, f"log π/π_ref of the {name}", f"train/logratios/{name}", f"eval/logratios/{name}")
    for name in ("chosen", "rejected")
)


@dataclass(frozen=True, slots=True)
class Band:
    """A mean over steps and the band around it."""

    steps: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def curves(
    configurations: Sequence[Configuration],
    panels: Sequence[Panel],
    *,
    colours: Colours,
    share: bool,
) -> list[str]:
    """Panels as elements of the page; none where no trial has the metrics.

    Args:
        configurations: Those to draw.
        panels: Metrics to draw.
        colours: A colour for each configuration's label.
        share: True if the panels have the same values at their axes.
    """
    trials = [t for c in configurations for t in c.trials]
    if not any(trial.series(panel.line)[0] for trial in trials for panel in panels):
        return []
    with rc_context(STYLE):
        figures = [_panel(configurations, panel, colours) for panel in panels]
        if share:
            limits = [axes.get_ylim() for _, axes, _ in figures]
            for _, axes, _ in figures:
                axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        return [
            inline_svg(
                figure, panel.name, says=f"{panel.title} over optimizer steps", colours=colours,
                tips=tips,
            )
            for (figure, _, tips), panel in zip(figures, panels, strict=True)
        ]  # fmt: skip


def _panel(
    configurations: Sequence[Configuration], panel: Panel, colours: Colours
) -> tuple[Figure, Axes, dict[str, str]]:
    figure = Figure(figsize=(5.0, 3.1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    tips = {}
    for number, c in enumerate(configurations):
        colour: Any = colours[c.label].light
        found = band([trial.series(panel.line) for trial in c.trials])
        if found is not None:
            kept = _kept(len(found.steps))
            steps = found.steps[kept]
            axes.fill_between(
                steps, found.low[kept], found.high[kept], color=colour, alpha=0.18, lw=0, zorder=1
            )
            [line] = axes.plot(steps, found.mean[kept], color=colour, lw=1.5, zorder=2)
            line.set_gid(f"line-{number}")
            tips[f"line-{number}"] = c.label
        held_out = pooled([trial.series(panel.points) for trial in c.trials])
        if held_out is not None:
            [dots] = axes.plot(
                held_out[0], held_out[1].mean(axis=0), "o", ms=5, color=colour, mec=PAPER,
                mew=0.7, zorder=3,
            )  # fmt: skip
            dots.set_gid(f"dots-{number}")
            tips[f"dots-{number}"] = f"{c.label}, held-out"
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))
    return figure, axes, tips


def _kept(count: int) -> NDArray[np.int64]:
    """Positions of the places that are drawn, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, _MOST_PLACES)).round().astype(np.int64))


def pooled(
    series: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Steps that the seeds share, and their values, a row for each seed; None without any.

    Seeds that share no step with the first are left out.

    Args:
        series: Steps and values of each seed.
    """
    known = [dict(zip(steps, values, strict=True)) for steps, values in series if steps]
    if not known:
        return None
    known = [known[0], *(one for one in known[1:] if one.keys() & known[0].keys())]
    steps = sorted(set.intersection(*(set(one) for one in known)))
    if not steps:
        known, steps = known[:1], sorted(known[0])
    return np.array(steps, float), np.array([[one[s] for s in steps] for one in known], float)


def band(series: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Band | None:
    """The running mean of a metric and its band; None without any value.

    Several seeds: their mean, from the lowest to the highest. One: the 95% interval of each mean
    by the spread of the steps that it is taken over.

    Args:
        series: Steps and values of each seed.
    """
    found = pooled(series)
    if found is None:
        return None
    steps, values = found
    means, errors = smoothed(values)
    mean = means.mean(axis=0)
    if len(values) > 1:
        return Band(steps, mean, means.min(axis=0), means.max(axis=0))
    reach = _NORMAL_95 * errors[0]
    return Band(steps, mean, mean - reach, mean + reach)


def smoothed(values: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Running means along the last axis and their standard errors; the first value stays itself.

    Args:
        values: In the order of the steps, shape (..., N).
    """
    count = values.shape[-1]
    if count < _FEWEST:
        return values, np.zeros_like(values)
    places = np.arange(count)
    # As wide on both sides, so that a rise or fall does not shift. At the end it would narrow down
    # to single steps, whose noise looks like a jump: there it stays wide and looks back.
    reach = np.minimum(places, -(-count // _REACHES))
    ahead = np.minimum(reach, places[::-1])
    window = ahead + reach + 1
    centre = values.mean(axis=-1, keepdims=True)  # squares of what is left stay exact

    def means(of: NDArray[np.float64]) -> NDArray[np.float64]:
        sums = np.concatenate([np.zeros_like(of[..., :1]), np.cumsum(of, axis=-1)], axis=-1)
        found: NDArray[np.float64] = (
            sums[..., places + ahead + 1] - sums[..., places - reach]
        ) / window
        return found

    mean = means(values - centre)
    spread = np.maximum(means((values - centre) ** 2) - mean**2, 0.0)
    return mean + centre, np.sqrt(spread / np.maximum(window - 1, 1))
