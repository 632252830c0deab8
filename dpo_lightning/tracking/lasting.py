"""Loggers that take part in no failure: rows wait until they are taken, and each is taken once."""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.files import finite
from dpo_lightning.settings.credentials import redact
from dpo_lightning.tracking.rows import FACTS, Known, Row

log = logging.getLogger(__name__)

# A server that is gone is not asked again at every step.
_RETRY_SECONDS = 60.0


class Destination:
    """A place that rows of metrics go to, beside ``metrics.jsonl``.

    Attributes:
        kind: Name of the logger.
        remade: True if opening empties it, so that all rows are written anew.
        at_once: Most rows of one call.
        is_open: True once there is something to close.
    """

    kind = ""
    remade = False
    at_once = 500
    is_open = False

    @property
    def experiment(self) -> Any:
        """The library's own object, for callbacks of plugins."""
        raise NotImplementedError

    def open(self) -> Known:
        """Opens it, with the run's config; returns the values that it has already."""
        raise NotImplementedError

    def write(self, rows: Sequence[Row]) -> None:
        """Writes rows, in their order."""
        raise NotImplementedError

    def write_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a table of texts, where it has such."""

    def keep_model(self, folder: Path) -> None:
        """Takes in an exported model, where it holds such."""

    def close(self, summary: Mapping[str, Any], exit_code: int) -> str | None:
        """Ends the run there; returns how to find it."""
        raise NotImplementedError


class LastingLogger(Logger):
    """Hands rows to a destination, from when the run may write; one that fails ends no run.

    Rows that are not taken wait, are tried again once a minute, and once more at the end.

    Args:
        destination: Where the rows go.
        rows: Gives all rows of ``metrics.jsonl`` by now.
        retry_seconds: Pause after a failure.
    """

    def __init__(
        self,
        destination: Destination,
        rows: Callable[[], Sequence[Row]],
        *,
        retry_seconds: float = _RETRY_SECONDS,
    ) -> None:
        super().__init__()
        self.destination = destination
        self._rows = rows
        self._retry_seconds = retry_seconds
        self._begun = False
        self._ready = False
        self._waiting: deque[Row] = deque()
        self._known: Known = {}
        self._next_try = 0.0
        self._has_failed = False

    @property
    def name(self) -> str:
        """Name of the logger, which Lightning asks for."""
        return self.destination.kind

    @property
    def version(self) -> str:
        """Version of the logger, which Lightning asks for."""
        return ""

    @property
    def experiment(self) -> Any:
        """The library's own object, for callbacks of plugins."""
        return self.destination.experiment

    def begin(self) -> None:
        """Opens the destination, which gets the rows that there are."""
        self._begun = True
        self._send()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hands a row on, once the run may write; until then ``metrics.jsonl`` keeps it."""
        if not self._begun:
            return
        if self._ready:
            values = dict(metrics)
            epoch = values.pop("epoch", None)
            row = {"step": step or 0, "epoch": epoch, "time": time.time(), **values}
            self._waiting.append(finite(row))
        self._send()

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: a destination gets the run's config when it is opened."""

    def _send(self, *, last: bool = False) -> None:
        """Sends what waits, unless the destination failed a moment ago."""
        if not self._begun or (not last and time.monotonic() < self._next_try):
            return
        try:
            if not self._ready:
                self._known = self.destination.open()
                # From here on rows come by themselves; those of before are in the file.
                self._waiting = deque(self._rows())
                self._ready = True
            while self._waiting:
                rows = list(itertools.islice(self._waiting, self.destination.at_once))
                if new := [left for row in rows if (left := self._without_known(row))]:
                    self.destination.write(new)
                for _ in rows:
                    self._waiting.popleft()
        except Exception as error:  # of servers, disks and libraries: no run is worth less for it
            self._fail(error)

    def _without_known(self, row: Row) -> Row | None:
        """The part of a row that the destination does not have yet; None where that is nothing."""
        if not self._known:
            return row
        step = row["step"]
        left = {
            name: value
            for name, value in row.items()
            if name in FACTS or self._known.get((step, name), ...) != value
        }
        return left if left.keys() - {*FACTS} else None

    def _fail(self, error: Exception) -> None:
        self._next_try = time.monotonic() + self._retry_seconds
        if self.destination.remade:
            self._ready = False
        if not self._has_failed:
            self._has_failed = True
            log.warning(
                "%s takes no metrics (%s): the run goes on, rows wait until it does, and "
                "metrics.jsonl has all of them",
                *(self.name, _in_words(error)),
            )

    def write_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Hands a table on."""
        self._try("has no table", lambda: self.destination.write_table(name, columns, rows))

    def keep_model(self, folder: Path) -> None:
        """Hands an exported model on."""
        self._try("does not hold the model", lambda: self.destination.keep_model(folder))

    def finish(self, summary: Mapping[str, Any], *, exit_code: int) -> str | None:
        """Ends the run there, however it ended, and returns how to find it.

        Args:
            summary: Values that stand for the run as a whole.
            exit_code: Exit code of the run.
        """
        if self._waiting or not self._ready:
            self._send(last=True)
        if self._begun and (self._waiting or not self._ready):
            log.warning(
                "%s lacks rows of metrics; metrics.jsonl has all of them",
                self.name,
            )
        found: list[str | None] = []
        self._try(
            "was not closed", lambda: found.append(self.destination.close(summary, exit_code))
        )
        return found[0] if found else None

    def _try(self, what: str, act: Callable[[], None]) -> None:
        if not self.destination.is_open:
            return
        try:
            act()
        except Exception as error:  # as above
            log.warning("%s %s (%s)", self.name, what, _in_words(error))


def _in_words(error: Exception) -> str:
    """An error on one line that is not endless, without secrets."""
    text = " ".join(str(error).split()) or type(error).__name__
    return redact(text if len(text) <= 200 else f"{text[:197]}...")
