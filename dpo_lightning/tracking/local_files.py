"""Loggers that write files into the run's folder: csv and TensorBoard, by Lightning's own."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from dpo_lightning.tracking import wandb_runs
from dpo_lightning.tracking.lasting import Destination
from dpo_lightning.tracking.rows import Known, Row, metrics_of
from dpo_lightning.tracking.tracked import COLUMNS, TrackedRun, flat, measured_last, plain

EVENTS = "tensorboard"
"""Folder of TensorBoard's files in that of a run."""

# A table is written again at each flush; csv is read after the run, as a rule.
_CSV_SECONDS = 1.0


class CsvTable(Destination):
    """``csv/metrics.csv`` in the run's folder."""

    kind, remade = "csv", True

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._written = 0.0
        self._logger: CSVLogger | None = None

    @property
    def experiment(self) -> Any:
        """Lightning's writer."""
        return None if self._logger is None else self._logger.experiment

    def open(self) -> Known:
        """Begins the table anew."""
        folder = self._run.folder / "csv"
        for name in ("metrics.csv", "hparams.yaml"):
            (folder / name).unlink(missing_ok=True)
        self._logger = CSVLogger(save_dir=self._run.folder, name="", version="csv")
        self._logger.log_hyperparams(dict(flat(self._run.config)))
        self.is_open = True
        return {}

    def write(self, rows: Sequence[Row]) -> None:
        """Writes rows."""
        assert self._logger is not None
        for row in rows:
            self._logger.log_metrics(dict(metrics_of(row)), row["step"])
        if time.monotonic() - self._written >= _CSV_SECONDS:
            self._logger.save()
            self._written = time.monotonic()

    def close(self, summary: Mapping[str, Any], exit_code: int) -> str | None:
        """Writes what is left."""
        assert self._logger is not None
        self._logger.save()
        return None


class EventFiles(Destination):
    """TensorBoard's event files, ``tensorboard/`` in the run's folder."""

    kind, remade = "tensorboard", True

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._logger: TensorBoardLogger | None = None
        self._last_step = 0
        self._names: set[str] = set()

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer."""
        return None if self._logger is None else self._logger.experiment

    def open(self) -> Known:
        """Begins the files anew: a reader would show a step of two files twice."""
        from torch.utils.tensorboard.summary import hparams

        folder = self._run.folder / EVENTS
        for path in folder.glob("events.out.tfevents.*"):
            path.unlink()
        self._logger = TensorBoardLogger(
            self._run.folder, name="", version=EVENTS, default_hp_metric=False
        )
        config = {name: plain(value) for name, value in flat(self._run.config)}
        config |= self._run.facts
        writer = self._logger.experiment._get_file_writer()
        # Names of the columns; their values are the scalars of these names.
        for summary in hparams(config, dict.fromkeys(COLUMNS, 0.0)):
            writer.add_summary(summary)
        self._logger.experiment.flush()
        self.is_open = True
        return {}

    def write(self, rows: Sequence[Row]) -> None:
        """Writes rows, each at the time at which it was measured."""
        writer = self.experiment
        for row in rows:
            for name, value in metrics_of(row).items():
                writer.add_scalar(name, value, row["step"], walltime=row["time"])
                self._names.add(name)
            self._last_step = max(self._last_step, row["step"])
        writer.flush()

    def write_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a table as Markdown."""
        lines = [_cells(columns), _cells(["---"] * len(columns)), *map(_cells, rows)]
        self.experiment.add_text(name, "\n".join(lines), self._last_step)

    def close(self, summary: Mapping[str, Any], exit_code: int) -> str | None:
        """Writes what was measured once at the end, and closes the files."""
        for name, value in measured_last(summary, self._names).items():
            self.experiment.add_scalar(name, value, self._last_step)
        self.experiment.flush()
        self.experiment.close()
        folder = self._run.folder / EVENTS
        return f"tensorboard --logdir {shlex.quote(wandb_runs.short_path(folder))}"


def _cells(cells: Sequence[Any]) -> str:
    texts = (" ".join(str(cell).replace("|", "\\|").split()) for cell in cells)
    return f"| {' | '.join(texts)} |"
