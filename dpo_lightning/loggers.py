"""Where metrics go: metrics.jsonl always, and wandb or csv files where the user wants them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.results import finite
from dpo_lightning.wandb_runs import STEP, LoggerSettings, finish_run, start_run


class JsonlLogger(Logger):
    """Appends each row of metrics to ``metrics.jsonl``, flushed, and keeps the last of each.

    A row is ``{"step", "epoch", "time", ...metrics}``; ``step`` counts the optimizer steps
    completed and ``time`` is in seconds since the epoch.

    Args:
        folder: The run's folder.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / "metrics.jsonl"
        self.last: dict[str, float] = {}

    @property
    def name(self) -> str:
        """Lightning asks every logger for one."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Lightning asks every logger for one."""
        return ""

    @rank_zero_only
    def start(self, step: int) -> None:
        """Keeps the rows up to ``step`` of a file that is continued, and none of another run."""
        rows = []
        if step and self.path.exists():
            for line in self.path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # torn by whatever ended that run
                if isinstance(row.get("step"), int) and row["step"] <= step:
                    rows.append(line)
                    metrics = {k: v for k, v in row.items() if k not in ("step", "epoch", "time")}
                    self.last |= metrics
        staged = self.path.with_name(f".{self.path.name}")
        staged.write_text("".join(f"{line}\n" for line in rows))
        staged.replace(self.path)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Writes one row."""
        values = dict(metrics)
        epoch = values.pop("epoch", None)
        self.last |= values
        row = {"step": step, "epoch": epoch, "time": round(time.time(), 3), **values}
        with self.path.open("a") as file:
            file.write(json.dumps(finite(row), allow_nan=False) + "\n")

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration has files of its own."""


def make_logger(
    settings: LoggerSettings,
    *,
    run_name: str,
    folder: Path,
    config: Mapping[str, Any],
    continued: bool,
) -> Logger | None:
    """Makes the chosen logger; wandb's run is started here, on rank 0 alone.

    Args:
        settings: The ``logger`` group.
        run_name: Name of the run.
        folder: The run's folder.
        config: The resolved configuration.
        continued: Whether the run goes on from where the folder's last one was.

    Raises:
        UserError: If wandb cannot start even offline.
    """
    if settings.name == "none" or settings.mode == "disabled" or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return None
    if settings.name == "csv":
        return CSVLogger(save_dir=folder, name="", version="csv")
    run = start_run(settings, run_name=run_name, folder=folder, config=config, continued=continued)
    if run is None:
        return None
    # Axes are defined before anything is logged: later, it has no effect on what is there.
    run.define_metric(STEP)
    for prefix in ("train", "eval", "controlled", "samples"):
        run.define_metric(f"{prefix}/*", step_metric=STEP)
    return WandbLogger(experiment=run)


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
