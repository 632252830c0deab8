"""Answer of ``inspect`` in a terminal: coloured there, plain in a file or a pipe."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dpo_lightning.run.inspect.content import Bars, Fact, Passage, Section, TokenText

_STYLES = {
    "prompt": "dim",
    "note": "italic dim",
    "special": "bold magenta",
    "even": "green",
    "odd": "black on green",
}
_PLAIN = {"special": "⟦{}⟧", "even": "{}|", "odd": "{}|"}
_LABEL = 14
_BAR = 40
# Indent, label of a bar, its count, and what stands between them.
_BESIDE_BARS = 28


def show(parts: Iterable[Section], console: Console | None = None) -> None:
    """Prints the parts.

    Args:
        parts: The content.
        console: Where to; None is standard output.
    """
    with contextlib.suppress(AttributeError):
        # A pipe may have an encoding without some of the signs.
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    console = console or Console(highlight=False)
    coloured = console.color_system is not None
    for part in parts:
        console.print(Text(part.title, "bold"))
        for content in _contents(part, console.width, coloured=coloured):
            console.print(Padding(content, (0, 0, 0, 2)))
        console.print()


def _contents(part: Section, width: int, *, coloured: bool) -> Iterable[RenderableType]:
    if part.facts:
        yield _facts(part.facts)
    for bars in part.histograms:
        yield _histogram(bars, max(8, min(_BAR, width - _BESIDE_BARS)))
    for passage in part.passages:
        yield _passage(passage, coloured=coloured)


def _facts(facts: Sequence[Fact]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(max_width=_LABEL, no_wrap=True)
    table.add_column(overflow="fold")
    for fact in facts:
        table.add_row(Text(fact.label), Text(fact.value, "yellow" if fact.warns else ""))
    return table


def _histogram(bars: Bars, width: int) -> RenderableType:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for bar in bars.bars:
        # What is there is seen, however little it is.
        length = max(round(bar.share * width), int(bar.share > 0))
        table.add_row(Text(bar.label), Text("█" * length, "cyan"), Text(bar.count))
    return Group(Text(bars.title), table)


def _passage(passage: Passage, *, coloured: bool) -> RenderableType:
    text = Text(overflow="fold")
    for piece in passage.pieces:
        text.append(piece.text if coloured else _plain(piece), _STYLES[piece.kind])
    return Group(Text(passage.title, "underline"), text)


def _plain(piece: TokenText) -> str:
    """A piece with signs in the place of colours."""
    return _PLAIN.get(piece.kind, "{}").format(piece.text)
