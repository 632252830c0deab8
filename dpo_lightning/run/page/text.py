"""Numbers and texts for a reader of a page. Texts come from data sets: none may act as markup."""

from __future__ import annotations

import os
import unicodedata
from urllib.parse import quote

MISSING = "–"
LONGEST_TEXT = 400


def number_text(value: float | None, digits: int = 3) -> str:
    """A number with a given number of significant digits and a real minus sign."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if 10**digits <= abs(value) < 1e6:
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.{digits}g}".rstrip(".")
    return text.replace("-", "−")


def range_text(low: float | None, high: float | None) -> str:
    """``0.82 to 0.87``, empty where it is unknown or has no width."""
    if low is None or high is None or low == high:
        return ""
    return f"{number_text(low)} to {number_text(high)}"


def seconds_text(seconds: float) -> str:
    """A duration in the unit that a reader would use: ``45 s``, ``12 min``, ``3.4 h``."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def clean(text: str) -> str:
    """Removes control characters and halves of characters, which no file can hold."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs"))


def cut(text: object, longest: int = LONGEST_TEXT, *, keep_end: bool = False) -> str:
    """Cuts a text to a length; of a prompt it keeps the end, which says more."""
    whole = clean(text).strip() if isinstance(text, str) else ""
    if len(whole) <= longest:
        return whole
    return f"…{whole[-longest:].lstrip()}" if keep_end else f"{whole[:longest].rstrip()}…"


def address(path: str) -> str:
    """A relative path as a link; one that is not text, by its bytes as far as it has any."""
    try:
        return quote(os.fsencode(path))
    except UnicodeEncodeError:
        return quote(path, errors="replace")
