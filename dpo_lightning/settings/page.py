"""Settings in words: what ``--help`` and ``--help-all`` print, and ``docs/settings.md``.

``python -m dpo_lightning.settings.page`` prints the page.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_type_hints

from dpo_lightning.settings.keys import Setting, settings
from dpo_lightning.settings.messages import expected, shown
from dpo_lightning.settings.program import completion
from dpo_lightning.settings.schema import Config

_INTRODUCTION = """\
# Settings

Every key of an experiment, made from the schema by `make docs`. Type `key=value` behind
`python train.py`; `-m key=a,b` sweeps a key. What is not typed has the default given here, or what
a file of `conf/` says: `python train.py --cfg job` shows the outcome.
"""

FIRST_KEYS = {
    "model.pretrained": "model.pretrained",
    "data.train": "data.train",
    "data.eval": "data.eval",
    "data.max_length": "data.max_length",
    "data.batch_size": "data.batch_size",
    "beta": "beta",
    "loss": "loss.name",
    "peft": "peft.kind",
    "optimizer.lr": "optimizer.lr",
    "trainer.max_epochs": "trainer.max_epochs",
    "seed": "seed",
    "logger": "logger.name",
}
"""The settings that matter first, as they are typed, and the keys that say what they mean."""

_WRAPPER = textwrap.TextWrapper(
    100, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
)


def _shown(value: Any) -> str:
    return f"[{','.join(map(shown, value))}]" if isinstance(value, list) else shown(value)


def _leaves() -> Iterator[tuple[str, Setting]]:
    return ((key, setting) for key, setting in settings().items() if not setting.is_section)


def settings_help() -> str:
    """Each key with its default and its sentence, for a terminal.

    Dollar signs are doubled: Hydra takes what it prints as a template.
    """
    return "\n".join(line for key, own in _leaves() for line in _entry(key, own)).replace("$", "$$")


def _entry(key: str, setting: Setting) -> list[str]:
    return [f"{key}={_shown(setting.default)}", *_WRAPPER.wrap(setting.help)]


def first_help(header: str, groups: Iterable[str], options_of: Callable[[str], list[str]]) -> str:
    """Text of ``--help``: the settings that matter first, and the choices of each group.

    Args:
        header: First lines, with examples.
        groups: Config groups.
        options_of: The choices of one.
    """
    known = settings()
    wrapper = textwrap.TextWrapper(100, subsequent_indent="    ", break_on_hyphens=False)
    lines = [header, f"The {len(FIRST_KEYS)} settings that matter first, with their defaults:", ""]
    for typed, key in FIRST_KEYS.items():
        lines += _entry(typed, known[key])
    lines += ["", "Choices of each group, as group=choice:", ""]
    for group in groups:
        options = options_of(group)
        if len(options) > 1:
            lines += wrapper.wrap(f"{group}: {', '.join(options)}")
    lines += [
        "",
        "--help-all lists all settings, --cfg job shows what a command line comes to, --hydra-help",
        "lists Hydra's own flags; docs/settings.md has types and units of all settings.",
        *([] if (line := completion()) is None else [f"Completion in bash: {line}"]),
    ]
    return "\n".join(lines)


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
    names = [f"[`{name}`](#{name.replace('.', '')})" for name in sections if name]
    contents = " · ".join(["[the experiment](#the-experiment)", *names])
    parts = [_INTRODUCTION, f"{contents}\n"]
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
