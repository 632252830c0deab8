"""Last lines of a run: where its model is, how to try it, how to compare it."""

from __future__ import annotations

import shlex
from pathlib import Path

from dpo_lightning.run.finished import EXPORT
from dpo_lightning.settings.program import typed

OTHER = "OTHER_RUN"
"""Stands for a run that the user names."""


def closing_lines(run: Path, *, merged: Path | None, profile: Path | None) -> dict[str, str]:
    """The lines by their names; commands are as this user would type them.

    Args:
        run: The run's folder.
        merged: The export with its adapter added in; None where there is none.
        profile: Folder of a profiler's tables and traces; None where there is none.
    """
    folder = _near(run)
    lines = {"model": str(folder / EXPORT)}
    if merged is not None:
        lines["merged"] = str(_near(merged))
    lines["try it"] = shlex.join([*typed("chat"), str(folder)])
    lines["compare"] = shlex.join([*typed("compare"), str(folder), OTHER])
    if profile is not None:
        lines["profile"] = str(_near(profile))
    return lines


def _near(path: Path) -> Path:
    """A path as it is typed here: from the working folder, if it lies below."""
    try:
        return path.absolute().relative_to(Path.cwd())
    except ValueError:
        return path
