"""``result.json``: which versions ran, and how it is written. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from pathlib import Path
from typing import Any

import dpo_lightning
from dpo_lightning.files import write_json

log = logging.getLogger(__name__)

_PACKAGES = (
    *("torch", "lightning", "transformers", "peft", "hydra-core", "datasets", "wandb", "numpy"),
)


def write_result(path: Path, result: dict[str, Any]) -> bool:
    """Writes ``result.json``; where even that cannot be, the run still says how it ended."""
    try:
        write_json(path, result)
    except OSError as error:
        log.error("error: %s: %s", path, error.strerror or error)
        return False
    return True


def package_versions() -> dict[str, str]:
    """The versions that ran, by package."""
    versions = {"python": platform.python_version(), "dpo-lightning": dpo_lightning.__version__}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions
