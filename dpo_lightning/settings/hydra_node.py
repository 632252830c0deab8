"""Checks of Hydra's own part of a config: allowed targets, folders and log handlers.

Hydra calls whatever a ``_target_`` names, and Python's logging whatever a ``class`` does. Config
files are passed around, so only what is installed as a plugin of Hydra, and the usual handlers, may
be named in them; code of one's own comes in by ``plugins=``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf

from dpo_lightning import name_now
from dpo_lightning.settings.credentials import refusal, secrets_in
from dpo_lightning.settings.messages import shown
from dpo_lightning.settings.names import slug

_LOGGING = frozenset(
    {
        *("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler"),
        *("logging.handlers.RotatingFileHandler", "logging.handlers.TimedRotatingFileHandler"),
        *("logging.Formatter", "colorlog.ColoredFormatter"),
        "dpo_lightning.tracking.terminal.HidingFormatter",
        "dpo_lightning.tracking.terminal.LogFile",
        "dpo_lightning.tracking.terminal.TerminalHandler",
    }
)
_STREAMS = frozenset({"ext://sys.stdout", "ext://sys.stderr"})


def hydra_problems(node: DictConfig) -> Iterator[str]:
    """Yields the faults of Hydra's own node, one clause each.

    Args:
        node: As it was composed; what only exists inside a job need not resolve.
    """
    raw = OmegaConf.to_container(node, resolve=False)
    assert isinstance(raw, dict)
    own = {key: raw[key] for key in raw if key not in ("overrides", "runtime", "help", "choices")}
    yield from map(refusal, dict.fromkeys(secrets_in(own, "hydra")))
    yield from _targets(own, "hydra", _known_targets())
    for part in ("launcher", "sweeper"):
        if not isinstance(own.get(part), dict):
            yield f"hydra.{part}={shown(own.get(part))}: choose one with hydra/{part}="
    for section in ("job_logging", "hydra_logging"):
        yield from _logging(own.get(section), f"hydra.{section}")
    job, subdir = own.get("job") or {}, own.get("output_subdir")
    name = job.get("name")
    if isinstance(name, str) and name != "???" and name != slug(name):
        yield (
            f"hydra.job.name={shown(name)}: it is the name of the log file in the run's folder; "
            f"must be one such as {slug(name)}"
        )
    if isinstance(subdir, str) and not _is_inside(subdir):
        yield f"hydra.output_subdir={shown(subdir)}: must be a folder inside the run's"
    within = (own.get("sweep") or {}).get("subdir")
    if isinstance(within, str) and not _is_inside(within):
        yield f"hydra.sweep.subdir={shown(within)}: must be a folder inside the sweep's"


def _is_inside(path: str) -> bool:
    parts = PurePath(path)
    return bool(path) and not parts.is_absolute() and ".." not in parts.parts


def _known_targets() -> frozenset[str]:
    """Targets that the installed launchers, sweepers and samplers registered."""
    found: set[str] = set()

    def collect(value: Any) -> None:
        if isinstance(value, ConfigNode):
            value = OmegaConf.to_container(value.node, resolve=False)
        if isinstance(value, dict):
            target = value.get("_target_")
            found.update([target] if isinstance(target, str) else [])
            for item in value.values():
                collect(item)

    collect(ConfigStore.instance().repo.get("hydra"))
    return frozenset(found)


def _targets(value: Any, key: str, known: frozenset[str]) -> Iterator[str]:
    if isinstance(value, dict):
        target = value.get("_target_")
        if target is not None and target not in known:
            yield (
                f"{key}._target_={shown(target)}: no setting names code to call; choose with "
                "hydra/launcher= and hydra/sweeper= among what is installed, and load your own "
                "with plugins=[<module>]"
            )
        for name, item in value.items():
            yield from _targets(item, f"{key}.{name}", known)
    elif isinstance(value, list):
        for item in value:
            yield from _targets(item, key, known)


def _by_new_name(item: Any) -> Any:
    """Replaces a name from before the package's modules moved by the new one."""
    return (name_now(item) or item) if isinstance(item, str) else item


def _logging(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name in ("class", "()", "factory") and _by_new_name(item) not in _LOGGING:
                yield f"{key}.{name}={shown(item)}: must be one of {', '.join(sorted(_LOGGING))}"
            yield from _logging(item, f"{key}.{name}")
    elif isinstance(value, list):
        for item in value:
            yield from _logging(item, key)
    elif (
        isinstance(value, str) and value.startswith(("ext://", "cfg://")) and value not in _STREAMS
    ):
        yield f"{key}={shown(value)}: must be one of {', '.join(sorted(_STREAMS))}"
