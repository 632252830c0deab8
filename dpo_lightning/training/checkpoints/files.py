"""Checkpoints on disk: the whole ones, the one to resume from, those to keep. Imports no torch.

A checkpoint is two files: ``step-000010.ckpt`` and, written last, its manifest
``step-000010.json`` with the size and the hash of the first. One without a manifest was not
finished; one that does not fit it was damaged later. Neither is ever used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.errors import CorruptArtifactError
from dpo_lightning.files import finite, sync_folder, write_json

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
_PATTERN = "step-*.ckpt"
_FORMAT = 1
_DIGEST_BYTES = 32
# A manifest has some kilobytes; what is longer is none.
_LARGEST_MANIFEST = 1 << 24


@dataclass(frozen=True, slots=True)
class Content:
    """A file's content: its size in bytes, and their BLAKE2b hash in hexadecimal."""

    bytes: int
    blake2b: str


def new_digest() -> Any:
    """A new hash for the content of a checkpoint."""
    return hashlib.blake2b(digest_size=_DIGEST_BYTES)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Path of a step's checkpoint."""
    return folder / f"step-{step:06d}.ckpt"


def manifest_path(path: Path) -> Path:
    """The manifest of a checkpoint."""
    return path.with_suffix(".json")


# Writing ----------------------------------------------------------------------------------------


def publish(
    staged: Path, path: Path, content: Content, *, step: int, facts: Mapping[str, Any]
) -> None:
    """Renames a synced file, then writes its manifest; at no time is there less than before.

    Args:
        staged: The file, in the same folder.
        path: Its name.
        content: Its content.
        step: Optimizer steps completed.
        facts: Further entries of the manifest; plain values.

    Raises:
        OSError: If it cannot be written.
    """
    manifest = {"format": _FORMAT, "step": step, **asdict(content), **facts}
    before = _read(manifest_path(path))
    if isinstance(before, dict) and path.exists():
        # The manifest fits both until the old file is gone.
        old = {key: before[key] for key in ("bytes", "blake2b")}
        _write_manifest(path, manifest | {"replaces": old})
    staged.replace(path)
    sync_folder(path.parent)
    _write_manifest(path, manifest)


def _write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    manifest = finite(dict(manifest))
    write_json(manifest_path(path), {**manifest, "check": _check(manifest)})


def _check(manifest: Mapping[str, Any]) -> str:
    """A hash of a manifest's own content."""
    text = json.dumps({k: v for k, v in manifest.items() if k != "check"}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def prune(folder: Path, *, newest: Path, keep: int, best: Collection[Path] = ()) -> None:
    """Removes all checkpoints but ``newest``, the best, and finished ones before it up to ``keep``.

    Those of later steps go too: they are of a course that this run has left.

    Args:
        folder: Where they are.
        newest: The one that is whole by now.
        keep: Number that stay; the best beside the newest may be one more.
        best: Those that stay because of a metric.

    Raises:
        OSError: If one cannot be removed.
    """
    found = [path for path in saved_checkpoints(folder) if path != newest]
    earlier = [path for path in found if _step(path) < _step(newest)]
    room = max(0, keep - len({*best, newest}))
    others = [path for path in earlier if path not in best and manifest_path(path).exists()]
    kept = {*best, *others[:room]}
    for path in reversed(found):
        if path not in kept:
            remove(path)


def remove(path: Path) -> None:
    """Removes a checkpoint; if that is interrupted, no file is left that looks like one."""
    path.unlink(missing_ok=True)
    manifest_path(path).unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Removes a killed process's leftovers: files that had no name yet, manifests of nothing."""
    with contextlib.suppress(OSError):
        for path in folder.glob(".step-*"):
            log.info("%s: left by a process that was killed; removed", path)
            path.unlink(missing_ok=True)
        for path in folder.glob("step-*.json"):
            if not path.with_suffix(".ckpt").exists():
                path.unlink(missing_ok=True)


# Reading ----------------------------------------------------------------------------------------


def saved_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run's folder, or of a folder that holds them; newest first."""
    folder = run_dir / CHECKPOINTS if (run_dir / CHECKPOINTS).is_dir() else run_dir
    return sorted(folder.glob(_PATTERN), key=_step, reverse=True)


def run_of(checkpoint: Path) -> Path:
    """The folder of the run that wrote a checkpoint.

    Args:
        checkpoint: Its file.
    """
    folder = checkpoint.absolute().parent
    return folder.parent if folder.name == CHECKPOINTS else folder


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
        damage = find_damage(path)
        if damage is not None:
            raise CorruptArtifactError(f"resume={path}: {damage}; {_remedy(path)}")
        return path
    found = saved_checkpoints(path)
    for candidate in found:
        damage = find_damage(candidate)
        if damage is None:
            log.info("resume=%s: resuming from %s", resume, candidate)
            return candidate
        log.warning("%s: %s; skipped", candidate, damage)
    if resume == "auto":
        which = "intact checkpoint" if found else "checkpoint"
        log.info("resume=auto: no %s in %s yet, so the run starts at step 0", which, path)
        return None
    raise CorruptArtifactError(
        f"resume={resume}: no intact checkpoint (step-*.ckpt) in it; name a checkpoint or a run's "
        "folder that has one"
    )


def _remedy(path: Path) -> str:
    """Names the checkpoint to resume from in place of a damaged one."""
    for sibling in saved_checkpoints(path.parent):
        if sibling != path and find_damage(sibling) is None:
            return f"resume={sibling} is whole"
    return "there is no intact one beside it: start again without resume"


def find_damage(path: Path) -> str | None:
    """Finds the damage of a checkpoint before anything is loaded from it; None if it is whole."""
    manifest = _read(manifest_path(path))
    if isinstance(manifest, str):
        return manifest
    contents = [manifest, *([manifest["replaces"]] if "replaces" in manifest else [])]
    if path.is_dir():
        return "it is a folder"
    try:
        size = path.stat().st_size
        if size not in [content["bytes"] for content in contents]:
            return f"it has {size} bytes and not {manifest['bytes']}"
        digest = new_digest()
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    except OSError as error:
        return f"it cannot be read ({error.strerror or error})"
    if (size, digest.hexdigest()) not in [(c["bytes"], c["blake2b"]) for c in contents]:
        return "its content is not what was written"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CorruptArtifactError: If there is none, or it is damaged.
    """
    manifest = _read(manifest_path(path))
    if isinstance(manifest, str):
        raise CorruptArtifactError(f"{path}: {manifest}; {_remedy(path)}")
    return manifest


def _read(path: Path) -> dict[str, Any] | str:
    """Reads a manifest; returns a text with its fault if it has one."""
    try:
        if path.stat().st_size > _LARGEST_MANIFEST:
            return f"its {path.name} is damaged"
        manifest = json.loads(path.read_bytes())
        if manifest["check"] != _check(manifest):
            raise ValueError
    except FileNotFoundError:
        return f"it was not finished (it has no {path.name})"
    except OSError as error:
        return f"its {path.name} cannot be read ({error.strerror or error})"
    except (ValueError, KeyError, TypeError, RecursionError):  # nested without end
        return f"its {path.name} is damaged"
    found: dict[str, Any] = manifest
    if found.get("format") != _FORMAT:
        return f"it was written by another version (format {found.get('format')}, not {_FORMAT})"
    return _lie(found, path) or found


def _lie(manifest: dict[str, Any], path: Path) -> str | None:
    """The first entry of a manifest that no writer of ours wrote; None if there is none."""
    step = manifest.get("step")
    if type(step) is not int or step < 0:
        return f"its {path.name} names no step"
    if _step(path) not in (step, -1):
        return f"its {path.name} is of step {step}"
    contents = [manifest, *([manifest["replaces"]] if "replaces" in manifest else [])]
    for content in contents:
        is_content = (
            isinstance(content, dict)
            and type(content.get("bytes")) is int
            and isinstance(content.get("blake2b"), str)
        )
        if not is_content:
            return f"its {path.name} names no content"
    if not isinstance(manifest.get("identity", {}), dict):
        return f"its {path.name} names no settings"
    return None


def changed_settings(
    saved: Mapping[str, Any], identity: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Settings that differ between a checkpoint and this run.

    Args:
        saved: The ``identity`` of a manifest.
        identity: That of this run.

    Returns:
        ``{key: {"from": …, "to": …}}``; keys that only one of them has are not compared.
    """
    now = json.loads(json.dumps(finite(dict(identity))))
    return {
        key: {"from": saved[key], "to": value}
        for key, value in now.items()
        if key in saved and saved[key] != value
    }
