"""Loggers beside ``metrics.jsonl``: wandb, TensorBoard, mlflow and csv, each by Lightning's own.

All of them show the rows of ``metrics.jsonl``, under the same names over the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.tracking import wandb_runs
from dpo_lightning.tracking.lasting import Destination, LastingLogger
from dpo_lightning.tracking.local_files import CsvTable, EventFiles
from dpo_lightning.tracking.logger_settings import LoggerSettings
from dpo_lightning.tracking.mlflow_runs import MlflowRun
from dpo_lightning.tracking.rows import Known, Row, metrics_of
from dpo_lightning.tracking.tracked import TrackedRun


class WandbRun(Destination):
    """A run in wandb, which is begun before the training.

    Args:
        run: wandb's run.
        known: Values that an earlier session of it has logged.
    """

    kind, is_open, at_once = "wandb", True, 1

    def __init__(self, run: Any, known: Known) -> None:
        self._logger = WandbLogger(experiment=run)
        self._known = known

    @property
    def experiment(self) -> Any:
        """The run in wandb."""
        return self._logger.experiment

    def open(self) -> Known:
        """The values that it has."""
        return self._known

    def write(self, rows: Sequence[Row]) -> None:
        """Writes rows."""
        for row in rows:
            self._logger.log_metrics(metrics_of(row), row["step"])

    def write_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a table."""
        data = [list(row) for row in rows]
        self._logger.log_table(key=name, columns=list(columns), data=data)

    def keep_model(self, folder: Path) -> None:
        """Takes in an exported model, as an artifact."""
        wandb_runs.keep_model(self.experiment, folder)

    def close(self, summary: Mapping[str, Any], exit_code: int) -> str | None:
        """Ends the run."""
        return wandb_runs.finish_run(self.experiment, summary=summary, exit_code=exit_code)


class RunLoggers:
    """All loggers of a run but that of ``metrics.jsonl``; none on ranks that write nothing.

    Args:
        loggers: The loggers.
    """

    def __init__(self, loggers: Sequence[LastingLogger]) -> None:
        self.all = list(loggers)

    @property
    def wandb_run_id(self) -> str | None:
        """The id of the run in wandb, if there is one."""
        ids = [x.experiment.id for x in self.all if isinstance(x.destination, WandbRun)]
        return ids[0] if ids else None

    def write_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a table of texts."""
        for logger in self.all:
            logger.write_table(name, columns, rows)

    def keep_model(self, folder: Path) -> None:
        """Keeps an exported model with the run."""
        for logger in self.all:
            logger.keep_model(folder)

    def finish(self, summary: Mapping[str, Any], *, exit_code: int) -> dict[str, str]:
        """Ends the run in all of them, however it ended; how to find it, by logger.

        Args:
            summary: Values that stand for the run as a whole.
            exit_code: Exit code of the run.
        """
        found = {x.name: x.finish(summary, exit_code=exit_code) for x in self.all}
        return {name: where for name, where in found.items() if where is not None}


def make_loggers(
    settings: LoggerSettings,
    run: TrackedRun,
    *,
    rows: Callable[[], Sequence[Row]],
    wandb_run_id: str | None = None,
    when_begun: Callable[[Callable[[], None]], None],
) -> RunLoggers:
    """Makes the chosen loggers, on rank 0 alone; wandb's run is started here.

    Args:
        settings: The ``logger`` group.
        run: The run.
        rows: Gives all rows of ``metrics.jsonl`` by now.
        wandb_run_id: The run in wandb that it goes on with where the folder has none.
        when_begun: Calls what writes into the run's folder, once it may.

    Raises:
        UserError: If wandb cannot start even offline.
    """
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return RunLoggers([])
    places: list[Destination] = []
    for name in settings.names:
        if name == "wandb":
            begun = _begin_wandb(settings, run, wandb_run_id, when_begun)
            places += [] if begun is None else [begun]
        elif name == "tensorboard":
            places.append(EventFiles(run))
        elif name == "mlflow":
            places.append(MlflowRun(run, settings))
        else:
            places.append(CsvTable(run))
    loggers = [LastingLogger(place, rows) for place in places]
    for logger in loggers:
        when_begun(logger.begin)
    return RunLoggers(loggers)


def _begin_wandb(
    settings: LoggerSettings,
    run: TrackedRun,
    run_id: str | None,
    when_begun: Callable[[Callable[[], None]], None],
) -> WandbRun | None:
    """The run in wandb, or None where wandb is switched off."""
    started = wandb_runs.start_logged(
        settings,
        run_name=run.name,
        folder=run.folder,
        config={**run.config, "lr": run.facts["lr"]},
        facts=run.facts,
        earlier=run.earlier,
        run_id=run_id,
    )
    if started is None:
        return None
    found, known = started
    when_begun(lambda: wandb_runs.note_run(run.folder, found.id))
    when_begun(lambda: wandb_runs.untag_pruned(found, run.folder))
    return WandbRun(found, known)
