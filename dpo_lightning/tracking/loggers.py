"""The logger of ``metrics.jsonl``, which every run has; what others show is made from its rows."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.files import METRICS_FILE, finite, write_whole
from dpo_lightning.tracking.rows import row_of

log = logging.getLogger(__name__)


class JsonlLogger(Logger):
    """Appends each row of metrics to ``metrics.jsonl``, flushed, and keeps the last of each.

    A disk that is full does not end the run: rows wait in memory until they can be written.

    A row is ``{"step", "epoch", "time", ...metrics}``; ``step`` counts the optimizer steps
    completed and ``time`` is in seconds since the epoch.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / METRICS_FILE
        self.last: dict[str, float] = {}
        # The newest step and how many rows it has.
        self._newest = (0, 0)
        self._unwritten: list[bytes] = []
        self._kept = b""
        self._held_back = False

    def hold_back(self) -> None:
        """Writes nothing until :meth:`go_on`: the file is an earlier run's as yet."""
        self._held_back = True

    def kept(self) -> bytes:
        """The rows that stay of an earlier run, once the training has started."""
        return self._kept

    def go_on(self) -> None:
        """Writes from now on; :meth:`kept` is in the file."""
        self._held_back = False
        if self._unwritten:
            self._write()

    def rows(self) -> list[dict[str, Any]]:
        """All rows of the run so far, those too that wait to be written."""
        lines = [*self._lines(), *self._unwritten]
        return [row for row in map(row_of, lines) if row is not None]

    @property
    def name(self) -> str:
        """Name of the logger, which Lightning asks for."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Version of the logger, which Lightning asks for."""
        return ""

    def rows_of(self, step: int) -> int:
        """Number of rows that the newest step has."""
        newest, rows = self._newest
        return rows if newest == step else 0

    @rank_zero_only
    def start(self, step: int, *, rows: int = 0, last: Mapping[str, float] | None = None) -> None:
        """Keeps the rows that a checkpoint knew of, and none where there is no checkpoint.

        Args:
            step: Optimizer steps completed.
            rows: Number of rows of that step; any more come again, such as those of an evaluation.
            last: The last value of every metric.
        """
        kept: list[bytes] = []
        newest = damaged = 0
        for line in self._lines() if step else ():
            row = row_of(line)
            if row is None:
                damaged += 1
                continue
            newest += row["step"] == step
            if row["step"] < step or (row["step"] == step and newest <= rows):
                kept.append(line)
        if damaged:
            log.warning(
                "%s: %d of its lines cannot be read, so they are left out: cut short by whatever "
                "ended that run, or damaged since",
                *(self.path, damaged),
            )
        self.last |= last or {}
        self._newest = (step, rows)
        self._kept = b"".join(line + b"\n" for line in kept)
        if not self._held_back:
            write_whole(self.path, self._kept)

    def _lines(self) -> list[bytes]:
        try:
            return [line for line in self.path.read_bytes().split(b"\n") if line.strip()]
        except FileNotFoundError:
            return []

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes one row."""
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        self.last |= values
        row = {"step": step, "epoch": epoch, "time": round(time.time(), 3), **values}
        self._newest = (step or 0, self.rows_of(step or 0) + 1)
        self._unwritten.append(f"{json.dumps(finite(row), allow_nan=False)}\n".encode())
        self._write()

    def _write(self) -> None:
        """Appends the missing rows to the file: whole ones, or nothing where they do not fit."""
        if self._held_back:
            return
        try:
            with self.path.open("ab", buffering=0) as file:
                end = file.seek(0, os.SEEK_END)
                rows = b"".join(self._unwritten)
                try:
                    if file.write(rows) < len(rows):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError:
                    file.truncate(end)
                    raise
        except OSError as error:
            if len(self._unwritten) == 1:
                log.warning(
                    "%s cannot be written (%s): the run continues, rows wait in memory until it can"
                    " be",
                    self.path,
                    error.strerror or error,
                )
        else:
            self._unwritten.clear()

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the configuration has files of its own."""
