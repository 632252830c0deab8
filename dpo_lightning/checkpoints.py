"""Which checkpoint a run goes on from, and whether it is whole. Imports no torch."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path

from dpo_lightning.errors import CorruptArtifactError

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_PATTERN = "step-*.ckpt"


def saved_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run's folder, or of a folder that holds them; newest first."""
    folder = run_dir / CHECKPOINTS if (run_dir / CHECKPOINTS).is_dir() else run_dir
    return sorted(folder.glob(_PATTERN), key=_step, reverse=True)


def _step(path: Path) -> int:
    digits = path.stem.partition("-")[2]
    return int(digits) if digits.isdecimal() else -1


def find_checkpoint(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint that ``resume`` names: a file, the newest whole one of a folder, or ``auto``.

    Args:
        resume: The setting.
        run_dir: The run's own folder, in which ``auto`` looks.

    Returns:
        A whole checkpoint; None to start at step 0.

    Raises:
        CorruptArtifactError: If a file that is named is damaged, or a folder that is named holds no
            whole checkpoint.
    """
    if resume is None:
        return None
    path = run_dir if resume == "auto" else Path(resume)
    if path.is_file():
        damage = _damage(path)
        if damage is not None:
            raise CorruptArtifactError(f"resume={path}: {damage}; name an older checkpoint")
        return path
    found = saved_checkpoints(path)
    for candidate in found:
        damage = _damage(candidate)
        if damage is None:
            return candidate
        log.warning("%s: %s; an older one is used", candidate, damage)
    if resume == "auto":
        which = "whole checkpoint" if found else "checkpoint"
        log.info("resume=auto: no %s in %s yet, so the run starts at step 0", which, path)
        return None
    raise CorruptArtifactError(
        f"resume={resume}: no whole checkpoint (step-*.ckpt) in it; name a checkpoint or a run's "
        "folder that has one"
    )


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint by its own checksums, before anything is loaded from it."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"not a whole checkpoint ({error})"
    return None if damaged is None else f"{damaged} inside it is damaged"
