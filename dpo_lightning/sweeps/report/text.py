"""Numbers and texts for a reader. Texts come from data sets: none may act as markup."""

from __future__ import annotations

import html
import os
import re
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from dpo_lightning.settings.program import typed
from dpo_lightning.sweeps.report.read import is_hydra_word, override_key, override_value

MISSING = "–"
LONGEST_TEXT = 400
_LONGEST_VALUE = 32


class Markdown(str):
    """Text that is Markdown already."""

    __slots__ = ()


def label_of(settings: Iterable[str], beta: float | None) -> str:
    """Swept settings in short, such as ``β 0.1, lr 1e-05``.

    Args:
        settings: The overrides, without the seed.
        beta: Names the trial where nothing but the seed was swept.
    """
    parts = []
    for line in settings:
        key = override_key(line)
        short = "β" if key == "beta" else key.rpartition(".")[2] or key
        value = override_value(line) if "=" in line else "removed"
        # Of a path, which is what long values are, the end says more.
        if len(value) > _LONGEST_VALUE:
            value = f"…{value[-_LONGEST_VALUE:]}"
        parts.append(f"{short} {value}")
    if not parts:
        return "all settings" if beta is None else f"β {beta:g}"
    return clean(", ".join(parts))


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


def error_text(mean: float | None, stderr: float | None) -> str:
    """``0.842 ± 0.012``: the value to the digit that its error reaches; an error of 0 is exact."""
    if mean is None:
        return MISSING
    if not stderr:
        return number_text(mean, 3 if stderr is None else 4)
    exponent = int(f"{stderr:.1e}".partition("e")[2])
    decimals = min(8, max(0, 1 - exponent))
    return f"{mean:.{decimals}f} ± {stderr:.{decimals}f}".replace("-", "−")


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


def own_words(command: str) -> str:
    """A trial's command as this user would type it, without what only the launcher adds."""
    try:
        words = shlex.split(command)
    except ValueError:
        return clean(command)
    if words[:2] == ["python", "train.py"]:
        words[:2] = typed()
    kept = [word for word in words if word != "resume=auto" and not is_hydra_word(word)]
    return clean(shlex.join(kept))


def address(path: str) -> str:
    """A relative path as a link; one that is not text, by its bytes as far as it has any."""
    try:
        return quote(os.fsencode(path))
    except UnicodeEncodeError:
        return quote(path, errors="replace")


def escape_markdown(value: object) -> str:
    """Escapes a text for a line or a table cell of Markdown, so that nothing in it is markup."""
    if isinstance(value, Markdown):
        return value
    text = html.escape(clean(str(value)), quote=False)
    text = re.sub(r"([\\`*_{}\[\]#|~$])", r"\\\1", text)
    return re.sub(r"[ \t]*\n\s*", "<br>", text)


def code_block(lines: Sequence[str]) -> Markdown:
    """A fenced block, with a fence longer than any that the lines hold."""
    text = "\n".join(lines)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markdown(f"{fence}sh\n{text}\n{fence}")
