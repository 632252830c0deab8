"""The ``logger`` group: which loggers are chosen, and what they need. Imports no torch.

``logger=[wandb,tensorboard]`` takes several files of the group. Each of them enters its own name
into one mapping, ``name: {wandb: true}``, so that none takes another's place.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from dpo_lightning.settings.conduct import LOGGERS, LoggerConfig

NONE = "none"
"""The choice of no logger but ``metrics.jsonl``."""

KEEPS_MODELS = ("wandb", "mlflow")
"""Loggers that can hold an exported model."""

_EXTRAS = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
"""Packages of the loggers that are extras of this project, by the extra's name."""


def logger_names(value: Any) -> tuple[str, ...]:
    """The loggers that ``logger.name`` names, in their order; empty where it names none.

    Args:
        value: A name, a list of names, or the mapping that the files of the group make.

    Raises:
        ValueError: If it is neither.

    Example:
        >>> logger_names("csv"), logger_names(["wandb", "csv"]), logger_names({"none": True})
        (('csv',), ('wandb', 'csv'), ('none',))
    """
    if isinstance(value, str):
        return (value,)
    if isinstance(value, dict) and all(chosen is True for chosen in value.values()):
        value = list(value)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return tuple(value)
    raise ValueError("no name, and no list of names")


def are_loggers(value: Any) -> bool:
    """True if ``logger.name`` names loggers that there are, each once."""
    try:
        names = logger_names(value)
    except ValueError:
        return False
    return 0 < len(names) == len({*names}) and {*names} <= {*LOGGERS}


def one_form(value: Any) -> str | list[str]:
    """The loggers as ``config.yaml`` has them: a name, or a list of several.

    Args:
        value: As for :func:`logger_names`.
    """
    names = logger_names(value)
    return names[0] if len(names) == 1 else [*names]


def chosen_loggers(config: LoggerConfig) -> tuple[str, ...]:
    """The loggers beside ``metrics.jsonl``; empty for ``none``.

    Args:
        config: The group, checked.
    """
    return tuple(name for name in logger_names(config.name) if name != NONE)


def logger_problems(config: LoggerConfig) -> Iterator[str]:
    """Yields what is wrong with the choice of loggers, one clause each.

    Args:
        config: The group, of which each value is valid by itself.
    """
    names = logger_names(config.name)
    typed = f"logger={names[0]}" if len(names) == 1 else f"logger=[{','.join(names)}]"
    if NONE in names and len(names) > 1:
        others = ",".join(name for name in names if name != NONE)
        yield f"{typed}: none is without any other; write logger=none or logger=[{others}]"
    for name in names:
        missing = [package for package in _EXTRAS.get(name, ()) if find_spec(package) is None]
        if missing:
            yield (
                f"{typed} needs {' and '.join(missing)}, which is not installed: "
                f'pip install "dpo-lightning[{name}]"'
            )
    if config.tracking_uri is not None and "mlflow" not in names:
        yield (
            f"logger.tracking_uri={config.tracking_uri} is for mlflow, and {typed}; leave it out, "
            "or add mlflow to the loggers"
        )
    if config.log_model and not {*KEEPS_MODELS} & {*names}:
        yield (
            f"logger.log_model=true: {typed} holds no models; add wandb or mlflow, or share the "
            "export by `push`"
        )
