"""The pictures of a report, drawn without a display and without pyplot's global state."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from dpo_lightning.sweeps.report.analysis import Analysis
from dpo_lightning.sweeps.report.one_policy import draw_policies
from dpo_lightning.sweeps.report.pooling import METRICS, Configuration
from dpo_lightning.sweeps.report.read import TrialResult

_STYLE: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e6ea",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": "#6b7280",
    "axes.labelcolor": "#1f2937",
    "xtick.color": "#4b5563",
    "ytick.color": "#4b5563",
    "text.color": "#1f2937",
    "legend.frameon": False,
    # Data sets' texts never reach a figure, settings' values do: no mathematics out of a dollar.
    "text.parse_math": False,
    "svg.hashsalt": "dpo-lightning",
}
# Okabe and Ito's colours, told apart by all readers; the yellow is too light for lines.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vP"
_DARK = "#374151"
# More labels than this hide what they label; then only the best and the pick have theirs.
_MOST_LABELS = 14
_MOST_IN_LEGEND = 12
_WINDOWS = 40
# Places of a curve that are drawn: more cannot be seen, and make a large page.
_MOST_PLACES = 500

Colours = dict[str, Any]


def colours_of(configurations: Sequence[Configuration]) -> Colours:
    """A colour per label: along a scale where only beta differs, else told apart."""
    betas = [c.beta for c in configurations]
    known = [beta for beta in betas if beta is not None and beta > 0]
    if len(known) == len(betas) == len(set(betas)) and len(known) > 1:
        from matplotlib import colormaps

        scale = colormaps["viridis"]
        low, high = math.log(min(known)), math.log(max(known))
        places = [(math.log(beta) - low) / (high - low) for beta in known]
        return {
            c.label: scale(0.88 * place)  # its light end is hard to see on white
            for c, place in zip(configurations, places, strict=True)
        }
    return {c.label: _COLOURS[i % len(_COLOURS)] for i, c in enumerate(configurations)}


def frontier(analysis: Analysis) -> bytes:
    """The ranking metric over KL(policy || reference), a point per configuration, as a PNG."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(7.4, 4.8), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        drawn = [c for c in analysis.ranked if c.kl is not None]
        axes.set_xlabel(r"KL(policy ‖ reference), nats per response")
        axes.set_ylabel("" if analysis.metric is None else METRICS[analysis.metric])
        if drawn:
            _draw_frontier(axes, analysis, drawn)
        else:
            axes.set_axis_off()
            why = "no finished trial yet" if not analysis.ranked else "no trial measured a KL"
            axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
        return _png(figure)


def _draw_frontier(axes: Axes, analysis: Analysis, drawn: Sequence[Configuration]) -> None:
    colours = colours_of(drawn)
    low, high = _limits(analysis, drawn)
    if analysis.optimum:
        kls, rewards, _ = (
            np.array(column, float) for column in zip(*analysis.optimum, strict=True)
        )
        axes.plot(kls, rewards, color=_DARK, lw=1.6, label="closed-form optimum", zorder=1)
        axes.fill_between(kls, rewards, low, color="#9ca3af", alpha=0.12, lw=0, zorder=0)
    if analysis.reference_value is not None:
        axes.plot(
            [0], [analysis.reference_value], "X", color=_DARK, ms=8, label="reference", zorder=3,
            clip_on=False,
        )  # fmt: skip
    draw_policies(axes, analysis)
    losses = list(dict.fromkeys(c.loss for c in drawn))
    for c in drawn:
        assert c.value is not None
        assert c.kl is not None
        colour = colours[c.label]
        marker = _MARKERS[losses.index(c.loss) % len(_MARKERS)]
        if len(c.trials) > 1 and analysis.metric and analysis.kl_metric:
            for trial in c.trials:
                x, y = trial.metric(analysis.kl_metric), trial.metric(analysis.metric)
                if x is not None and y is not None:
                    axes.scatter(x, y, s=16, color=colour, alpha=0.45, lw=0, zorder=2)
        axes.errorbar(
            c.kl.mean, c.value.mean, xerr=c.kl.stderr or None, yerr=c.value.stderr or None,
            fmt=marker, ms=8, color=colour, mec="white", mew=0.8, elinewidth=1.2, capsize=2.5,
            zorder=4,
        )  # fmt: skip
    if analysis.pick is not None and analysis.pick in drawn:
        pick = analysis.pick
        assert pick.kl is not None
        assert pick.value is not None
        axes.plot(
            pick.kl.mean, pick.value.mean, "o", ms=16, mfc="none", mec="#D55E00", mew=1.8,
            label="pick", zorder=5,
        )  # fmt: skip
    axes.set_ylim(low, high)
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]), right=_right(drawn))
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")
    labelled = list(drawn) if len(drawn) <= _MOST_LABELS else [drawn[0]]
    if analysis.pick is not None and analysis.pick in drawn and analysis.pick not in labelled:
        labelled.append(analysis.pick)
    _label_points(axes, labelled, others=drawn)


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


def _label_points(
    axes: Axes, labelled: Sequence[Configuration], *, others: Sequence[Configuration]
) -> None:
    """Writes each label where it hides the least: points, other labels and the frame's edge."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    points = [
        axes.transData.transform((c.kl.mean, c.value.mean)) for c in others if c.kl and c.value
    ]
    marks = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in points]
    legend = axes.get_legend()
    taken = [*marks, *([legend.get_window_extent(renderer)] if legend else [])]
    for c in labelled:
        assert c.kl is not None
        assert c.value is not None
        best, least = None, math.inf
        for dx, dy, ha, va in _PLACES:
            text = axes.annotate(
                c.label, (c.kl.mean, c.value.mean), xytext=(dx, dy), textcoords="offset points",
                ha=ha, va=va, fontsize=9, color=_DARK, zorder=6,
            )  # fmt: skip
            box = text.get_window_extent(renderer)
            cost = sum(_overlap(box, other) for other in taken)
            cost += box.width * box.height - _overlap(box, axes.bbox)
            if cost < least - 1e-6:
                if best is not None:
                    best.remove()
                best, least = text, cost
            else:
                text.remove()
        assert best is not None
        taken.append(best.get_window_extent(renderer))


# Where a label may stand, the most readable place first.
_PLACES = (
    *((9, -4, "left", "top"), (9, 4, "left", "bottom"), (-9, 4, "right", "bottom")),
    *((-9, -4, "right", "top"), (0, 10, "center", "bottom"), (0, -10, "center", "top")),
    *((12, -16, "left", "top"), (-12, 16, "right", "bottom"), (0, 22, "center", "bottom")),
    (0, -22, "center", "top"),
)


def _overlap(one: Bbox, other: Bbox) -> float:
    width: float = min(one.x1, other.x1) - max(one.x0, other.x0)
    height: float = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)


def learning_curves(configurations: Sequence[Configuration]) -> bytes | None:
    """Loss and accuracy, the held-out ones as points, as SVG; None without any."""
    return _curves(
        configurations,
        (
            ("loss", "train/loss", "eval/loss"),
            ("accuracy", "train/rewards/accuracies", "eval/rewards/accuracies"),
        ),
        share=False,
    )


def logratios(configurations: Sequence[Configuration]) -> bytes | None:
    """Log-ratios of the chosen and of the rejected responses apart, as SVG; None without any."""
    return _curves(
        configurations,
        (
            ("log π/π_ref of the chosen", "train/logratios/chosen", "eval/logratios/chosen"),
            ("log π/π_ref of the rejected", "train/logratios/rejected", "eval/logratios/rejected"),
        ),
        share=True,
    )


def _curves(
    configurations: Sequence[Configuration],
    panels: Sequence[tuple[str, str, str]],
    *,
    share: bool,
) -> bytes | None:
    trials = [t for c in configurations for t in c.trials]
    if not any(trial.series(name)[0] for trial in trials for _, name, _ in panels):
        return None
    colours = colours_of(configurations)
    with rc_context(_STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        all_axes = figure.subplots(1, len(panels), sharey=share)
        for axes, (title, line, points) in zip(all_axes, panels, strict=True):
            for c in configurations:
                for trial in c.trials:
                    _curve(axes, trial, line, points, colour=colours[c.label], label=c.label)
            axes.set_title(title, loc="left", fontsize=10)
            axes.set_xlabel("optimizer step")
        if len(configurations) <= _MOST_IN_LEGEND:
            handles = {
                label: handle
                for handle, label in zip(*all_axes[0].get_legend_handles_labels(), strict=True)
            }
            figure.legend(
                handles.values(), handles.keys(), loc="outside right center", handlelength=1.2
            )
        return _svg(figure)


def _curve(
    axes: Axes, trial: TrialResult, line: str, points: str, *, colour: Any, label: str
) -> None:
    steps, values = trial.series(line)
    if steps:
        every = max(1, len(steps) // _MOST_PLACES)
        xs, ys = ([*part[:-1:every], part[-1]] for part in smoothed(steps, values))
        axes.plot(xs, ys, color=colour, lw=1.4, label=label)
    at, held_out = trial.series(points)
    axes.plot(at, held_out, "o", ms=4.5, color=colour, mec="white", mew=0.6)


def smoothed(
    steps: Sequence[float], values: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """A running mean over a fortieth of the curve; the first step, which is exact, stays itself.

    Args:
        steps: In ascending order.
        values: One for each.

    Returns:
        The same steps, and the means of the values around each.
    """
    width = len(values) // _WINDOWS
    if width < 2:
        return steps, values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    # As wide on both sides, so that a rise or fall does not shift. At the end it would narrow down
    # to single steps, whose noise looks like a jump: there it stays wide and looks back.
    reach = np.minimum(places, width // 2 + 1)
    ahead = np.minimum(reach, places[::-1])
    means = (sums[places + ahead + 1] - sums[places - reach]) / (ahead + reach + 1)
    return steps, means.tolist()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
