"""Docstrings in Google's style as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator

_HEADS = ("Args", "Attributes", "Returns", "Yields", "Raises", "Example")
_LISTS = ("Args", "Attributes", "Raises")
_HEAD = re.compile(rf"^({'|'.join(_HEADS)}):\n", flags=re.M)
_ITEM = re.compile(r"^    (?=\S)", flags=re.M)


def summary_of(docstring: str) -> str:
    """First paragraph of a docstring, on one line.

    Args:
        docstring: Without the indent of its source.
    """
    return _inline(docstring.partition("\n\n")[0])


def markdown_of(docstring: str) -> str:
    """A docstring as Markdown: its paragraphs, then each of its sections.

    Args:
        docstring: Without the indent of its source.
    """
    text, *rest = _HEAD.split(docstring)
    parts = _paragraphs(text)
    for head, body in zip(rest[::2], rest[1::2], strict=True):
        inside, beyond = _parted(body)
        parts.append(f"**{head}**")
        if head == "Example":
            parts += _example(_unindented(inside))
        elif head in _LISTS:
            parts.append("\n".join(_items(inside)))
        else:
            parts += _paragraphs(_unindented(inside))
        parts += _paragraphs(beyond)
    return "\n\n".join(parts)


def _parted(body: str) -> tuple[str, str]:
    """The indented lines of a section, and the text that follows them."""
    lines = body.splitlines(keepends=True)
    end = next((n for n, line in enumerate(lines) if line.strip() and line[0] != " "), len(lines))
    return "".join(lines[:end]), "".join(lines[end:])


def _unindented(text: str) -> str:
    return re.sub(r"^    ", "", text, flags=re.M)


def _items(body: str) -> Iterator[str]:
    """An item of a list for each name: what it is, behind a colon."""
    for item in _ITEM.split(body)[1:]:
        name, _, says = item.partition(":")
        yield f"- `{name.strip()}`: {_inline(says)}"


def _example(text: str) -> Iterator[str]:
    """Lines that begin with Python's prompt as code, others as text."""
    for own in re.split(r"\n\s*\n", text.strip()):
        yield f"```pycon\n{own}\n```" if own.startswith(">>>") else _inline(own)


def _paragraphs(text: str) -> list[str]:
    return [_inline(own) for own in re.split(r"\n\s*\n", text) if own.strip()]


def _inline(text: str) -> str:
    """Words of one paragraph, with the marks of code that Markdown has."""
    words = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split()).replace("``", "`"))
    # Outside of code a star is a star, and no emphasis.
    parts = words.split("`")
    parts[::2] = [part.replace("*", "\\*") for part in parts[::2]]
    return "`".join(parts)
