"""Field of a settings schema: a default with its help text and the rule that a value must meet."""

from dataclasses import field
from typing import Any

LARGEST_SEED = 2**32 - 1


def setting(default: Any, help: str, *, unit: str | None = None, **rule: Any) -> Any:
    """A field with its help text and the rule that its value must meet.

    Args:
        default: The value when nothing is set.
        help: One plain sentence, shown by ``--help``, by completion and in ``docs/settings.md``.
        unit: Of the number, where it is one.
        **rule: ``choices``; the bounds ``least``, ``above``, ``most``, ``below``; or ``expected``,
            a description of what a check in ``validation.py`` accepts.
    """
    about = {"help": help} | ({} if unit is None else {"unit": unit}) | rule
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata=about)
    return field(default=default, metadata=about)
