"""Where metrics go: metrics.jsonl always, and wandb or csv files where the user wants them.

wandb is reached through here alone.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from dpo_lightning.errors import UserError
from dpo_lightning.results import finite

log = logging.getLogger(__name__)

# Everything is drawn over optimizer steps.
_STEP = "trainer/global_step"


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


@dataclass(frozen=True, slots=True)
class LoggerSettings:
    """The ``logger`` group."""

    name: str
    project: str
    entity: str | None
    mode: str
    tags: tuple[str, ...]
    group: str | None


def make_logger(
    settings: LoggerSettings, *, run_name: str, folder: Path, config: Mapping[str, Any]
) -> Logger | None:
    """Makes the chosen logger; wandb's run is started here, on rank 0 alone.

    Args:
        settings: The ``logger`` group.
        run_name: Name of the run.
        folder: The run's folder.
        config: The resolved configuration.

    Raises:
        UserError: If wandb cannot start even offline.
    """
    if settings.name == "none" or settings.mode == "disabled" or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return None
    if settings.name == "csv":
        return CSVLogger(save_dir=folder, name="", version="csv")
    import wandb

    def start(mode: Any) -> Any:
        return wandb.init(
            mode=mode,
            project=settings.project,
            entity=settings.entity,
            name=run_name,
            group=settings.group,
            tags=list(settings.tags),
            dir=folder,
            config=dict(config),
            resume="allow",
            settings=wandb.Settings(silent=True, init_timeout=60),
        )

    try:
        mode = wandb_mode(settings.mode)
        if mode == "disabled":
            return None
        try:
            run = start(mode)
        except wandb.Error:
            if mode != "online" or settings.mode == "online":
                raise
            log.info("wandb: the server refused this run, so it is recorded offline")
            run = start("offline")
    except Exception as error:  # whatever its environment, files and settings hold
        raise UserError(
            f"logger=wandb: {' '.join(str(error).split())}; logger.mode=offline records it here, "
            "logger=csv or logger=none goes without"
        ) from error
    # Axes are defined before anything is logged: later, it has no effect on what is there.
    run.define_metric(_STEP)
    for prefix in ("train", "eval", "controlled"):
        run.define_metric(f"{prefix}/*", step_metric=_STEP)
    return WandbLogger(experiment=run)


def wandb_mode(mode: str) -> str:
    """Resolves ``logger.mode=auto``: online when logged in and the server answers, else offline.

    ``WANDB_MODE`` in the environment decides first, as users of wandb expect.
    """
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        return os.environ["WANDB_MODE"]
    import wandb

    if not wandb.login(prompt=False, verify=False):
        log.info("wandb: not logged in, so this run is recorded offline (wandb login changes that)")
        return "offline"
    server = urlparse(wandb.setup().settings.base_url)
    port = server.port or (443 if server.scheme == "https" else 80)
    try:
        socket.create_connection((server.hostname or "", port), timeout=3).close()
    except OSError:
        log.info("wandb: %s does not answer, so this run is recorded offline", server.hostname)
        return "offline"
    return "online"


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
    run = logger.experiment
    run.summary.update(dict(summary))
    where = f"wandb sync {run.settings.sync_dir}" if run.offline else run.url
    run.finish(exit_code=exit_code)
    return str(where)
