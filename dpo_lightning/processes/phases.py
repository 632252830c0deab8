"""Long phases of a program, and whoever shows how far they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol


class Say(Protocol):
    """Takes how much of a phase is done by now."""

    def __call__(self, now: int, note: str = "", /) -> None:
        """Shows it.

        Args:
            now: How much is done.
            note: Some words beside it, such as a rate.
        """


class ShowPhase(Protocol):
    """Shows a phase: a bar, lines of a log, or nothing."""

    def __call__(
        self, name: str, *, total: int, unit: str, done: int = 0
    ) -> contextlib.AbstractContextManager[Say]:
        """Context of the phase.

        Args:
            name: One word, such as ``sampling``.
            total: All that is to be done.
            unit: Word for what is counted, in the plural.
            done: Part of it that was there before.
        """


@contextlib.contextmanager
def unshown(name: str, *, total: int, unit: str, done: int = 0) -> Iterator[Say]:
    """Shows nothing; see :class:`ShowPhase`."""
    yield lambda now, note="": None
