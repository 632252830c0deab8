"""One experiment from its settings to result.json, whatever the outcome.

Rows are read and judged here, before torch is imported; the rest is in ``session``.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import time
import traceback
from dataclasses import dataclass, replace
from typing import Any

import dpo_lightning
from dpo_lightning.errors import DpoLightningError, UserError
from dpo_lightning.files import RESULT_FILE
from dpo_lightning.plugins import load_plugins
from dpo_lightning.processes.child_ranks import (
    ChildRanks,
    Death,
    end_soon,
    is_about_ranks,
    is_child,
    leave_word,
    parent_is_gone,
    watch_parent,
)
from dpo_lightning.processes.lifeline import tell_reason
from dpo_lightning.processes.signals import (
    SignalWatch,
    Stopped,
    exit_code,
    requeue_slurm_job,
    stop_if_interrupted,
)
from dpo_lightning.run.folder import RunFolder, disk_fault, is_rank_zero
from dpo_lightning.run.inputs import prefer_cache_without_network, read_sources
from dpo_lightning.run.record import RunRecord, package_versions
from dpo_lightning.settings.credentials import redact
from dpo_lightning.settings.fingerprint import settings_hash
from dpo_lightning.settings.program import typed
from dpo_lightning.settings.schema import Config
from dpo_lightning.tracking.rungs import AtRung
from dpo_lightning.training.library_callbacks import make_all_callbacks

log = logging.getLogger(__name__)

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
        status: Its word in ``result.json``; None where that follows from the exit code.
    """

    code: int
    error: str | None = None
    signum: int = 0
    status: str | None = None


def run(
    config: Config, *, folder: RunFolder, resolved: dict[str, Any], overrides: list[str]
) -> int:
    """Runs one experiment and leaves ``result.json`` in its folder.

    Args:
        config: The validated settings.
        folder: The run's folder, which this process holds.
        resolved: The same settings as plain values.
        overrides: What was typed.

    Returns:
        The exit code.
    """
    supervisor = _Supervisor(config, folder, overrides)
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
        folder: The run's folder.
        overrides: What was typed.
    """

    def __init__(self, config: Config, folder: RunFolder, overrides: list[str]) -> None:
        self._config = config
        self._folder = folder
        self._run_dir = folder.path
        self._is_rank_zero = is_rank_zero()
        self._record = RunRecord(
            beta=config.beta,
            loss=config.loss.name,
            seed=config.seed,
            settings_hash=settings_hash(config),
            versions=package_versions(),
            command=shlex.join([*typed(), *overrides]),
        )
        self._signals = SignalWatch(self._leave)
        self._children = ChildRanks(self._run_dir, self._follow)

    def begin(self) -> None:
        """Listens to signals."""
        if not self._is_rank_zero:
            logging.getLogger().setLevel(logging.ERROR)
        # wandb, tokenizers and others would otherwise ask, warn or fork in ways nobody asked for.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if is_child():
            watch_parent()
        self._signals.install()

    def experiment(self, resolved: dict[str, Any]) -> None:
        """Reads the rows and hands everything to the session."""
        stop_if_interrupted()
        config = self._config
        load_plugins(config.plugins)
        make_all_callbacks(config.trainer.callbacks)  # what is wrong with them is said first
        prefer_cache_without_network(config)
        rows = read_sources(config, self._run_dir, when_begun=self._folder.when_begun)
        from dpo_lightning.run.session import run_experiment

        run_experiment(
            config,
            rows,
            folder=self._folder,
            resolved=resolved,
            record=self._record,
            signals=self._signals,
            children=self._children,
        )

    def outcome_of(self, caught: BaseException) -> _Outcome:
        """Meaning of an error, an interruption or an exit, to be asked for while it is handled."""
        if self._signals.raised and not isinstance(caught, Stopped):
            # An import, or another's code, made an error of its own of it.
            caught = Stopped(self._signals.received)
        if isinstance(caught, AtRung):
            return _Outcome(0, status="paused")
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
        if is_child() and is_about_ranks(caught) and parent_is_gone():
            return _Outcome(1, "the rank that started this one is gone, so it ends too")
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
        record.status = outcome.status or _STATUS.get(code, "failed")
        record.error = None if error is None else redact(" ".join(error.split()))
        record.throughput["total_seconds"] = time.perf_counter() - dpo_lightning.STARTED
        if self._is_rank_zero and not self._write_result():
            code = code or UserError.exit_code
        elif self._is_rank_zero:
            self._write_page()
        if code:
            if is_child():
                leave_word(self._run_dir, record.error)
            self._children.end(code)
            if "LOCAL_RANK" in os.environ:
                end_soon(code)
        self._signals.remove()
        return replace(outcome, code=code)

    def _write_result(self, **changes: Any) -> bool:
        """Writes the result, but never over that of an earlier run whose files stay.

        Returns:
            False where it could not be written.
        """
        if self._folder.takes_result():
            return self._record.write(self._run_dir / RESULT_FILE, **changes)
        if self._folder.is_there():
            return True
        log.error("error: %s: the run's folder is gone, and its result with it", self._run_dir)
        return False

    def _write_page(self) -> None:
        """Writes the page of a run that left metrics; the run stands without it."""
        if self._folder.takes_result():
            # Here, because it is of the end alone.
            from dpo_lightning.run.page.write import keep_run_page

            keep_run_page(self._run_dir)

    def say(self, outcome: _Outcome) -> None:
        """Logs the error, and has SLURM queue the job again where its time was over."""
        if outcome.error is not None and (self._is_rank_zero or outcome.code == 1):
            log.error("error: %s", self._record.error)
            tell_reason(str(self._record.error))
        if self._is_rank_zero:
            requeue_slurm_job(outcome.signum, self._config.resume)

    def _leave(self, code: int) -> None:
        """Writes the result where the process has to end at once."""
        death = self._children.death
        self._children.kill()
        if self._is_rank_zero:
            error = "stopped by a signal" if death is None else death.message
            status = _STATUS.get(code, "failed")
            self._write_result(status=status, error=error)

    def _follow(self, death: Death) -> None:
        """Ends this process after another rank; called from a thread."""
        signals = self._signals
        if death.code in (130, 143) and not signals.deferring:
            os.kill(os.getpid(), signal.SIGINT if death.code == 130 else signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while not signals.noticed:
            if time.monotonic() > deadline:  # it waits for the rank that is gone
                log.error("error: %s", redact(" ".join(death.message.split())))
                signals.end_now(death.code)
            time.sleep(0.1)


def _code_of(stop: SystemExit) -> int:
    """The code of an exit that is no success."""
    return stop.code if isinstance(stop.code, int) and stop.code else 1
