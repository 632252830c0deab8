"""Colours of a report's figures, light and dark, and figures as parts of the page.

Figures are drawn in light colours. As SVG inside the page each colour becomes a CSS variable, which
the page sets for either scheme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from dpo_lightning.run.page.colours import (
    COMMON,
    DARK,
    EDGE,
    GRID,
    LIGHT,
    SOFT,
    TEXT,
    Colour,
    Colours,
)
from dpo_lightning.sweeps.report.pooling import Configuration

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
        count = len(LIGHT)
        pairs = [(LIGHT[i % count], DARK[i % count]) for i in range(len(configurations))]
    return {
        c.label: Colour(light, dark, f"series-{number}")
        for number, (c, (light, dark)) in enumerate(zip(configurations, pairs, strict=True))
    }


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
    names |= {light: name for light, (name, _) in COMMON.items()}
    return re.sub(
        r"#[0-9a-f]{6}",
        lambda found: f"var(--{names[c]}, {c})" if (c := found.group()) in names else c,
        style,
    )
