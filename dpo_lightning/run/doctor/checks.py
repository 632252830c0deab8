"""A check of the machine: its outcome, and how one that raises becomes a line. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dpo_lightning.settings.credentials import redact

State = Literal["ok", "warning", "failed"]

# Characters of an error's text; the rest helps nobody in a table.
_LONGEST = 300


@dataclass(frozen=True, slots=True)
class Check:
    """Outcome of a check.

    Attributes:
        name: Its name.
        state: ``ok``, ``warning`` where a run works without it, else ``failed``.
        detail: What was found, in one line; what to do where something is wrong.
    """

    name: str
    state: State
    detail: str

    def as_dict(self) -> dict[str, Any]:
        """The outcome as ``--json`` prints it."""
        begins = "warning: " if self.state == "warning" else ""
        return {"name": self.name, "ok": self.state != "failed", "detail": begins + self.detail}


Finding = tuple[State, str]
"""State and detail of a check."""


def run_checks(checks: Iterable[tuple[str, Callable[[], Finding]]]) -> Iterator[Check]:
    """Runs checks one after the other; one that raises has failed, and the next one runs.

    Args:
        checks: Names, and what finds state and detail.
    """
    for name, find in checks:
        try:
            state, detail = find()
        except Exception as error:  # whatever a broken machine raises is what is asked for
            state, detail = "failed", f"{type(error).__name__}: {error}"
        yield Check(name, state, redact(" ".join(detail.split()))[:_LONGEST])
