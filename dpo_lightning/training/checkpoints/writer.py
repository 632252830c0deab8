"""The one writer of checkpoints, and the callback that decides when it writes.

A checkpoint is staged beside its target, hashed while it is written, synced, renamed and then named
by its manifest; older ones go after that. Whatever interrupts this leaves the one before whole.
While the training goes on all of it is done in a thread, on a copy of the state; what fails there
is raised at the next step, and whatever ends the training waits for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from dpo_lightning.training.checkpoints.background import (
    DICTS,
    BackgroundWriter,
    has_room,
    on_host,
)
from dpo_lightning.training.checkpoints.files import Content, checkpoint_path

log = logging.getLogger(__name__)

# What a checkpoint takes beside its tensors.
_OVERHEAD_BYTES = 1 << 20
_GIB = 2**30

# All that comes back from a file that is read without running anything in it.
_PLAIN = (
    *(bool, int, float, complex, str, bytes, type(None)),
    *(torch.Size, torch.dtype, torch.device),
)
PARTS = ("state_dict", "global_step", "loops", "optimizer_states")
"""Entries of each checkpoint that a run writes."""

WRITE_FAILED = 1 << 10
"""What ranks agree to stop for, beside the numbers of signals: rank 0 could not write."""


@dataclass(frozen=True, slots=True)
class _Order:
    """The way in which a checkpoint is saved.

    Attributes:
        waits: True if it is written when the call returns.
        holds_back: True if a failure is kept, and not raised.
        keep: Number of checkpoints that stay; None removes none.
        best: Those that stay because of a metric.
    """

    waits: bool = True
    holds_back: bool = False
    keep: int | None = None
    best: frozenset[Path] = frozenset()


class DurableCheckpointIO(CheckpointIO):
    """Writes checkpoints that are whole or not there, and loads nothing but tensors and values.

    Args:
        facts: Entries of every manifest beside step, size and hash; plain values.
        parts: Entries without which what is loaded is no checkpoint.
        background: True if a thread may write while the training goes on, where it is not said that
            somebody waits for the file.

    Attributes:
        last_saved: The last checkpoint that was written whole.
        best: Those that are not removed for newer ones.
    """

    def __init__(
        self, facts: Mapping[str, Any], parts: Sequence[str] = (), *, background: bool = False
    ) -> None:
        self._parts = parts
        self._facts = dict(facts)
        self._background = background
        self._writer = BackgroundWriter()
        self._order = _Order()
        self._failure: BaseException | None = None
        self.last_saved: Path | None = None
        self.best: frozenset[Path] = frozenset()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Writes a checkpoint and its manifest; Lightning calls it on rank 0 alone.

        Raises:
            StorageError: If there is no room or the folder cannot be written; what was there stays.
            UserError: If something in it could not be loaded again.
        """
        order = self._order
        try:
            self.finish()
            self._save(checkpoint, Path(path), order)
        except DpoLightningError as failure:
            if not order.holds_back:
                raise
            self._failure = failure

    @property
    def has_failed(self) -> bool:
        """True if a write failed since the last time that somebody asked for the failure."""
        return self._writer.has_failed

    def settle(self) -> BaseException | None:
        """Waits until what was begun is written; gives its failure, or one that was held back."""
        self._writer.wait()
        return self.held_back() or self._writer.take_failure()

    def held_back(self) -> BaseException | None:
        """The failure that was held back, without waiting for what is being written."""
        failure, self._failure = self._failure, None
        return failure

    def finish(self) -> None:
        """Waits until what was begun is written.

        Raises:
            StorageError: If it could not be.
        """
        failure = self.settle()
        if failure is not None:
            raise failure

    def _save(self, checkpoint: dict[str, Any], path: Path, order: _Order) -> None:
        needed = _bytes_of(checkpoint)
        folder = path.parent
        with _naming(path):
            folder.mkdir(parents=True, exist_ok=True)
            checkpoints.remove_leftovers(folder)
            free = shutil.disk_usage(folder).free
        if free < needed:
            raise StorageError(
                f"{path}: the checkpoint takes {needed / _GIB:.3g} GiB and its file system has "
                f"{free / _GIB:.3g} GiB free; {_remedy(path)}"
            )
        if self._background and not order.waits:
            if has_room(needed):
                copied = on_host(checkpoint)
                self._writer.start(lambda: self._write_out(copied, path, order))
                return
            log.warning(
                "%s: written while the training waits: a copy of its %.3g GiB does not fit into "
                "the host's free memory",
                *(path, needed / _GIB),
            )
        self._write_out(checkpoint, path, order)

    def _write_out(self, checkpoint: dict[str, Any], path: Path, order: _Order) -> None:
        """Writes the file and its manifest, and only then removes older checkpoints."""
        staged = staged_name(path)
        with _naming(path):
            try:
                content = _write(checkpoint, staged)
                step = int(checkpoint["global_step"])
                checkpoints.publish(staged, path, content, step=step, facts=self._facts)
            finally:
                staged.unlink(missing_ok=True)
        self.last_saved = path
        if order.keep is not None:
            _prune(path, order.keep, order.best)

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


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Makes an error of the system one line about a checkpoint, with what to do."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; {_remedy(path)}") from error


def _prune(newest: Path, keep: int, best: Collection[Path] = ()) -> None:
    """Removes older checkpoints, now that a newer one is whole."""
    try:
        checkpoints.prune(newest.parent, newest=newest, keep=keep, best=best)
    except OSError as error:
        raise StorageError(
            f"{error.filename}: {error.strerror}: an old checkpoint cannot be removed"
        ) from error


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
        left = memoryview(data).cast("B")
        count = len(left)
        try:
            # Without a buffer of Python's, which a process that is forked meanwhile would share.
            while left:
                left = left[self._file.write(left) :]
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
    with path.open("wb", buffering=0) as file:
        hashed = _Hashed(cast(IO[bytes], file))
        try:
            torch.save(checkpoint, cast(IO[bytes], hashed))
        except RuntimeError:
            if hashed.error is not None:
                raise hashed.error from None
            raise
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
    if type(value) in DICTS:
        for key, item in value.items():
            place = f"{where}.{key}" if where else str(key)
            yield from _leaves(key, place)
            yield from _leaves(item, place)
    elif type(value) in (list, tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{where}[{number}]")
    else:
        yield where, value


def save_now(
    trainer: pl.Trainer, path: Path, *, keep: int | None = None, waits: bool = True
) -> None:
    """Saves a checkpoint from a hook that all ranks are in; all of them learn the outcome.

    Args:
        trainer: The trainer.
        path: ``<run>/checkpoints/step-<step>.ckpt``.
        keep: Number of checkpoints that stay; None removes none.
        waits: True if it is written when this returns; else it may be in work, and a failure comes
            out at the next step.

    Raises:
        StorageError: On every rank, if rank 0 could not write it.
    """
    io = trainer.strategy.checkpoint_io
    if not isinstance(io, DurableCheckpointIO):
        trainer.save_checkpoint(path)
        if keep is not None and trainer.is_global_zero:
            _prune(path, keep)
        return
    # Rank 0 must not leave the others waiting where they meet at the end of a save.
    several = trainer.world_size > 1
    io._order = _Order(waits=waits, holds_back=several, keep=keep, best=io.best)
    try:
        trainer.save_checkpoint(path)
    finally:
        io._order = _Order()
    if several:
        _raise_everywhere(trainer, io.settle() if waits else io.held_back())


def is_saved(trainer: pl.Trainer, path: Path) -> bool:
    """True if a checkpoint is written whole already; waits for what is being written.

    A hook calls it that all ranks are in; what rank 0 knows counts.

    Raises:
        StorageError: On every rank, if rank 0 could not write what it had begun.
    """
    io = trainer.strategy.checkpoint_io
    own: tuple[BaseException | None, bool] = (None, False)
    if isinstance(io, DurableCheckpointIO):
        failure = io.settle()
        own = (failure, io.last_saved == path)
    failure, saved = trainer.strategy.broadcast(own)
    if failure is not None:
        raise failure
    return saved


def _raise_everywhere(trainer: pl.Trainer, failure: BaseException | None) -> None:
    """Raises rank 0's failure on all ranks, if it has one."""
    failure = trainer.strategy.broadcast(failure)
    if failure is not None:
        raise failure


class Checkpoints(Callback):
    """Saves at regular steps and at the end; the newest stay.

    Args:
        folder: The run's ``checkpoints`` folder.
        every_n_steps: Steps between two checkpoints; None writes none while training.
        keep: Number of checkpoints that stay while training.
        last: True if the end of the training is saved.
        round_steps: Steps of a round, at whose ends it saves too while training; None: it does not.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every_n_steps: int | None,
        keep: int,
        last: bool,
        round_steps: int | None = None,
    ) -> None:
        self._folder = folder
        self._every = every_n_steps
        self._keep = keep
        self._last = last
        self._round_steps = round_steps
        # What a killed process left, once there is a step: until then the folder stays as it was.
        self._cleared = False
        self._start: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the step from which the training goes on."""
        self._start = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves, and only then removes older checkpoints; both may go on during the next steps.

        Raises:
            StorageError: On every rank, if what was begun in an earlier step could not be written.
        """
        self._raise_failure(trainer, stop=getattr(pl_module, "stop_signal", 0))
        if trainer.is_global_zero and not self._cleared:
            checkpoints.remove_leftovers(self._folder)
        self._cleared = True
        if not self._is_due(trainer.global_step):
            return
        path = checkpoint_path(self._folder, trainer.global_step)
        save_now(trainer, path, keep=self._keep, waits=False)

    def _is_due(self, step: int) -> bool:
        if self._every is None:
            return False
        return step % self._every == 0 or (
            self._round_steps is not None and step % self._round_steps == 0
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the last step, unless it was saved on the way; waits for what is being written."""
        path = checkpoint_path(self._folder, trainer.global_step)
        # Without a step of its own the run may not write yet, and there is nothing new.
        new = trainer.global_step != self._start
        if not is_saved(trainer, path) and self._last and new:
            save_now(trainer, path)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Waits for what is being written: whoever comes next may read the folder, or write it."""
        io = trainer.strategy.checkpoint_io
        failure = io.settle() if isinstance(io, DurableCheckpointIO) else None
        if failure is not None:
            log.warning("%s", failure)

    def _raise_failure(self, trainer: pl.Trainer, *, stop: int) -> None:
        """Raises the failure of an earlier step's write; ranks have agreed in the step."""
        io = trainer.strategy.checkpoint_io
        if not isinstance(io, DurableCheckpointIO):
            return
        if trainer.world_size == 1 and io.has_failed:
            io.finish()
        elif stop == WRITE_FAILED:
            _raise_everywhere(trainer, io.settle())
