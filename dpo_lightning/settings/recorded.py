"""Settings that a run recorded, as the base of one that goes on from it or repeats it.

What is typed comes on top of them: a setting, a chosen file, an experiment. Paths that the earlier
command named are seen from where it was typed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from dpo_lightning.errors import UserError
from dpo_lightning.settings.keys import is_known, settings
from dpo_lightning.settings.program import TRIAL
from dpo_lightning.settings.renamed import RENAMED_KEYS

SETTINGS_FILE = "config.yaml"

# Each command says these anew.
_OF_ONE_COMMAND = ("resume", "resume_changed", "overwrite", "debug", "sweep")
# Decided by the run where nothing was set; what was set is in Hydra's record.
_FILLED_IN = (
    *("optimizer.lr", "trainer.max_steps", "trainer.log_every_n_steps"),
    *("data.max_length", "data.name", "evaluation.max_new_tokens"),
)
_PATHS = (
    *("model.pretrained", "model.tokenizer", "model.config", "peft.adapter"),
    *("reference.pretrained", "reference.adapter", "reference.cache_dir"),
    *("evaluation.judge", "evaluation.judge_prompt"),
    *("data.train", "data.eval", "data.chat_template"),
)
# One of them that is typed stands for the whole length.
_LENGTHS = ("trainer.max_steps", "trainer.max_epochs")
_LARGEST_FILE = 1 << 22


@dataclass(frozen=True, slots=True)
class Recorded:
    """The settings of an earlier run.

    Attributes:
        path: Their file.
        values: By dotted key.
    """

    path: Path
    values: dict[str, Any]

    @property
    def plugins(self) -> list[str]:
        """Modules that the run had loaded."""
        found = self.values.get("plugins")
        return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def settings_file(resume: str, run_dir: str | None) -> Path | None:
    """The file of settings of the run that ``resume`` names; None where there is none.

    Args:
        resume: The setting.
        run_dir: The run's own folder, for ``auto``.
    """
    if resume == "auto":
        folder = None if run_dir is None else Path(run_dir)
    else:
        folder = Path(resume).expanduser()
        if folder.is_file():
            folder = folder.parent
    if folder is None:
        return None
    for candidate in (folder, folder.absolute().parent):
        if (candidate / SETTINGS_FILE).is_file():
            return candidate / SETTINGS_FILE
        if candidate.name != "checkpoints" and not list(folder.glob("step-*.ckpt")):
            break
    return None


def is_alone() -> bool:
    """True if nothing recorded counts: a sweep gives its trials all of their settings."""
    return TRIAL in os.environ


def read_recorded(path: Path) -> Recorded:
    """Reads the settings that a run recorded.

    Args:
        path: Its ``config.yaml``.

    Raises:
        UserError: If it is none.
    """
    found = _read(path)
    if found is None:
        raise UserError(
            f"{path}: these are no settings of a run, or they are damaged; name the config.yaml of "
            "a run's folder"
        )
    values: dict[str, Any] = {}
    unknown = []
    for key, value in _leaves(found, ""):
        if is_known(key) or key == "plugins":
            values[key] = value
        else:
            unknown.append(key)
    if unknown:
        print(f"{path}: {', '.join(unknown)} are no settings any more, and are left out")
    for old, new in RENAMED_KEYS.items():
        # A run of now has both, and the old one is null.
        named = values.pop(old, None)
        if named is not None:
            values[new] = named
    record = path.parent / ".hydra"
    as_typed = dict(_leaves(_read(record / "config.yaml") or {}, ""))
    for key in _FILLED_IN:
        if key in values and key in as_typed and "${" not in str(as_typed[key]):
            values[key] = as_typed[key]
    runtime = ((_read(record / "hydra.yaml") or {}).get("hydra") or {}).get("runtime") or {}
    where = runtime.get("cwd") if isinstance(runtime, dict) else None
    if isinstance(where, str) and Path(where) != Path.cwd():
        for key in _PATHS:
            if key in values:
                values[key] = _seen_from(values[key], Path(where), key == "reference.cache_dir")
    return Recorded(path, values)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            return None
        found = yaml.safe_load(path.read_bytes())
    except PermissionError as error:
        raise UserError(f"{path}: {error.strerror}; check its permissions") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _leaves(section: dict[Any, Any], prefix: str) -> Iterable[tuple[str, Any]]:
    """Settings by dotted key; the keys of a section that is the user's own stay together."""
    for name, value in section.items():
        key = f"{prefix}{name}"
        known = settings().get(key)
        if isinstance(value, dict) and (known is None or known.is_section):
            yield from _leaves(value, f"{key}.")
        else:
            yield key, value


def _seen_from(value: Any, folder: Path, always: bool) -> Any:
    """A value with its relative paths as seen from another folder; hub ids stay as they are."""
    if isinstance(value, list):
        return [_seen_from(item, folder, always) for item in value]
    if isinstance(value, dict):
        return {key: _seen_from(item, folder, always) for key, item in value.items()}
    if not isinstance(value, str) or Path(value).expanduser().is_absolute():
        return value
    there = folder / value
    return str(there) if always or value.startswith((".", "~")) or there.exists() else value


def on_recorded(
    cfg: DictConfig, recorded: Recorded, overrides: Sequence[Override], default: DictConfig
) -> None:
    """Puts recorded settings below what was typed.

    Args:
        cfg: The config as it was composed of what was typed; changed.
        recorded: The settings of the earlier run.
        overrides: What was typed.
        default: The config where nothing is typed.
    """
    keys = [key for key, setting in settings().items() if not setting.is_section]
    typed = {key for key in keys if _differs(cfg, default, key)}
    is_typed = _typed_by(overrides)
    typed |= {key for key in keys if is_typed(key)}
    if typed & {*_LENGTHS}:
        typed |= {*_LENGTHS}
    if "evaluation.judge" in typed and OmegaConf.select(cfg, "evaluation.judge") != "endpoint":
        # Those of the recorded endpoint are of no use to another judge.
        typed |= {key for key in keys if key.startswith("evaluation.judge_")}
    with read_write(cfg), open_dict(cfg):
        for key in keys:
            own = key.partition(".")[0] in _OF_ONE_COMMAND
            if key in recorded.values and key not in typed and not own:
                OmegaConf.update(cfg, key, recorded.values[key], merge=False)


def _differs(one: DictConfig, other: DictConfig, key: str) -> bool:
    try:
        return bool(OmegaConf.select(one, key) != OmegaConf.select(other, key))
    except OmegaConfBaseException:
        return True  # an interpolation that leads nowhere, which will be said


def _typed_by(overrides: Sequence[Override]) -> Callable[[str], bool]:
    """A test if a key, or the section above it, was typed or is in a file that was chosen."""
    names = set()
    for override in overrides:
        key = override.key_or_group
        value = None if override.is_delete() else override.value()
        if isinstance(value, dict):
            names |= {f"{key}.{name}" for name in value}
        else:
            names.add(key)

    def is_typed(key: str) -> bool:
        parts = key.split(".")
        return any(".".join(parts[:end]) in names for end in range(1, len(parts) + 1))

    return is_typed
