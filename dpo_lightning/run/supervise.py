"""One experiment from its settings to result.json, whatever the outcome.

Rows are read and judged here, before torch is imported; the rest is in ``session``.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shlex
import signal
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dpo_lightning
from dpo_lightning.errors import DpoLightningError, UserError
from dpo_lightning.files import DIVERGED_FILE, RESULT_FILE
from dpo_lightning.plugins import load_plugins, make_callbacks
from dpo_lightning.processes.child_ranks import (
    ChildRanks,
    Death,
    end_soon,
    is_about_ranks,
    is_child,
    leave_word,
    watch_parent,
)
from dpo_lightning.processes.signals import SignalWatch, Stopped, exit_code, requeue_slurm_job
from dpo_lightning.run.inputs import prefer_cache_without_network, read_sources
from dpo_lightning.run.record import RunRecord, package_versions
from dpo_lightning.settings.credentials import redact
from dpo_lightning.settings.fingerprint import settings_hash
from dpo_lightning.settings.program import typed
from dpo_lightning.settings.schema import Config

log = logging.getLogger(__name__)

_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO}
_STATUS = {0: "finished", 3: "diverged", 130: "stopped", 143: "stopped"}
# How long this process may take to notice that another rank of its run is gone.
_GRACE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class _Outcome:
    """The end of a run: its exit code and its words.

    Attributes:
        code: Its exit code.
        error: What to say of it; None where it finished.
        signum: The signal that stopped it, 0 for none.
    """

    code: int
    error: str | None = None
    signum: int = 0


def run(config: Config, *, run_dir: Path, resolved: dict[str, Any], overrides: list[str]) -> int:
    """Runs one experiment and leaves ``result.json`` in its folder.

    Args:
        config: The validated settings.
        run_dir: The run's folder; it exists.
        resolved: The same settings as plain values.
        overrides: What was typed.

    Returns:
        The exit code.
    """
    supervisor = _Supervisor(config, run_dir, overrides)
    supervisor.begin()
    outcome = _Outcome(1)
    try:
        supervisor.experiment(resolved)
        outcome = _Outcome(0)
    except (Exception, KeyboardInterrupt, SystemExit) as caught:
        outcome = supervisor.outcome_of(caught)
    finally:
        outcome = supervisor.end(outcome)
    supervisor.say(outcome)
    return outcome.code


class _Supervisor:
    """Watches over one run: its signals, its other ranks, and what is left of it.

    Args:
        config: The validated settings.
        run_dir: The run's folder.
        overrides: What was typed.
    """

    def __init__(self, config: Config, run_dir: Path, overrides: list[str]) -> None:
        self._config = config
        self._run_dir = run_dir
        self._is_rank_zero = _is_rank_zero()
        self._record = RunRecord(
            beta=config.beta,
            loss=config.loss.name,
            seed=config.seed,
            settings_hash=settings_hash(config),
            versions=package_versions(),
            command=shlex.join([*typed(), *overrides]),
        )
        self._signals = SignalWatch(self._leave)
        self._children = ChildRanks(run_dir, self._follow)

    def begin(self) -> None:
        """Takes away what an earlier run left, and listens to signals.

        Raises:
            UserError: If the folder cannot be written to.
        """
        if self._is_rank_zero:
            # What an earlier run left must not pass for this one's, however this one ends.
            try:
                for name in (RESULT_FILE, DIVERGED_FILE):
                    (self._run_dir / name).unlink(missing_ok=True)
            except OSError as caught:
                fault = disk_fault(caught) or f"{self._run_dir / RESULT_FILE}: {caught}"
                raise UserError(fault) from caught
        else:
            logging.getLogger().setLevel(logging.ERROR)
        # wandb, tokenizers and others would otherwise ask, warn or fork in ways nobody asked for.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if is_child():
            watch_parent()
        self._signals.install()

    def experiment(self, resolved: dict[str, Any]) -> None:
        """Reads the rows and hands everything to the session."""
        config = self._config
        load_plugins(config.plugins)
        make_callbacks(config.trainer.callbacks)  # what is wrong with them is said first
        prefer_cache_without_network(config)
        rows = read_sources(config, self._run_dir, is_rank_zero=self._is_rank_zero)
        from dpo_lightning.run.session import run_experiment

        run_experiment(
            config,
            rows,
            run_dir=self._run_dir,
            resolved=resolved,
            record=self._record,
            signals=self._signals,
            children=self._children,
            is_first=self._is_rank_zero,
        )

    def outcome_of(self, caught: BaseException) -> _Outcome:
        """Meaning of an error, an interruption or an exit, to be asked for while it is handled."""
        if isinstance(caught, DpoLightningError):
            if self._config.debug.traceback:
                traceback.print_exc()
            return _Outcome(caught.exit_code, str(caught))
        if isinstance(caught, KeyboardInterrupt):
            return _Outcome(130, "interrupted")
        if isinstance(caught, Stopped):
            return _Outcome(_code_of(caught), caught.message, caught.signum)
        if isinstance(caught, SystemExit):
            # Lightning and signal handlers end the process this way.
            code = _code_of(caught)
            return _Outcome(code, f"ended with exit code {code}")
        assert isinstance(caught, Exception)
        death = self._children.death_behind(caught)
        if death is not None:
            return _Outcome(death.code, death.message)
        received = self._signals.received
        if received and is_about_ranks(caught):
            return _Outcome(exit_code(received), "stopped while a rank was gone")
        fault = disk_fault(caught)
        if fault is None:
            log.exception("unexpected error")
            return _Outcome(1, f"{type(caught).__name__}: {caught}")
        if self._config.debug.traceback:
            log.exception(fault)
        return _Outcome(UserError.exit_code, fault)

    def end(self, outcome: _Outcome) -> _Outcome:
        """Writes the result and ends the other ranks.

        Returns:
            The outcome; a result that could not be written is one.
        """
        self._signals.notice()
        code, error, record = outcome.code, outcome.error, self._record
        record.status = _STATUS.get(code, "failed")
        record.error = None if error is None else redact(" ".join(error.split()))
        record.throughput["total_seconds"] = time.perf_counter() - dpo_lightning.STARTED
        if self._is_rank_zero and not record.write(self._run_dir / RESULT_FILE):
            code = code or UserError.exit_code
        if code:
            if is_child():
                leave_word(self._run_dir, record.error)
            self._children.end(code)
            if "LOCAL_RANK" in os.environ:
                end_soon(code)
        self._signals.remove()
        return replace(outcome, code=code)

    def say(self, outcome: _Outcome) -> None:
        """Logs the error, and has SLURM queue the job again where its time was over."""
        if outcome.error is not None and (self._is_rank_zero or outcome.code == 1):
            log.error("error: %s", self._record.error)
        if self._is_rank_zero:
            requeue_slurm_job(outcome.signum, self._config.resume)

    def _leave(self, code: int) -> None:
        """Writes the result where the process has to end at once."""
        death = self._children.death
        self._children.kill()
        if self._is_rank_zero:
            error = "stopped by a signal" if death is None else death.message
            status = _STATUS.get(code, "failed")
            self._record.write(self._run_dir / RESULT_FILE, status=status, error=error)

    def _follow(self, death: Death) -> None:
        """Ends this process after another rank; called from a thread."""
        signals = self._signals
        if death.code in (130, 143) and not signals.deferring:
            os.kill(os.getpid(), signal.SIGINT if death.code == 130 else signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while not signals.noticed:
            if time.monotonic() > deadline:  # it waits for the rank that is gone
                signals.end_now(death.code)
            time.sleep(0.1)


def _code_of(stop: SystemExit) -> int:
    """The code of an exit that is no success."""
    return stop.code if isinstance(stop.code, int) and stop.code else 1


def disk_fault(error: Exception) -> str | None:
    """One line for a disk that is full or closed to us; None for any other error.

    Libraries that write for us hide the number of an error in its text.
    """
    named = getattr(error, "filename", None)
    if isinstance(error, OSError) and error.errno in _DISK_FAULTS:
        reason = os.strerror(error.errno or 0)
    else:
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found is None or int(found.group(1)) not in _DISK_FAULTS:
            return None
        reason = os.strerror(int(found.group(1)))
    return (
        f"{named or 'a file of this run'}: {reason}; make room there, or name another folder with "
        "hydra.run.dir="
    )


def _is_rank_zero() -> bool:
    """True if this process writes the files; torchrun, Lightning and srun number them."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return {os.environ.get(name, "0") for name in names} == {"0"}
