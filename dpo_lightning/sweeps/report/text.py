"""Numbers and texts for a reader. Texts come from data sets: none may act as markup."""

from __future__ import annotations

import html
import re
import shlex
from collections.abc import Iterable, Sequence

from dpo_lightning.run.page.text import MISSING, clean, number_text
from dpo_lightning.settings.program import typed
from dpo_lightning.sweeps.report.read import is_hydra_word, override_key, override_value

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


def error_text(mean: float | None, stderr: float | None) -> str:
    """``0.842 ± 0.012``: the value to the digit that its error reaches; an error of 0 is exact."""
    if mean is None:
        return MISSING
    if not stderr:
        return number_text(mean, 3 if stderr is None else 4)
    exponent = int(f"{stderr:.1e}".partition("e")[2])
    decimals = min(8, max(0, 1 - exponent))
    return f"{mean:.{decimals}f} ± {stderr:.{decimals}f}".replace("-", "−")


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
