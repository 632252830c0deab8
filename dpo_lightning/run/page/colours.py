"""Colours of a page's figures, light and dark, as variables of its CSS. Imports no matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

TEXT, SOFT, EDGE, GRID, PAPER, SHADE, MARK = (
    *("#1f2937", "#4b5563", "#6b7280", "#e4e6ea", "#ffffff", "#9ca3af", "#d55e01"),
)
COMMON = {
    TEXT: ("figure-text", "#e5e7eb"),
    SOFT: ("figure-soft", "#aab2bf"),
    EDGE: ("figure-edge", "#8b95a3"),
    GRID: ("figure-grid", "#2c3746"),
    PAPER: ("figure-paper", "#111827"),
    SHADE: ("figure-shade", "#6b7280"),
    MARK: ("figure-mark", "#fdba74"),
}
"""Each with its dark counterpart, by the name of the page's variable."""

# Okabe and Ito's colours, told apart by all readers; the yellow is too light for lines on white,
# and black and blue are too dark for lines on black. Plain black is what SVG leaves out.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#111111", "#8c564b")
DARK = ("#4aa3df", "#f0883e", "#2fc493", "#e3a3c6", "#a5dcf7", "#f5b93a", "#f3f4f6", "#c49c94")


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


def variables(colours: Colours, *, dark: bool) -> str:
    """The page's variables of one scheme, as CSS declarations."""
    found = {name: other if dark else light for light, (name, other) in COMMON.items()}
    found |= {colour.name: colour.dark if dark else colour.light for colour in colours.values()}
    return " ".join(f"--{name}: {value};" for name, value in found.items())
