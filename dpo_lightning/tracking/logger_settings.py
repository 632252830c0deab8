"""The ``logger`` group as plain values. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_lightning.settings.logger_group import chosen_loggers
from dpo_lightning.settings.schema import LoggerConfig


@dataclass(frozen=True, slots=True)
class LoggerSettings:
    """Loggers and their settings.

    Attributes:
        names: The loggers beside ``metrics.jsonl``, in their order.
        project: Project in wandb, experiment in mlflow; None leaves it to the environment.
        entity: User or team in wandb; None leaves it to the environment.
        mode: Of wandb: ``auto``, ``online``, ``offline`` or ``disabled``.
        tags: Tags; none leave them to the environment.
        group: Group; None leaves it to the environment.
        run_name: Name of the run that was set; None leaves it to the environment.
        tracking_uri: Store or server of mlflow; None leaves it to the environment.
        log_model: True if loggers that hold models get the export.
    """

    names: tuple[str, ...]
    project: str | None
    entity: str | None
    mode: str
    tags: tuple[str, ...]
    group: str | None
    run_name: str | None = None
    tracking_uri: str | None = None
    log_model: bool = False


def logger_settings(config: LoggerConfig, *, run_name: str | None = None) -> LoggerSettings:
    """The ``logger`` group as plain values.

    Args:
        config: The group.
        run_name: The name that was set.
    """
    return LoggerSettings(
        names=chosen_loggers(config),
        project=config.project,
        entity=config.entity,
        mode=config.mode,
        tags=tuple(config.tags),
        group=config.group,
        run_name=run_name,
        tracking_uri=config.tracking_uri,
        log_model=config.log_model,
    )
