"""Progress of long phases: a bar of one line on a terminal, else a line of the log now and then."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from dpo_lightning.processes.phases import Say

log = logging.getLogger(__name__)

# How often a log has a line of a phase.
_SAY_SECONDS = 30.0
_LONGEST_BAR, _SHORTEST_BAR = 40, 4
# Columns that words, counts and times of a phase may take.
_BESIDE = 50


class Phases:
    """Shows phases one after the other; see :class:`~dpo_lightning.processes.phases.ShowPhase`.

    Args:
        console: The terminal of a bar; None: there is none, and lines are said.
        say: Takes such a line; None: the log does.
    """

    def __init__(
        self, console: Console | None, *, say: Callable[[str], object] | None = None
    ) -> None:
        self._console = console
        self._say = say or log.info

    @classmethod
    def on_stderr(cls) -> Phases:
        """Phases of a command, whose answer alone is on stdout."""
        console = Console(stderr=True) if sys.stderr.isatty() else None
        return cls(console, say=lambda line: print(line, file=sys.stderr, flush=True))

    @contextlib.contextmanager
    def __call__(self, name: str, *, total: int, unit: str, done: int = 0) -> Iterator[Say]:
        """Shows a phase until the end of the block.

        Args:
            name: One word, such as ``sampling``.
            total: All that is to be done.
            unit: Word for what is counted, in the plural.
            done: Part of it that was there before.

        Yields:
            Takes how much is done by now.
        """
        if self._console is None:
            yield _Lines(name, unit, done, total, self._say).say
            return
        width = self._console.width
        strip = BarColumn(bar_width(width, beside=_BESIDE))
        columns = (
            TextColumn("{task.description}"),
            strip,
            MofNCompleteColumn(),
            TextColumn(unit + "{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
        )
        with RichProgress(*columns, console=self._console) as bar:
            task = bar.add_task(name, total=total, completed=done, note="")

            def say(now: int, note: str = "") -> None:
                beside = f", {note}" if note else ""
                strip.bar_width = bar_width(width, beside=_BESIDE + len(beside))
                bar.update(task, completed=now, note=beside)

            yield say


def bar_width(width: int, *, beside: int) -> int:
    """Columns of a bar on a terminal.

    Args:
        width: Columns of the terminal.
        beside: Those that text beside the bar may take.
    """
    return max(_SHORTEST_BAR, min(_LONGEST_BAR, width - beside))


class _Lines:
    """Lines of a phase.

    Args:
        name: The phase.
        unit: Word for what is counted.
        begun: Part that was there before.
        total: All that is to be done.
        write: Takes a line.
    """

    def __init__(
        self, name: str, unit: str, begun: int, total: int, write: Callable[[str], object]
    ) -> None:
        self._write = write
        self._name = name
        self._unit = unit
        self._begun = begun
        self._total = total
        self._start = self._said = time.monotonic()

    def say(self, done: int, note: str = "") -> None:
        """Says a line, if the last one is long ago."""
        now = time.monotonic()
        if now - self._said < _SAY_SECONDS or done in (self._begun, self._total):
            return
        self._said = now
        left = (now - self._start) / (done - self._begun) * (self._total - done)
        beside = f", {note}" if note else ""
        self._write(f"{self._name}: {done} of {self._total} {self._unit}{beside}, {left:.0f}s left")
