"""Text of unknown origin made safe to print: control characters become signs that can be seen."""

from __future__ import annotations

import unicodedata

_PICTURES = 0x2400
_DELETE = 0x7F
# Joiners inside of emoji and of words in many scripts; they move nothing.
_HARMLESS = frozenset("\u200c\u200d")
# Control, format, half of a character, not assigned, private, ends of lines and paragraphs.
_HIDDEN = frozenset(("Cc", "Cf", "Cs", "Cn", "Co", "Zl", "Zp"))


def visible(text: str, *, lines: bool = False) -> str:
    r"""A text whose control characters are signs.

    A terminal that is sent the result moves nowhere and changes nothing, and no character turns
    the direction of what stands behind it.

    Args:
        text: Any text.
        lines: True keeps ends of lines, behind a sign for each.

    Example:
        >>> visible("a\x1b[2J\tb\u202e")
        'a␛[2J␉b\\u202e'
    """
    if text.isprintable():
        return text
    return "".join(_shown(character, lines=lines) for character in text)


def _shown(character: str, *, lines: bool) -> str:
    if character.isprintable() or character in _HARMLESS:
        return character
    if character == "\n":
        return "⏎\n" if lines else "⏎"
    code = ord(character)
    if code < 0x20:
        return chr(_PICTURES + code)
    if code == _DELETE:
        return "␡"
    if unicodedata.category(character) in _HIDDEN:
        return f"\\u{code:04x}"
    return character  # a wide space is not printable, and does no harm
