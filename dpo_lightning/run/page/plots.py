"""Curves of one run as SVG, drawn by hand: matplotlib's import alone would cost a run a second."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from dpo_lightning.run.page.colours import DARK, LIGHT, Colour
from dpo_lightning.run.page.text import number_text

WIDTH, HEIGHT = 420, 230
"""Size of a panel, in its own units."""

MOST_POINTS = 200
"""Points of a curve; where there are more, neighbours are averaged."""

SERIES = {
    name: Colour(LIGHT[place], DARK[place], f"series-{place}")
    for place, name in enumerate(("training", "evaluation"))
}
"""The colours of both kinds of curves."""

# Room on the right for half of the last step's number.
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 28, 30, 34
_DOTS = 30


@dataclass(frozen=True, slots=True)
class Curve:
    """Values of one metric.

    Attributes:
        kind: ``training`` or ``evaluation``, by which its colour goes.
        points: Steps and values, in the order of the steps.
    """

    kind: str
    points: Sequence[tuple[float, float]]


def averaged(
    points: Sequence[tuple[float, float]], most: int = MOST_POINTS
) -> list[tuple[float, float]]:
    """The points, or the means of as many equal parts of them as there may be.

    Args:
        points: Steps and values.
        most: Number of points at most.
    """
    count = len(points)
    if count <= most:
        return list(points)
    cuts = [count * part // most for part in range(most + 1)]
    parts = [points[low:high] for low, high in itertools.pairwise(cuts)]
    return [(sum(x for x, _ in p) / len(p), sum(y for _, y in p) / len(p)) for p in parts]


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers inside a range, at equal distances of 1, 2 or 5 times a power of ten.

    Args:
        low: Its lower end.
        high: Its upper end, above the lower one.
        most: How many at most.
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    # Ten times a power leaves at most half as many as fit.
    for step in (power * factor for factor in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            break
    return [place * step for place in range(first, last + 1)]


def panel(
    title: str, curves: Sequence[Curve], *, steps: tuple[float, float] | None = None
) -> str | None:
    """One panel with its curves; None where none has a point.

    Args:
        title: Name of what is drawn, with its unit.
        curves: The curves.
        steps: First and last step of the axis; None takes those of the points.
    """
    drawn = [Curve(own.kind, averaged(own.points)) for own in curves if own.points]
    if not drawn:
        return None
    xs = [x for own in drawn for x, _ in own.points]
    ys = [y for own in drawn for _, y in own.points]
    across, up = _span(*(steps or (min(xs), max(xs))), whole=True), _span(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right = _LEFT + (x - across[0]) / (across[1] - across[0]) * (WIDTH - _LEFT - _RIGHT)
        down = HEIGHT - _BOTTOM - (y - up[0]) / (up[1] - up[0]) * (HEIGHT - _TOP - _BOTTOM)
        return right, down

    parts = [_text(12, 18, title, "figure-text", size=13, anchor="start")]
    for y in ticks(*up):
        down = place(across[0], y)[1]
        parts.append(_line(_LEFT, down, WIDTH - _RIGHT, down, "figure-grid"))
        parts.append(_text(_LEFT - 6, down + 4, _tick(y), "figure-soft", anchor="end"))
    # There is no half of a step.
    for x in filter(float.is_integer, map(float, ticks(*across))):
        right = place(x, up[0])[0]
        parts.append(_text(right, HEIGHT - _BOTTOM + 15, _tick(x), "figure-soft"))
    base = HEIGHT - _BOTTOM
    parts.append(_line(_LEFT, base, WIDTH - _RIGHT, base, "figure-edge"))
    parts.append(_text((_LEFT + WIDTH) / 2, HEIGHT - 4, "step", "figure-soft"))
    parts += [_curve(own, [place(*point) for point in own.points]) for own in drawn]
    last = "; ".join(f"{own.kind} ends at {number_text(own.points[-1][1])}" for own in drawn)
    says = escape(f"{title}: {last}")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{says}">'
    return f"{head}{''.join(parts)}</svg>"


def _span(low: float, high: float, *, whole: bool = False) -> tuple[float, float]:
    """The range of an axis, which has a width; a twentieth of it is free on either side."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        room = 1.0 if whole or low == 0 else abs(low) / 10
        return low - room, high + room
    room = 0.0 if whole else (high - low) / 20
    return low - room, high + room


def _tick(value: float) -> str:
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e6 else f"{value:.4g}"
    return text.replace("-", "−")


def _curve(own: Curve, places: Sequence[tuple[float, float]]) -> str:
    """A line; few points, such as those of evaluations, are dots too."""
    colour = SERIES[own.kind]
    ink = f"var(--{colour.name}, {colour.light})"
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    line = f'<polyline points="{path}" style="fill: none; stroke: {ink}; stroke-width: 1.8"/>'
    if len(places) > _DOTS:
        return line
    dots = (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" style="fill: {ink}"><title>'
        f"{own.kind}, step {step:g}: {number_text(value)}</title></circle>"
        for (x, y), (step, value) in zip(places, own.points, strict=True)
    )
    return line + "".join(dots)


def _line(x: float, y: float, to_x: float, to_y: float, name: str) -> str:
    ends = f'x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}"'
    return f'<line {ends} style="stroke: var(--{name})"/>'


def _text(
    x: float, y: float, text: str, name: str, *, size: int = 12, anchor: str = "middle"
) -> str:
    style = f"fill: var(--{name}); font-size: {size}px; text-anchor: {anchor}"
    return f'<text x="{x:.1f}" y="{y:.1f}" style="{style}">{escape(text)}</text>'
