"""Labels of points in a figure, each where it hides nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.path import Path as Outline
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from dpo_lightning.run.page.colours import EDGE, TEXT

# Half the side of a point, in points of a figure.
_POINT = 6
# A label that hides more than this share of itself is left out: the table has it.
_MOST_HIDDEN = 0.5
# Cost of a label that another point is nearer to than its own.
_MISTAKEN = 0.3
# Room between a label and a line that it must not touch, in pixels.
_ROOM = 2.0


@dataclass(frozen=True, slots=True)
class Label:
    """A text at a point of the data."""

    text: str
    x: float
    y: float


def place_labels(
    axes: Axes,
    labels: Sequence[Label],
    *,
    points: Sequence[tuple[float, float]],
    curves: Sequence[Sequence[tuple[float, float]]] = (),
) -> list[Annotation]:
    """Writes each label where it hides the least, never on a curve, or not at all.

    Args:
        axes: Drawn with their final limits.
        labels: The more important ones first.
        points: Points that are drawn, in the data's units.
        curves: Lines that no label may touch, in the data's units.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    side = 2 * _POINT * figure.dpi / 72
    places: list[tuple[float, float]] = [tuple(axes.transData.transform(p)) for p in points]
    taken = [Bbox.from_bounds(x - side / 2, y - side / 2, side, side) for x, y in places]
    lines = [Outline(axes.transData.transform(list(curve))) for curve in curves if len(curve) > 1]
    written = []
    for label in labels:
        best, least = None, math.inf
        own = tuple(axes.transData.transform((label.x, label.y)))
        for place in _PLACES:
            text = _write(axes, label, place)
            box = extent(text)
            cost = _cost(box, taken, lines, axes.bbox)
            if any(_distance(box, other) < _distance(box, own) - 1e-6 for other in places):
                cost += _MISTAKEN
            if cost < least - 1e-6:
                if best is not None:
                    best.remove()
                best, least = text, cost
            else:
                text.remove()
            if not least:
                break
        if best is not None and least > _MOST_HIDDEN:
            best.remove()
        elif best is not None:
            taken.append(extent(best))
            written.append(best)
    return written


def extent(text: Annotation) -> Bbox:
    """The box of a label's words, without the line to its point."""
    text.get_window_extent()  # finds its place
    return Text.get_window_extent(text)


def _cost(box: Bbox, taken: Sequence[Bbox], lines: Sequence[Outline], frame: Bbox) -> float:
    """Share of a label that hides something or is cut off; infinite on a line."""
    roomy = box.padded(_ROOM)
    if any(line.intersects_bbox(roomy, filled=False) for line in lines):
        return math.inf
    area = box.width * box.height or 1.0
    hidden = sum(_overlap(box, other) for other in taken)
    return (hidden + area - _overlap(box, frame)) / area


def _distance(box: Bbox, point: Sequence[float]) -> float:
    """Distance of a point from the nearest edge of a label, 0 inside it."""
    x, y = point
    return math.hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1))


def _write(axes: Axes, label: Label, place: tuple[float, float, str, str]) -> Annotation:
    dx, dy, ha, va = place
    line: Any = None
    if math.hypot(dx, dy) > 15:
        # From afar a label shows its point.
        line = {"arrowstyle": "-", "color": EDGE, "lw": 0.7, "shrinkA": 1, "shrinkB": _POINT}
    text = axes.annotate(
        label.text, (label.x, label.y), xytext=(dx, dy), textcoords="offset points",
        ha=ha, va=va, fontsize=9, color=TEXT, zorder=6, arrowprops=line,
    )  # fmt: skip
    # The axes keep their size whatever is written beside them.
    text.set_in_layout(False)
    return text


def _places() -> tuple[tuple[float, float, str, str], ...]:
    """Places of a label around its point, the most readable first."""
    found = []
    for far in (1.0, 2.0, 3.2, 5.0):
        found += [
            (9 * far, -4 * far, "left", "top"), (9 * far, 4 * far, "left", "bottom"),
            (-9 * far, 4 * far, "right", "bottom"), (-9 * far, -4 * far, "right", "top"),
            (0, -10 * far, "center", "top"), (0, 10 * far, "center", "bottom"),
            (5 * far, -9 * far, "left", "top"), (-5 * far, -9 * far, "right", "top"),
            (-5 * far, 9 * far, "right", "bottom"), (5 * far, 9 * far, "left", "bottom"),
        ]  # fmt: skip
    return tuple(found)


_PLACES = _places()


def _overlap(one: Bbox, other: Bbox) -> float:
    width: float = min(one.x1, other.x1) - max(one.x0, other.x0)
    height: float = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(0.0, width) * max(0.0, height)
