"""The folder of a run that has finished: its export and its settings. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from dpo_lightning.errors import UserError
from dpo_lightning.files import RESULT_FILE, read_json

EXPORT = "model"
"""The exported policy, or its adapter, in a run's folder."""


def export_of(folder: Path, *, key: str = "run") -> Path:
    """The export of a run.

    Args:
        folder: The run's.
        key: The word or flag that named it, for errors.

    Raises:
        UserError: If there is no such run, or it left none.
    """
    if not folder.is_dir():
        raise UserError(f"{key}={folder}: no such folder; name a run's, such as outputs/runs/<run>")
    export = folder / EXPORT
    if not export.is_dir():
        raise UserError(f"{key}={folder}: {_why_no_export(folder)}")
    return export


def _why_no_export(folder: Path) -> str:
    if (folder / "multirun.yaml").is_file() or (folder / "sweep.json").is_file():
        return "it is a sweep's folder; name that of one of its trials"
    status = read_json(folder / RESULT_FILE).get("status")
    if status is None:
        return f"no {EXPORT}/ there, and no {RESULT_FILE}; name the folder of a run that finished"
    return f"no {EXPORT}/ there, the run is {status}; resume={folder} brings it to its end"
