"""The frontier of a report, drawn without a display and without pyplot's global state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dpo_lightning.run.page.colours import EDGE, MARK, PAPER, SHADE, TEXT, Colours
from dpo_lightning.run.page.text import address
from dpo_lightning.sweeps.report.analysis import Analysis
from dpo_lightning.sweeps.report.labels import Label, place_labels
from dpo_lightning.sweeps.report.one_policy import draw_policies
from dpo_lightning.sweeps.report.pooling import METRICS, Configuration
from dpo_lightning.sweeps.report.rounds import draw_rounds
from dpo_lightning.sweeps.report.text import error_text
from dpo_lightning.sweeps.report.theme import STYLE, colours_of, inline_svg, png

_MARKERS = "osD^vP"
# More labels than this hide what they label; then only the best and the pick have theirs.
_MOST_LABELS = 14
# Width and height in inches, and the longest label that is written beside its point; a longer one
# is its number in the table.
WIDE = ((7.4, 4.6), 26)
NARROW = ((4.4, 4.2), 16)


def frontier(analysis: Analysis) -> bytes:
    """The ranking metric over KL(policy || reference), a point per configuration, as a PNG."""
    with rc_context(STYLE):
        return png(frontier_figure(analysis, colours_of(analysis.configurations))[0])


def frontier_svg(analysis: Analysis, colours: Colours, *, narrow: bool) -> str:
    """The same for the page, with links to the trials and their numbers where a pointer rests.

    Args:
        analysis: The results.
        colours: A colour for each configuration's label.
        narrow: True for a phone.
    """
    with rc_context(STYLE):
        figure, tips = frontier_figure(analysis, colours, shape=NARROW if narrow else WIDE)
        metric = "nothing" if analysis.metric is None else METRICS[analysis.metric]
        says = f"{metric} over KL(policy‖reference), a point per configuration"
        name = "frontier-narrow" if narrow else "frontier-wide"
        return inline_svg(figure, name, says=says, colours=colours, tips=tips)


def frontier_figure(
    analysis: Analysis, colours: Colours, *, shape: tuple[tuple[float, float], int] = WIDE
) -> tuple[Figure, dict[str, str]]:
    """The figure, and the text of each point by its id.

    Args:
        analysis: The results.
        colours: A colour for each configuration's label.
        shape: ``WIDE`` or ``NARROW``.
    """
    size, longest = shape
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = [c for c in analysis.ranked if c.kl is not None]
    axes.set_xlabel(r"KL(policy ‖ reference), nats per response")
    axes.set_ylabel("" if analysis.metric is None else METRICS[analysis.metric])
    if not drawn:
        axes.set_axis_off()
        why = "no finished trial yet" if not analysis.ranked else "no trial measured a KL"
        axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
        return figure, {}
    _draw_optimum(axes, analysis, drawn)
    tips = _draw_points(axes, analysis, drawn, colours)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside upper left", ncols=3, handlelength=1.4, columnspacing=1.2)
    labelled = list(drawn) if len(drawn) <= _MOST_LABELS else [drawn[0]]
    if analysis.pick is not None and analysis.pick in drawn and analysis.pick not in labelled:
        labelled.append(analysis.pick)
    ranks = {c.label: rank for rank, c in enumerate(analysis.configurations, start=1)}
    texts = {c.label: c.label if len(c.label) <= longest else f"#{ranks[c.label]}" for c in drawn}
    # The recommended one has the first choice of a place.
    labelled.sort(key=lambda c: c is not analysis.pick)
    place_labels(
        axes,
        [Label(texts[c.label], c.kl.mean, c.value.mean) for c in labelled if c.kl and c.value],
        points=[(c.kl.mean, c.value.mean) for c in drawn if c.kl and c.value],
        curves=[[(kl, reward) for kl, reward, _ in analysis.optimum]],
    )
    return figure, tips


def _draw_optimum(axes: Axes, analysis: Analysis, drawn: Sequence[Configuration]) -> None:
    """The closed-form curve, the reference, and the limits of the axes."""
    low, high = _limits(analysis, drawn)
    if analysis.optimum:
        kls, rewards, _ = (
            np.array(column, float) for column in zip(*analysis.optimum, strict=True)
        )
        axes.plot(kls, rewards, color=TEXT, lw=1.6, label="closed-form optimum", zorder=1)
        axes.fill_between(kls, rewards, low, color=SHADE, alpha=0.12, lw=0, zorder=0)
    if analysis.reference_value is not None:
        axes.plot(
            [0], [analysis.reference_value], "X", color=EDGE, ms=8, label="reference", zorder=3,
            clip_on=False,
        )  # fmt: skip
    draw_policies(axes, analysis)
    draw_rounds(axes, analysis)
    axes.set_ylim(low, high)
    right = _right(drawn)
    # Room for the point of the reference; an estimate of a small KL may be below 0.
    left = min([0.0, *(c.kl.mean - (c.kl.stderr or 0.0) for c in drawn if c.kl is not None)])
    axes.set_xlim(left - 0.04 * (right - left), right)


def _draw_points(
    axes: Axes, analysis: Analysis, drawn: Sequence[Configuration], colours: Colours
) -> dict[str, str]:
    """A point for each configuration with its errors; their texts by id."""
    losses = list(dict.fromkeys(c.loss for c in drawn))
    tips = {}
    for number, c in enumerate(drawn):
        assert c.value is not None
        assert c.kl is not None
        colour: Any = colours[c.label].light
        marker = _MARKERS[losses.index(c.loss) % len(_MARKERS)]
        if len(c.trials) > 1 and analysis.metric and analysis.kl_metric:
            for trial in c.trials:
                x, y = trial.metric(analysis.kl_metric), trial.metric(analysis.metric)
                if x is not None and y is not None:
                    axes.scatter(x, y, s=16, color=colour, alpha=0.45, lw=0, zorder=2)
        axes.errorbar(
            c.kl.mean, c.value.mean, xerr=c.kl.stderr or None, yerr=c.value.stderr or None,
            fmt="none", ecolor=colour, elinewidth=1.2, capsize=2.5, zorder=4,
        )  # fmt: skip
        [point] = axes.plot(
            c.kl.mean, c.value.mean, marker, ms=8, color=colour, mec=PAPER, mew=0.8, zorder=4.5
        )
        point.set_gid(f"point-{number}")
        point.set_url(f"{address(c.trials[0].folder)}/")
        assert analysis.metric is not None
        tips[f"point-{number}"] = (
            f"{c.label}: {METRICS[analysis.metric]} {error_text(c.value.mean, c.value.stderr)}, "
            f"KL {error_text(c.kl.mean, c.kl.stderr)} nats"
        )
    pick = analysis.pick
    if pick is not None and pick in drawn and pick.kl is not None and pick.value is not None:
        axes.plot(
            pick.kl.mean, pick.value.mean, "o", ms=16, mfc="none", mec=MARK, mew=1.8,
            label=analysis.decision.mark, zorder=4.2,
        )  # fmt: skip
    return tips


def _limits(analysis: Analysis, drawn: Sequence[Configuration]) -> tuple[float, float]:
    """Lowest and highest value to show, with room for the error bars."""
    values = [analysis.reference_value] if analysis.reference_value is not None else []
    right = _right(drawn)
    values += [reward for kl, reward, _ in analysis.optimum if kl <= right]
    for c in drawn:
        assert c.value is not None
        error = c.value.stderr or 0.0
        values += [c.value.mean - error, c.value.mean + error]
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, high + room


def _right(drawn: Sequence[Configuration]) -> float:
    return 1.12 * max(c.kl.mean + (c.kl.stderr or 0.0) for c in drawn if c.kl is not None) or 1.0
