"""Loggers of metrics: metrics.jsonl always, and wandb or csv files where the user wants them."""

from __future__ import annotations

import errno
import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.files import finite, json_object, write_whole
from dpo_lightning.tracking.wandb_runs import (
    STEP,
    LoggerSettings,
    finish_run,
    note_run,
    start_run,
    untag_pruned,
)

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
        self.path = folder / "metrics.jsonl"
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
            row = _row(line)
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


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics; None for a line that is none."""
    row = json_object(line)
    return row if row is not None and type(row.get("step")) is int else None


class _PatientCsvLogger(CSVLogger):
    """Lightning's csv logger, which leaves an earlier run's file until it may write.

    Args:
        folder: The run's folder.
        when_begun: Calls a function when that is so.
    """

    def __init__(self, folder: Path, when_begun: Callable[[Callable[[], None]], None]) -> None:
        super().__init__(save_dir=folder, name="", version="csv")
        self._begun = False
        self._waiting: list[tuple[dict[str, float], int | None]] = []
        when_begun(self._begin)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:  # type: ignore[override]
        """Logs a row, or keeps it until then."""
        if self._begun:
            super().log_metrics({**metrics}, step)
        else:
            self._waiting.append((dict(metrics), step))

    @rank_zero_only
    def save(self) -> None:
        """Writes the file, if it may."""
        if self._begun:
            super().save()

    def _begin(self) -> None:
        self._begun = True
        for metrics, step in self._waiting:
            self.log_metrics(metrics, step)
        self._waiting.clear()


class _LastingWandbLogger(WandbLogger):
    """Lightning's wandb logger, except that the end of wandb's process does not end the run."""

    _failed = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Hands a row of metrics to wandb, or says once that it takes none."""
        try:
            super().log_metrics(metrics, step)
        except Exception as error:  # of its own process, pipes and files
            if not self._failed:
                self._failed = True
                log.warning("wandb refuses metrics (%s); metrics.jsonl has all of them", error)


def make_logger(
    settings: LoggerSettings,
    *,
    run_name: str,
    folder: Path,
    config: Mapping[str, Any],
    continued: bool,
    run_id: str | None = None,
    when_begun: Callable[[Callable[[], None]], None],
) -> Logger | None:
    """Makes the chosen logger; wandb's run is started here, on rank 0 alone.

    Args:
        settings: The ``logger`` group.
        run_name: Name of the run.
        folder: The run's folder.
        config: The resolved configuration.
        continued: True if the run goes on from where the folder's last one was.
        run_id: The run in wandb that it goes on with where the folder has none.
        when_begun: Calls what writes over an earlier run's files, once it may.

    Raises:
        UserError: If wandb cannot start even offline.
    """
    if settings.name == "none" or settings.mode == "disabled" or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return None
    if settings.name == "csv":
        return _PatientCsvLogger(folder, when_begun)
    run = start_run(
        settings,
        run_name=run_name,
        folder=folder,
        config=config,
        continued=continued,
        run_id=run_id,
    )
    if run is None:
        return None
    when_begun(lambda: note_run(folder, run.id))
    when_begun(lambda: untag_pruned(run, folder))
    # Axes are defined before anything is logged: later, it has no effect on what is there.
    run.define_metric(STEP)
    for prefix in ("train", "eval", "controlled", "samples"):
        run.define_metric(f"{prefix}/*", step_metric=STEP)
    return _LastingWandbLogger(experiment=run)


def logger_run_id(logger: Logger | None) -> str | None:
    """The id of the run in wandb, if there is one."""
    return logger.experiment.id if isinstance(logger, WandbLogger) else None


def log_table(
    logger: Logger | None, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Logs a table where the logger has tables."""
    if isinstance(logger, WandbLogger):
        logger.log_table(key=name, columns=list(columns), data=[list(row) for row in rows])


def finish_logger(
    logger: Logger | None, *, summary: Mapping[str, Any], exit_code: int
) -> str | None:
    """Ends wandb's run, however the run ended, and returns how to find it.

    Args:
        logger: The logger, or None.
        summary: Values for the run's summary.
        exit_code: Exit code of the run.
    """
    if not isinstance(logger, WandbLogger):
        return None
    return finish_run(logger.experiment, summary=summary, exit_code=exit_code)
