"""Runs in mlflow's store or server, by Lightning's own logger."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import MLFlowLogger

from dpo_lightning.files import finite, hold_lock
from dpo_lightning.tracking.lasting import Destination
from dpo_lightning.tracking.logger_settings import LoggerSettings
from dpo_lightning.tracking.rows import Known, Row, metrics_of
from dpo_lightning.tracking.tracked import TrackedRun, flat, measured_last, plain

_PROJECT = "dpo-lightning"
_STORE = "sqlite:///outputs/mlflow.db"
_MLFLOW_ID = Path("mlflow", "id.txt")
# What mlflow takes in one message, and of the value of a parameter.
_BATCH = 1000
_LONGEST = 500


class MlflowRun(Destination):
    """A run in mlflow's store or server; one that is resumed exactly goes on there.

    Args:
        run: The run.
        settings: The ``logger`` group.
    """

    kind = "mlflow"

    def __init__(self, run: TrackedRun, settings: LoggerSettings) -> None:
        self._run = run
        self._settings = settings
        self._uri = settings.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or _STORE
        self._logger: MLFlowLogger | None = None
        self._run_id: str | None = None
        self._last_step = 0
        self._names: set[str] = set()

    @property
    def experiment(self) -> Any:
        """The client of mlflow."""
        return None if self._logger is None else self._logger.experiment

    def open(self) -> Known:
        """Begins a run, or goes on with that of the checkpoint's."""
        import mlflow  # noqa: F401, which sets the level of its messages

        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        # A server that is gone must not hold the steps up for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        with _alone_in(self._uri):
            self._logger = self._begin()
        client, run_id = self._logger.experiment, str(self._logger.run_id)
        self._run_id = run_id
        path = self._run.folder / _MLFLOW_ID
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{run_id}\n")
        found = client.get_run(run_id)
        if found.info.status != "RUNNING":
            client.update_run(run_id, status="RUNNING")
        config = {name: str(plain(value))[:_LONGEST] for name, value in flat(self._run.config)}
        config |= {name: str(value) for name, value in self._run.facts.items()}
        # A parameter cannot be changed: what a resumed run has otherwise is in its config.yaml.
        new = {name: value for name, value in config.items() if name not in found.data.params}
        self._logger.log_hyperparams(new)
        self.is_open = True
        return self._history(client, run_id, found.data.metrics)

    def _begin(self) -> MLFlowLogger:
        """Lightning's logger, whose run there is."""
        settings = self._settings
        project = settings.project or os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT
        group = settings.group or os.environ.get("WANDB_RUN_GROUP")
        tags = dict.fromkeys(settings.tags, "true") | ({} if group is None else {"group": group})
        logger = MLFlowLogger(
            experiment_name=project,
            run_name=self._run.name,
            tracking_uri=self._uri,
            tags=tags,
            run_id=self._run_id or self._continued(project),
        )
        assert logger.run_id is not None  # it is made when it is asked for
        return logger

    def _continued(self, project: str) -> str | None:
        """The id of the run to go on with, if the store has it; makes the experiment else."""
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        client = MlflowClient(self._uri)
        if self._run.earlier is not None:
            try:
                run_id = (self._run.earlier / _MLFLOW_ID).read_text().strip()
                return str(client.get_run(run_id).info.run_id)
            except (OSError, MlflowException):
                pass  # it was recorded elsewhere, or not at all: a new run gets all rows
        if client.get_experiment_by_name(project) is None:
            path = _database(self._uri)
            place = None if path is None else (path.parent / "mlartifacts").absolute().as_uri()
            try:
                client.create_experiment(project, artifact_location=place)
            except MlflowException:
                # Another run may have made it by now; if not, what follows says why.
                if client.get_experiment_by_name(project) is None:
                    raise
        return None

    def _history(self, client: Any, run_id: str, names: Sequence[str]) -> Known:
        known: dict[tuple[int, str], float | None] = {}
        for name in names:
            for metric in client.get_metric_history(run_id, name):
                known[metric.step, name] = finite(metric.value)
                self._last_step = max(self._last_step, metric.step)
        self._names |= {*names}
        return known

    def write(self, rows: Sequence[Row]) -> None:
        """Writes rows, each at the time at which it was measured."""
        from mlflow.entities import Metric

        assert self._logger is not None
        metrics = [
            Metric(_mlflow_name(name), value, int(row["time"] * 1000), row["step"])
            for row in rows
            for name, value in metrics_of(row).items()
        ]
        for start in range(0, len(metrics), _BATCH):
            batch = metrics[start : start + _BATCH]
            self.experiment.log_batch(self._logger.run_id, metrics=batch)
        self._names |= {metric.key for metric in metrics}
        self._last_step = max(self._last_step, *(row["step"] for row in rows))

    def write_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a table as a JSON file."""
        assert self._logger is not None
        table = {"columns": list(columns), "data": [list(row) for row in rows]}
        self.experiment.log_dict(self._logger.run_id, table, f"{name}.json")

    def keep_model(self, folder: Path) -> None:
        """Takes in an exported model."""
        assert self._logger is not None
        self.experiment.log_artifacts(self._logger.run_id, str(folder), "model")

    def close(self, summary: Mapping[str, Any], exit_code: int) -> str | None:
        """Writes what was measured once at the end, and ends the run."""
        assert self._logger is not None
        last = {_mlflow_name(name): value for name, value in summary.items()}
        if measured := measured_last(last, self._names):
            row = {"step": self._last_step, "epoch": None, "time": time.time(), **measured}
            self.write([row])
        stopped = exit_code in (130, 143)
        self._logger.finalize("KILLED" if stopped else "failed" if exit_code else "success")
        local = _database(self._uri) is not None
        shown = f"mlflow ui --backend-store-uri {shlex.quote(self._uri)}" if local else self._uri
        return f"{shown} (run {self._logger.run_id})"


def _mlflow_name(name: str) -> str:
    """A metric's name with the characters that mlflow takes."""
    return re.sub(r"[^\w/. -]+", "_", name, flags=re.ASCII)


def _database(uri: str) -> Path | None:
    """The file of a local database; None for a server."""
    return Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None


def _alone_in(uri: str) -> contextlib.AbstractContextManager[None]:
    """A context in which no other run makes the tables of a local database."""
    path = _database(uri)
    if path is None:
        return contextlib.nullcontext()
    return hold_lock(path.with_name(f"{path.name}.lock"), on_wait=lambda: None)
