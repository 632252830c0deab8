"""The one writer of checkpoints, and the callback that decides when it writes.

A checkpoint is staged beside its target, hashed while it is written, synced, renamed and then named
by its manifest; older ones go after that. Whatever interrupts this leaves the one before whole.
"""

from __future__ import annotations

import os
import pickle
import shutil
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dpo_lightning.errors import CorruptArtifactError, DpoLightningError, StorageError, UserError
from dpo_lightning.files import staged_name
from dpo_lightning.training.checkpoints import files as checkpoints
from dpo_lightning.training.checkpoints.files import Content, checkpoint_path

# What a checkpoint takes beside its tensors.
_OVERHEAD_BYTES = 1 << 20
_GIB = 2**30

# All that comes back from a file that is read without running anything in it.
_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.Size, torch.dtype, torch.device),
)
_DICTS = (dict, OrderedDict, Counter)
PARTS = ("state_dict", "global_step", "loops", "optimizer_states")
"""Entries of each checkpoint that a run writes."""


class DurableCheckpointIO(CheckpointIO):
    """Writes checkpoints that are whole or not there, and loads nothing but tensors and values.

    Args:
        facts: Entries of every manifest beside step, size and hash; plain values.
        parts: Entries without which what is loaded is no checkpoint.
    """

    def __init__(self, facts: Mapping[str, Any], parts: Sequence[str] = ()) -> None:
        self._parts = parts
        self._facts = dict(facts)
        self._holds_back = False
        self.failure: DpoLightningError | None = None
        self.last_saved: Path | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint and its manifest; Lightning calls it on rank 0 alone.

        Raises:
            StorageError: If there is no room or the folder cannot be written; what was there stays.
            UserError: If something in it could not be loaded again.
        """
        try:
            self._save(checkpoint, Path(path))
        except DpoLightningError as failure:
            if not self._holds_back:
                raise
            self.failure = failure

    def _save(self, checkpoint: dict[str, Any], path: Path) -> None:
        needed = _bytes_of(checkpoint)
        folder = path.parent
        staged = staged_name(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_leftovers(folder)
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise StorageError(
                    f"{path}: the checkpoint takes {needed / _GIB:.3g} GiB and its file system has "
                    f"{free / _GIB:.3g} GiB free; {_remedy(path)}"
                )
            try:
                content = _write(checkpoint, staged)
                step = int(checkpoint["global_step"])
                checkpoints.publish(staged, path, content, step=step, facts=self._facts)
            finally:
                staged.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{path}: {error.strerror or error}; {_remedy(path)}") from error
        self.last_saved = path

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Loads a checkpoint that was found whole, onto the CPU unless told otherwise.

        It is mapped: of a large file each process reads the parts that it takes, and all of them
        share what the system keeps of it in memory.

        Raises:
            CorruptArtifactError: If it holds anything but tensors and plain values.
        """
        try:
            loaded: dict[str, Any] = torch.load(
                path, map_location=map_location or "cpu", weights_only=True, mmap=True
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = " ".join(str(error).split()).partition(". ")[0]
            raise CorruptArtifactError(
                f"{path}: it holds more than tensors and plain values, or is no checkpoint "
                f"({reason}); it was not loaded"
            ) from error
        missing = [key for key in self._parts if not isinstance(loaded, dict) or key not in loaded]
        if missing:
            raise CorruptArtifactError(
                f"{path}: it is no checkpoint of a run, it has no {missing[0]}; it was not used"
            )
        return loaded

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint and its manifest."""
        checkpoints.remove(Path(path))


def _remedy(path: Path) -> str:
    """Remedy for a checkpoint that cannot be written, with the one to resume from, if any."""
    remedy = "make room, or take another folder with hydra.run.dir=<folder>"
    for other in checkpoints.saved_checkpoints(path.parent):
        if other != path and checkpoints.manifest_path(other).exists():
            return f"{remedy}; resume={other} resumes from the one before"
    return remedy


class _Hashed:
    """A file that is hashed while torch writes it from front to end.

    torch makes a RuntimeError of whatever a write raises, so that is kept.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = checkpoints.new_digest()
        self._bytes = 0
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        """Writes all of ``data``."""
        if self.error is not None:
            raise self.error
        try:
            count = self._file.write(data)
        except BaseException as error:
            self.error = error
            raise
        self._digest.update(data)
        self._bytes += count
        return count

    def flush(self) -> None:
        """Does nothing; torch asks for it."""

    @property
    def content(self) -> Content:
        """Content that was written."""
        return Content(self._bytes, self._digest.hexdigest())


def _write(checkpoint: dict[str, Any], path: Path) -> Content:
    """Writes and syncs a file.

    Raises:
        OSError: If it has no room.
    """
    with path.open("wb", buffering=1 << 20) as file:
        hashed = _Hashed(file)
        try:
            torch.save(checkpoint, cast(IO[bytes], hashed))
        except RuntimeError:
            if hashed.error is not None:
                raise hashed.error from None
            raise
        file.flush()
        os.fsync(file.fileno())
    return hashed.content


def _bytes_of(checkpoint: Mapping[str, Any]) -> int:
    """Approximate size of a checkpoint on disk, in bytes.

    Raises:
        UserError: If something in it would be refused when it is loaded.
    """
    sizes = {}
    for where, value in _leaves(checkpoint, ""):
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
        elif type(value) not in _PLAIN:
            raise UserError(
                f"trainer.callbacks: a checkpoint cannot hold {where}, a {type(value).__name__}; "
                "keep tensors, numbers, texts, lists and dicts of these in state_dict()"
            )
    return sum(sizes.values()) + _OVERHEAD_BYTES


def _leaves(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """Keys and items of nested dicts and lists; other kinds of these are leaves and not loaded."""
    if type(value) in _DICTS:
        for key, item in value.items():
            place = f"{where}.{key}" if where else str(key)
            yield from _leaves(key, place)
            yield from _leaves(item, place)
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{where}[{number}]")
    else:
        yield where, value


def save_now(trainer: pl.Trainer, path: Path) -> None:
    """Saves a checkpoint from a hook that all ranks are in; all of them learn the outcome.

    Args:
        trainer: The trainer.
        path: ``<run>/checkpoints/step-<step>.ckpt``.

    Raises:
        StorageError: On every rank, if rank 0 could not write it.
    """
    io = trainer.strategy.checkpoint_io
    if trainer.world_size == 1 or not isinstance(io, DurableCheckpointIO):
        trainer.save_checkpoint(path)
        return
    # Rank 0 must not leave the others waiting where they meet at the end of a save.
    io._holds_back, io.failure = True, None
    try:
        trainer.save_checkpoint(path)
    finally:
        io._holds_back = False
    failure = trainer.strategy.broadcast(io.failure)
    if failure is not None:
        raise failure


class Checkpoints(Callback):
    """Saves at regular steps and at the end; the newest stay.

    Args:
        folder: The run's ``checkpoints`` folder.
        every_n_steps: Steps between two checkpoints; None writes none while training.
        keep: Number of checkpoints that stay while training.
        last: True if the end of the training is saved.
    """

    def __init__(self, folder: Path, *, every_n_steps: int | None, keep: int, last: bool) -> None:
        self._folder = folder
        self._every = every_n_steps
        self._keep = keep
        self._last = last
        # What a killed process left, once there is a step: until then the folder stays as it was.
        self._cleared = False

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Saves, and only then removes older checkpoints."""
        if trainer.is_global_zero and not self._cleared:
            checkpoints.remove_leftovers(self._folder)
        self._cleared = True
        if self._every is None or trainer.global_step % self._every:
            return
        path = checkpoint_path(self._folder, trainer.global_step)
        save_now(trainer, path)
        if trainer.is_global_zero:
            try:
                checkpoints.prune(self._folder, newest=path, keep=self._keep)
            except OSError as error:
                raise StorageError(
                    f"{error.filename}: {error.strerror}: an old checkpoint cannot be removed"
                ) from error

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step, unless it was saved on the way."""
        if not self._last:
            return
        path = checkpoint_path(self._folder, trainer.global_step)
        io = trainer.strategy.checkpoint_io
        saved = isinstance(io, DurableCheckpointIO) and io.last_saved == path
        if not trainer.strategy.broadcast(saved):
            save_now(trainer, path)
