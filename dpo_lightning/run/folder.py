"""A run's folder: who holds it, what an earlier run left there, and when that gives way.

An earlier run's files stay as they are until this run has taken a step: whatever is refused, fails
or is interrupted before that leaves them to the byte. What belongs to the start (settings, log, the
cut of metrics.jsonl) waits until then; in a folder without an earlier run it waits for nothing.
Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dpo_lightning.errors import StorageError, UserError
from dpo_lightning.files import (
    DIVERGED_FILE,
    INTERPOLATION_FILE,
    REPORT_FILE,
    RESULT_FILE,
    ROUNDS_FOLDER,
    SAMPLES_FILE,
    read_json,
    stage,
    sync_folder,
)
from dpo_lightning.processes.ownership import (
    LOCK_FILE,
    FolderLock,
    TakenError,
    settle,
    take_folder,
)
from dpo_lightning.run.inputs import QUARANTINE_FILE
from dpo_lightning.settings.fingerprint import settings_hash
from dpo_lightning.settings.schema import Config
from dpo_lightning.tracking.rungs import RUNGS_FILE
from dpo_lightning.training.checkpoints.files import CHECKPOINTS, saved_checkpoints

# The outcome of a run, which must not pass for that of another one.
_OUTCOME = (
    *(RESULT_FILE, DIVERGED_FILE, "evaluation.json", INTERPOLATION_FILE),
    *(REPORT_FILE, "model", "model-merged"),
)
# Its course, which a run that goes on from a checkpoint continues.
_COURSE = (
    *("metrics.jsonl", SAMPLES_FILE, RUNGS_FILE, QUARANTINE_FILE),
    *("csv", "tensorboard", "profile", ROUNDS_FOLDER),
)
_SETTINGS = "config.yaml"
# Checkpoints, their manifests, and what a killed process left of one.
_SAVED = ("step-*.ckpt", "step-*.json", ".step-*")
_LOGS = ("train.log", "train_ddp_process_*.log", "train_rank_*.log")

_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO}


def disk_fault(error: Exception) -> str | None:
    """One line for a disk that is full or closed to us; None for any other error.

    Libraries that write for us hide the number of an error in its text.
    """
    named = getattr(error, "filename", None)
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
        number = error.errno
    else:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None or int(found.group(1)) not in _DISK_FAULTS:
            return None
        number = int(found.group(1))
    closed = number in (errno.EACCES, errno.EROFS)
    remedy = "check its permissions" if closed else "make room there"
    return (
        f"{named or 'a file of this run'}: {os.strerror(number)}; {remedy}, or name another folder "
        "with hydra.run.dir="
    )


def is_rank_zero() -> bool:
    """True if this process writes the files; torchrun, Lightning and srun number them."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return {os.environ.get(name, "0") for name in names} == {"0"}


# Looking at it ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Earlier:
    """An earlier run in a folder.

    Attributes:
        finished: True if it came to its end.
        step: Optimizer steps that it completed, as far as is known.
        settings_hash: Of its settings and input files.
        damaged: True if its result cannot be read.
        began: True if it left more than the failure of a start, which the next one may replace.
    """

    finished: bool
    step: int
    settings_hash: str | None
    damaged: bool = False
    began: bool = True


def find_earlier(folder: Path) -> Earlier | None:
    """The run that was in a folder; None if there was none.

    Raises:
        UserError: If the folder has files that a run would write over, and no run made them; or a
            folder where it would write a file, or the other way round.
    """
    if not folder.is_dir():
        return None
    _check_kinds(folder)
    made = [name for name in (*_OUTCOME, *_COURSE, _SETTINGS) if (folder / name).exists()]
    saved = saved_checkpoints(folder)
    marks = (LOCK_FILE, ".hydra", RESULT_FILE, "metrics.jsonl")
    if made and not saved and not any((folder / name).exists() for name in marks):
        raise UserError(
            f"hydra.run.dir={folder}: its {made[0]} was made by no run, and a run would write its "
            "own in its place; name another folder"
        )
    if not made and not saved and not (folder / ".hydra").exists():
        return None
    result = read_json(folder / RESULT_FILE)
    damaged = not result and (folder / RESULT_FILE).exists()
    step = result.get("step")
    left = ("metrics.jsonl", DIVERGED_FILE, "evaluation.json")
    sizes = [(folder / name).stat().st_size for name in left if (folder / name).exists()]
    return Earlier(
        # The export comes last but for the result.
        finished=result.get("status") == "finished" or (damaged and (folder / "model").is_dir()),
        step=step if isinstance(step, int) else 0,
        settings_hash=result.get("settings_hash"),
        damaged=damaged,
        began=bool(saved or step or damaged or any(sizes) or (folder / "model").exists()),
    )


def _check_kinds(folder: Path) -> None:
    """Refuses a folder in which what a run writes would meet something of another kind."""
    folders = (CHECKPOINTS, ".hydra", "csv", "tensorboard", "model", "model-merged", ROUNDS_FOLDER)
    files = (
        RESULT_FILE,
        REPORT_FILE,
        DIVERGED_FILE,
        "evaluation.json",
        "metrics.jsonl",
        SAMPLES_FILE,
        _SETTINGS,
    )
    saved = (folder / CHECKPOINTS).glob("step-*")
    for path in (*(folder / name for name in (*files, QUARANTINE_FILE)), *saved):
        if path.is_dir():
            raise UserError(f"{path} is a folder, and a run writes a file there; move it away")
    for path in (folder / name for name in folders):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, and a run writes a folder there; move it away")


def nothing_to_do(config: Config, folder: Path, *, is_trial: bool = False) -> bool:
    """Checks a run's folder; true if just this run has finished there and was to go on.

    Args:
        config: The settings.
        folder: The run's; it need not exist.
        is_trial: True for a trial of a sweep, which is not done twice.

    Raises:
        UserError: If it is that of a finished run, and the settings do not say that it may go.
    """
    earlier = find_earlier(folder)
    if earlier is None:
        return False
    if earlier.damaged:
        print(f"{folder / RESULT_FILE} is damaged and skipped", flush=True)
    if not earlier.finished or config.overwrite:
        return False
    goes_on = config.resume is not None and _is_in(config.resume, folder)
    if (goes_on or is_trial) and earlier.settings_hash == settings_hash(config):
        print(
            f"{folder}: this run has finished, at step {earlier.step}; overwrite=true starts it "
            "over",
            flush=True,
        )
        return True
    here = "continues it" if goes_on else "starts it over"
    raise UserError(
        f"hydra.run.dir={folder}: the run there has finished (step {earlier.step}); overwrite=true "
        f"{here}, and resume={folder} with another hydra.run.dir= continues it there"
    )


def _is_in(resume: str, folder: Path) -> bool:
    """True if ``resume`` names the folder itself, or a checkpoint in it."""
    if resume == "auto":
        return True
    path = Path(resume).resolve()
    return folder.resolve() in (path, *path.parents)


# Holding it ---------------------------------------------------------------------------------------


class RunFolder:
    """A run's folder while the run holds it; made by :func:`hold_run`.

    Args:
        path: The folder; it exists.
        lock: The right to it; None in a process that writes nothing of the run's.
        overwrite: True if what an earlier run made is cleared.
        waits: True if there is an earlier run, whose files stay for now.

    Attributes:
        begun: True once this run's files are in their place.
    """

    def __init__(self, path: Path, lock: FolderLock | None, *, overwrite: bool, waits: bool):
        self.path = path
        self.begun = not waits
        self._lock = lock
        self._overwrite = overwrite
        self._texts: dict[str, Callable[[], bytes]] = {}
        self._hooks: list[Callable[[], None]] = []
        there = path.stat()
        self._identity = (there.st_dev, there.st_ino)

    def put(self, name: str, content: Callable[[], bytes]) -> None:
        """Writes a file, now or when the run begins; whole or not at all.

        Args:
            name: Of the file, inside the folder.
            content: Gives its content when it is written.

        Raises:
            OSError: If it cannot be written.
        """
        self._texts[name] = content
        if self.begun:
            self._write({name: self._texts.pop(name)})

    def when_begun(self, hook: Callable[[], None], *, each_rank: bool = False) -> None:
        """Calls a function that writes, now or when the run begins.

        Args:
            hook: The function.
            each_rank: True if every process has a file of its own, such as its log.
        """
        if self._lock is None and not each_rank:
            return
        if self.begun:
            hook()
        else:
            self._hooks.append(hook)

    def begin(self, *, resumed: bool) -> None:
        """Puts this run's files in the place of an earlier one's; does nothing a second time.

        Args:
            resumed: True if it goes on from a checkpoint, whose course stays.

        Raises:
            UserError: If there is no room for them; then all is as it was.
        """
        if self.begun:
            return
        if self._lock is not None:
            try:
                self._write(self._texts, before=lambda: self._clear(resumed=resumed))
            except OSError as error:
                raise UserError(disk_fault(error) or f"{error.filename}: {error}") from error
        self.begun = True
        for hook in self._hooks:
            hook()
        self._texts, self._hooks = {}, []

    def _write(
        self, texts: dict[str, Callable[[], bytes]], before: Callable[[], None] = lambda: None
    ) -> None:
        """Writes files: all are staged first, which needs room, and then renamed."""
        if self._lock is None:
            return
        staged: dict[Path, Path] = {}
        try:
            for name, content in texts.items():
                path = self.path / name
                path.parent.mkdir(parents=True, exist_ok=True)
                staged[path] = stage(path, content())
            before()
            for path, ready in staged.items():
                ready.replace(path)
            for folder in {path.parent for path in staged}:
                sync_folder(folder)
        finally:
            for ready in staged.values():
                with contextlib.suppress(OSError):
                    ready.unlink(missing_ok=True)

    def _clear(self, *, resumed: bool) -> None:
        """Takes away what an earlier run made, and nothing that somebody else put there."""
        for name in _OUTCOME:
            _remove(self.path / name)
        if not self._overwrite or resumed:
            return
        for name in _COURSE:
            _remove(self.path / name)
        for folder, patterns in ((self.path / CHECKPOINTS, _SAVED), (self.path, _LOGS)):
            for pattern in patterns:
                for path in folder.glob(pattern):
                    _remove(path)

    def check(self) -> None:
        """Checks that the folder is still the one that the run began in.

        Raises:
            StorageError: If it was deleted, moved or replaced.
        """
        if not self.is_there():
            raise StorageError(
                f"{self.path}: the run's folder was deleted or moved while the run was using "
                "it, so nothing of it could be kept; the run stops"
            )

    def is_there(self) -> bool:
        """True if the folder is still the one that the run began in."""
        try:
            found = self.path.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._identity

    def takes_result(self) -> bool:
        """True if a result would be written over that of no other run."""
        return self.is_there() and (self.begun or not (self.path / RESULT_FILE).exists())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold_run(config: Config, path: Path, *, is_writer: bool) -> Iterator[RunFolder]:
    """Holds a run's folder until the run has ended.

    Args:
        config: The settings.
        path: The folder; it exists.
        is_writer: True in the process that writes the run's files.

    Raises:
        UserError: If another run is at work there, or it cannot be written.
    """
    if not is_writer:
        waits = any(next(path.glob(pattern), None) for pattern in _LOGS[1:])
        yield RunFolder(path, None, overwrite=False, waits=waits)
        return
    earlier = find_earlier(path)
    lock = None
    try:
        try:
            lock = take_folder(path, lambda who: _say_wait(path, who))
            lock.own(lambda: _lost(path))
            settle(lock)
        except TakenError as error:
            raise UserError(
                f"hydra.run.dir={path}: a run is using it ({error}); wait for its end, stop "
                "it, or name another folder with hydra.run.dir="
            ) from error
        except OSError as error:
            raise UserError(disk_fault(error) or f"{error.filename or path}: {error}") from error
        yield RunFolder(
            path, lock, overwrite=config.overwrite, waits=earlier is not None and earlier.began
        )
    finally:
        if lock is not None:
            lock.release()


def _say_wait(path: Path, who: str) -> None:
    print(f"{path}: {who} used it a moment ago; waiting for its heartbeat", flush=True)


def _lost(path: Path) -> None:
    """Ends this process at once: another one writes the folder by now."""
    print(
        f"error: {path}: another run has taken the folder over, as this one gave no sign of life; "
        "this one ends",
        file=sys.stderr,
        flush=True,
    )
    os._exit(UserError.exit_code)
