"""Record of a run: the entries of ``result.json``, versions, and its writer. Imports no torch."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import dpo_lightning
from dpo_lightning.files import write_json

log = logging.getLogger(__name__)

_PACKAGES = (
    *("torch", "lightning", "transformers", "peft", "hydra-core", "datasets", "wandb", "numpy"),
)


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """Facts about a run, as they become known; entries and order are those of ``result.json``.

    Attributes:
        status: ``running``, ``finished``, ``stopped``, ``diverged`` or ``failed``; of a trial at a
            rung of its sweep ``paused``, which the sweep makes ``pruned`` if it goes no further.
        error: One line, where it did not finish.
        resumed: From which checkpoint, at which step, with which changes.
        beta: Of the first step.
        loss: Name of the loss.
        seed: Of all that is drawn.
        step: Optimizer steps completed.
        epoch: Passes over the data; with rounds the rounds.
        exported_step: Step of the weights in ``model/``, which ``metrics`` of evaluations and
            answers are of; None where nothing was exported.
        selection: ``monitor``, ``best``, ``best_step`` and ``stopped_early``; None where no metric
            selects checkpoints.
        config_hash: Of what decides the numbers, with data and weights.
        settings_hash: Of the settings alone.
        basis: Model, reference, rows and judge that the numbers are of: what differs here is not
            ranked together.
        metrics: Last value of every metric.
        signs: Signs of a training that went wrong: ``name``, ``values`` and what it ``says``.
        reference: Rows whose reference was asked for, computed and found in the cache.
        throughput: Speed of the training loop, and seconds of the whole process.
        memory: Bytes, as estimated and as measured.
        model: Name and parameters.
        data: Counts of groups and of what was dropped.
        versions: What ran, by package.
        command: What was typed.
    """

    status: str = "running"
    error: str | None = None
    resumed: dict[str, Any] | None = None
    beta: float
    loss: str
    seed: int
    step: int = 0
    epoch: float = 0.0
    exported_step: int | None = None
    selection: dict[str, Any] | None = None
    config_hash: str | None = None
    settings_hash: str
    basis: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    signs: list[dict[str, Any]] = field(default_factory=list)
    reference: dict[str, int] = field(default_factory=lambda: reference_counts(0, 0))
    throughput: dict[str, float | None] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str]
    command: str

    def content(self) -> dict[str, Any]:
        """The entries of ``result.json``, as they are by now."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    def write(self, path: Path, **changes: Any) -> bool:
        """Writes the file; where even that cannot be, the run still says how it ended.

        Args:
            path: The file.
            **changes: Entries that the file has otherwise.

        Returns:
            False where it could not be written.
        """
        try:
            write_json(path, self.content() | changes)
        except OSError as error:
            log.error("error: %s: %s", path, error.strerror or error)
            return False
        return True


def reference_counts(rows: int, computed: int) -> dict[str, int]:
    """The ``reference`` entry.

    Args:
        rows: Groups whose log-probabilities were asked for.
        computed: Those of them that were not in the cache.
    """
    return {"rows": rows, "computed": computed, "cached": rows - computed}


def package_versions() -> dict[str, str]:
    """The versions that ran, by package."""
    versions = {"python": platform.python_version(), "dpo-lightning": dpo_lightning.__version__}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions
