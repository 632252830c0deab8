"""Settings in words: the list that ``--help`` ends with, and ``docs/settings.md``.

``python -m dpo_lightning.settings.page`` prints the page.
"""

import textwrap
from collections.abc import Iterator
from typing import Any, get_type_hints

from dpo_lightning.settings.keys import Setting, settings
from dpo_lightning.settings.messages import expected, shown
from dpo_lightning.settings.schema import Config

_INTRODUCTION = """\
# Settings

Every key of an experiment, made from the schema by `make docs`. Type `key=value` behind
`python train.py`; `-m key=a,b` sweeps a key. What is not typed has the default given here, or what
a file of `conf/` says: `python train.py --cfg job` shows the outcome.
"""


def _shown(value: Any) -> str:
    return f"[{','.join(map(shown, value))}]" if isinstance(value, list) else shown(value)


def _leaves() -> Iterator[tuple[str, Setting]]:
    return ((key, setting) for key, setting in settings().items() if not setting.is_section)


def settings_help() -> str:
    """Each key with its default and its sentence, for a terminal.

    Dollar signs are doubled: Hydra takes what it prints as a template.
    """
    wrapper = textwrap.TextWrapper(
        100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
    )
    lines = []
    for key, setting in _leaves():
        lines.append(f"{key}={_shown(setting.default)}")
        lines += wrapper.wrap(setting.help)
    return "\n".join(lines).replace("$", "$$")


def settings_page() -> str:
    """Markdown of ``docs/settings.md``: a table for each section, in the order of the schema."""
    sections: dict[str, list[str]] = {}
    for key, setting in _leaves():
        cells = (
            f"`{key}`",
            expected(setting),
            f"`{_shown(setting.default)}`",
            setting.unit or "–",
            setting.help,
        )
        row = " | ".join(cell.replace("|", "\\|") for cell in cells)
        sections.setdefault(key.rpartition(".")[0], []).append(f"| {row} |")
    parts = [_INTRODUCTION]
    for section, rows in sections.items():
        title = f"## `{section}`" if section else "## The experiment"
        about = _first_line(section)
        head = ["| key | value | default | unit | meaning |", "|---|---|---|---|---|"]
        parts.append("\n".join([title, "", about, "", *head, *rows, ""]))
    return "\n".join(parts)


def _first_line(section: str) -> str:
    """First line of the docstring of a section's class."""
    kind: Any = Config
    for name in filter(None, section.split(".")):
        kind = get_type_hints(kind)[name]
    return (kind.__doc__ or "").partition("\n")[0]


if __name__ == "__main__":
    print(settings_page(), end="")
