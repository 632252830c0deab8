"""Blocks of code of a page, and the markers of those that a test does not run."""

from __future__ import annotations

import re
from dataclasses import dataclass

_BLOCK = re.compile(
    r"(?:^ *<!-- not run: (?P<why>[^\n]*?) -->\n)?"
    r"^(?P<indent> *)```(?P<kind>\w*)\n(?P<body>.*?)^(?P=indent)```",
    flags=re.S | re.M,
)
_MARKER = re.compile(r"<!--\s*not run\b")


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a page.

    Attributes:
        kind: The word behind its fence, such as ``sh``; empty where there is none.
        body: Its lines, without the indent of a list that it stands in.
        why: Reason of the marker above it; None where it has none.
        line: Number of its first line on the page.
    """

    kind: str
    body: str
    why: str | None
    line: int

    @property
    def file(self) -> str | None:
        """Name of the file that its first line, a comment, says it is; None where it is none."""
        named = re.match(r"# ([\w./]+\.(?:py|yaml))\b", self.body)
        return named[1] if named else None


def blocks(page: str) -> list[Block]:
    """The blocks of a page in their order, those in lists too.

    Args:
        page: Its text.
    """
    return [
        Block(
            found["kind"],
            re.sub(rf"^{found['indent']}", "", found["body"], flags=re.M),
            found["why"],
            page.count("\n", 0, found.start("body")) + 1,
        )
        for found in _BLOCK.finditer(page)
    ]


def stray_markers(page: str) -> int:
    """Number of markers that stand above no block, and so keep nothing from being run.

    Args:
        page: Its text.
    """
    return len(_MARKER.findall(page)) - sum(block.why is not None for block in blocks(page))
