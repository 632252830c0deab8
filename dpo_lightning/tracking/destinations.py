"""Loggers beside ``metrics.jsonl``: wandb, TensorBoard, mlflow and csv, each by Lightning's own.

All of them show the rows of ``metrics.jsonl``, under the same names over the same steps.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.files import finite, hold_lock
from dpo_lightning.tracking import wandb_runs
from dpo_lightning.tracking.lasting import Destination, LastingLogger
from dpo_lightning.tracking.logger_settings import LoggerSettings
from dpo_lightning.tracking.rows import Known, Row, metrics_of

EVENTS = "tensorboard"
"""Folder of TensorBoard's files in that of a run."""

_PROJECT = "dpo-lightning"
_STORE = "sqlite:///outputs/mlflow.db"
_MLFLOW_ID = Path("mlflow", "id.txt")
# What mlflow takes in one message, and of the value of a parameter.
_BATCH = 1000
_LONGEST = 500
# A table is written again at each flush; csv is read after the run, as a rule.
_CSV_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as its loggers know it.

    Attributes:
        name: Its name.
        folder: Its folder.
        config: The resolved settings.
        facts: What tells runs apart in a plot: ``model``, ``loss``, ``beta``, ``lr``, ``seed``.
        earlier: Folder of the run that it goes on with exactly; None where it is another one.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    earlier: Path | None = None


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
        config = {name: _plain(value) for name, value in flat(self._run.config)}
        config |= self._run.facts
        writer = self._logger.experiment._get_file_writer()
        # Names of the columns; their values are the scalars of these names.
        for summary in hparams(config, dict.fromkeys(_COLUMNS, 0.0)):
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
        for name, value in _measured_last(summary, self._names).items():
            self.experiment.add_scalar(name, value, self._last_step)
        self.experiment.flush()
        self.experiment.close()
        folder = self._run.folder / EVENTS
        return f"tensorboard --logdir {shlex.quote(wandb_runs.short_path(folder))}"


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
        config = {name: str(_plain(value))[:_LONGEST] for name, value in flat(self._run.config)}
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
        if measured := _measured_last(last, self._names):
            row = {"step": self._last_step, "epoch": None, "time": time.time(), **measured}
            self.write([row])
        stopped = exit_code in (130, 143)
        self._logger.finalize("KILLED" if stopped else "failed" if exit_code else "success")
        local = _database(self._uri) is not None
        shown = f"mlflow ui --backend-store-uri {shlex.quote(self._uri)}" if local else self._uri
        return f"{shown} (run {self._logger.run_id})"


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


# Columns that runs are compared by; each is free of beta.
_COLUMNS = (
    *("eval/rewards/accuracies", "eval/logratios/margins", "controlled/expected_reward"),
    *("controlled/kl_policy_reference", "samples/kl"),
)
_SHORT = {
    "accuracy": ("eval/rewards/accuracies",),
    "margin": ("eval/logratios/margins",),
    "reward": ("controlled/expected_reward", "samples/judge"),
    "kl": ("controlled/kl_policy_reference", "samples/kl"),
}
"""Short names of what a plot over runs shows, and the metrics that they are the first of."""


def summary_of(facts: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """A run as one row of a table: its facts, short names free of beta, all of its metrics.

    Args:
        facts: As in :class:`TrackedRun`.
        metrics: The last value of every metric.
    """
    short = {
        name: metrics[found]
        for name, others in _SHORT.items()
        if (found := next((other for other in others if other in metrics), None)) is not None
    }
    return {**metrics, **short, **facts}


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted key, as they are typed.

    Args:
        config: The settings, sections in sections.
        prefix: Key of the section, with its dot.
    """
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _plain(value: Any) -> Any:
    """A value that a table of settings takes: a number, a text or a truth value."""
    return value if isinstance(value, str | int | float | bool) else str(value)


def _measured_last(summary: Mapping[str, Any], names: set[str]) -> dict[str, float]:
    """Metrics of the run as a whole that no row has."""
    return {
        name: value
        for name, value in summary.items()
        if "/" in name and name not in names and isinstance(value, int | float)
    }


def _cells(cells: Sequence[Any]) -> str:
    texts = (" ".join(str(cell).replace("|", "\\|").split()) for cell in cells)
    return f"| {' | '.join(texts)} |"


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
