"""Colours of a report's figures, light and dark, and figures as parts of the page.

Figures are drawn in light colours. As SVG inside the page each colour becomes a CSS variable, which
the page sets for either scheme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dpo_lightning.sweeps.report.pooling import Configuration

TEXT, SOFT, EDGE, GRID, PAPER, SHADE, MARK = (
    *("#1f2937", "#4b5563", "#6b7280", "#e4e6ea", "#ffffff", "#9ca3af", "#d55e01"),
)
# Each with its dark counterpart; names of the page's variables.
_COMMON = {
    TEXT: ("figure-text", "#e5e7eb"),
    SOFT: ("figure-soft", "#aab2bf"),
    EDGE: ("figure-edge", "#8b95a3"),
    GRID: ("figure-grid", "#2c3746"),
    PAPER: ("figure-paper", "#111827"),
    SHADE: ("figure-shade", "#6b7280"),
    MARK: ("figure-mark", "#fdba74"),
}
STYLE: Any = {
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.edgecolor": EDGE,
    "axes.labelcolor": TEXT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": TEXT,
    "legend.frameon": False,
    # Data sets' texts never reach a figure, settings' values do: no mathematics out of a dollar.
    "text.parse_math": False,
    "svg.hashsalt": "dpo-lightning",
}
"""Settings of matplotlib that all figures are drawn with."""

# Okabe and Ito's colours, told apart by all readers; the yellow is too light for lines on white,
# and black and blue are too dark for lines on black. Plain black is what SVG leaves out.
_LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#111111", "#8c564b")
_DARK = ("#4aa3df", "#f0883e", "#2fc493", "#e3a3c6", "#a5dcf7", "#f5b93a", "#f3f4f6", "#c49c94")


@dataclass(frozen=True, slots=True)
class Colour:
    """The colour of a configuration in every figure.

    Attributes:
        light: Its colour on white.
        dark: Its colour on a dark page.
        name: Name of the page's variable.
    """

    light: str
    dark: str
    name: str


Colours = Mapping[str, Colour]


def colours_of(configurations: Sequence[Configuration]) -> dict[str, Colour]:
    """A colour per label: along a scale where only beta differs, else told apart."""
    betas = [c.beta for c in configurations]
    known = [beta for beta in betas if beta is not None and beta > 0]
    if len(known) == len(betas) == len(set(betas)) and len(known) > 1:
        scale = colormaps["viridis"]
        low, high = math.log(min(known)), math.log(max(known))
        places = [(math.log(beta) - low) / (high - low) for beta in known]
        # Its light end is hard to see on white, its dark end on black.
        pairs = [(to_hex(scale(0.88 * x)), to_hex(scale(0.3 + 0.7 * x))) for x in places]
    else:
        count = len(_LIGHT)
        pairs = [(_LIGHT[i % count], _DARK[i % count]) for i in range(len(configurations))]
    return {
        c.label: Colour(light, dark, f"series-{number}")
        for number, (c, (light, dark)) in enumerate(zip(configurations, pairs, strict=True))
    }


def variables(colours: Colours, *, dark: bool) -> str:
    """The page's variables of one scheme, as CSS declarations."""
    found = {name: other if dark else light for light, (name, other) in _COMMON.items()}
    found |= {colour.name: colour.dark if dark else colour.light for colour in colours.values()}
    return " ".join(f"--{name}: {value};" for name, value in found.items())


def png(figure: Figure) -> bytes:
    """A figure as a PNG, in light colours."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def inline_svg(
    figure: Figure, name: str, *, says: str, colours: Colours, tips: Mapping[str, str] | None = None
) -> str:
    """A figure as an element of the page.

    Args:
        figure: The figure.
        name: Told apart from the other figures of the page, whose ids are theirs.
        says: Text for who cannot see it.
        colours: The colours of configurations.
        tips: Text that appears over a part of the figure, by the part's id.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    for part in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<style[^>]*>.*?</style>"):
        text = re.sub(rf"\s*{part}", "", text, flags=re.S)
    box = re.search(r'viewBox="([^"]*)"', text)
    assert box is not None
    head = f'<svg viewBox="{box.group(1)}" role="img" aria-label="{escape(says)}">'
    text = head + text[text.index(">") + 1 :]
    # A hundredth of a point cannot be seen, and more digits make a large page.
    text = re.sub(r'\bd="[^"]*"', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found.group()), text)
    text = re.sub(r'style="[^"]*"', lambda found: _themed(found.group(), colours), text)
    for part, tip in (tips or {}).items():
        text = text.replace(f'<g id="{part}">', f'<g id="{part}"><title>{escape(tip)}</title>')
    # Ids of two figures of one page must differ.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    return re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)


def _themed(style: str, colours: Colours) -> str:
    """The same style with variables for colours; the light ones stay for who knows no variables."""
    names = {colour.light: colour.name for colour in reversed(list(colours.values()))}
    names |= {light: name for light, (name, _) in _COMMON.items()}
    return re.sub(
        r"#[0-9a-f]{6}",
        lambda found: f"var(--{names[c]}, {c})" if (c := found.group()) in names else c,
        style,
    )
