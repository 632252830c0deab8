"""Checks of Hydra's own part of a config: allowed targets, folders and log handlers.

Hydra calls whatever a ``_target_`` names, and Python's logging whatever a ``class`` does. Config
files are passed around, so only what is installed as a plugin of Hydra, and the usual handlers, may
be named in them; code of one's own comes in by ``plugins=``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import PurePath
from typing import Any, get_type_hints

from hydra.conf import HydraConf
from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf

from dpo_lightning import name_now
from dpo_lightning.settings.credentials import refusal, secrets_in
from dpo_lightning.settings.messages import shown, unknown_key
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
# Variables by which a process loads code before its own.
_LOADED_BY = frozenset(
    {"PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP", "BASH_ENV", "ENV", "NODE_OPTIONS", "GCONV_PATH"}
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
    # A group of Hydra's without a field; its only choice is empty.
    yield from _unknown({str(k): own[k] for k in own if k != "env"}, HydraConf, "hydra")
    yield from _targets(own, "hydra", _known_targets())
    for part in ("launcher", "sweeper"):
        if not isinstance(own.get(part), dict):
            yield f"hydra.{part}={shown(own.get(part))}: choose one with hydra/{part}="
        else:
            yield from _unknown_to_plugin(own[part], f"hydra.{part}")
    for section in ("job_logging", "hydra_logging"):
        yield from _logging(own.get(section), f"hydra.{section}")
    job, subdir = own.get("job") or {}, own.get("output_subdir")
    for variable in job.get("env_set") or {} if isinstance(job.get("env_set"), dict) else ():
        upper = str(variable).upper()
        if upper in _LOADED_BY or upper.startswith(("LD_", "DYLD_")):
            yield (
                f"hydra.job.env_set.{variable}: it decides which code is loaded, which no setting "
                "does; set it in the shell"
            )
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


def _unknown(node: Mapping[str, Any], kind: type, prefix: str) -> Iterator[str]:
    """Keys that ``+`` has added to a section of Hydra's, which nothing reads."""
    types = get_type_hints(kind)
    for key, value in node.items():
        if key not in types:
            yield unknown_key(f"{prefix}.{key}", value)
        elif is_dataclass(types[key]) and isinstance(value, dict):
            yield from _unknown(value, types[key], f"{prefix}.{key}")


def _unknown_to_plugin(node: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Keys that a launcher or a sweeper was not registered with."""
    group = prefix.replace(".", "/")
    store = ConfigStore.instance()
    names = [name for name in store.list(group) if name.endswith(".yaml")]
    installed = [store.load(f"{group}/{name}").node for name in names]
    of_it = [found for found in installed if found.get("_target_") == node.get("_target_")]
    known = {key for found in of_it for key in map(str, found)}
    if known:
        yield from (
            unknown_key(f"{prefix}.{key}", value) for key, value in node.items() if key not in known
        )


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
