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
from dpo_lightning.run.record import package_versions, write_result
from dpo_lightning.settings.credentials import redact
from dpo_lightning.settings.fingerprint import settings_hash
from dpo_lightning.settings.schema import Config

log = logging.getLogger(__name__)

_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO}
_STATUS = {0: "finished", 3: "diverged", 130: "stopped", 143: "stopped"}
# How long this process may take to notice that another rank of its run is gone.
_GRACE_SECONDS = 10.0


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
    is_rank_zero = _is_rank_zero()
    if is_rank_zero:
        # What an earlier run left must not pass for this one's, however this one ends.
        try:
            for name in (RESULT_FILE, DIVERGED_FILE):
                (run_dir / name).unlink(missing_ok=True)
        except OSError as caught:
            raise UserError(disk_fault(caught) or f"{run_dir / RESULT_FILE}: {caught}") from caught
    else:
        logging.getLogger().setLevel(logging.ERROR)
    # wandb, tokenizers and others would otherwise ask, warn or fork in ways nobody asked for.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result: dict[str, Any] = {
        "status": "running",
        "error": None,
        "resumed": None,
        "beta": config.beta,
        "loss": config.loss.name,
        "seed": config.seed,
        "step": 0,
        "epoch": 0.0,
        "config_hash": None,
        "settings_hash": settings_hash(config),
        "metrics": {},
        "reference": {"rows": 0, "computed": 0, "cached": 0},
        "throughput": {},
        "memory": {},
        "model": {},
        "data": {},
        "versions": package_versions(),
        "command": shlex.join(["python", "train.py", *overrides]),
    }
    code, error, stopped_by = 1, None, 0

    def leave(code: int) -> None:
        death = children.death
        children.kill()
        if is_rank_zero:
            error = "stopped by a signal" if death is None else death.message
            left = dict(result) | {"status": _STATUS.get(code, "failed"), "error": error}
            write_result(run_dir / RESULT_FILE, left)

    def follow(death: Death) -> None:
        if death.code in (130, 143) and not signals.deferring:
            os.kill(os.getpid(), signal.SIGINT if death.code == 130 else signal.SIGTERM)
        deadline = time.monotonic() + _GRACE_SECONDS
        while not signals.noticed:
            if time.monotonic() > deadline:  # it waits for the rank that is gone
                signals.end_now(death.code)
            time.sleep(0.1)

    signals = SignalWatch(leave)
    children = ChildRanks(run_dir, follow)
    if is_child():
        watch_parent()
    signals.install()
    try:
        load_plugins(config.plugins)
        make_callbacks(config.trainer.callbacks)  # what is wrong with them is said first
        prefer_cache_without_network(config)
        rows = read_sources(config, run_dir, is_rank_zero=is_rank_zero)
        from dpo_lightning.run.session import run_experiment

        run_experiment(
            config,
            rows,
            run_dir=run_dir,
            resolved=resolved,
            result=result,
            signals=signals,
            children=children,
        )
        code = 0
    except DpoLightningError as caught:
        code, error = caught.exit_code, str(caught)
        if config.debug.traceback:
            traceback.print_exc()
    except KeyboardInterrupt:
        code, error = 130, "interrupted"
    except SystemExit as caught:
        # Lightning and signal handlers end the process this way.
        code = caught.code if isinstance(caught.code, int) and caught.code else 1
        error = f"ended with exit code {code}"
        if isinstance(caught, Stopped):
            stopped_by, error = caught.signum, caught.message
    except Exception as caught:
        death = children.death_behind(caught)
        fault = disk_fault(caught)
        if death is not None:
            code, error = death.code, death.message
        elif signals.received and is_about_ranks(caught):
            code, error = exit_code(signals.received), "stopped while a rank was gone"
        elif fault is not None:
            code, error = UserError.exit_code, fault
            if config.debug.traceback:
                log.exception(fault)
        else:
            code, error = 1, f"{type(caught).__name__}: {caught}"
            log.exception("unexpected error")
    finally:
        signals.notice()
        result["status"] = _STATUS.get(code, "failed")
        result["error"] = None if error is None else redact(" ".join(error.split()))
        result["throughput"]["total_seconds"] = time.perf_counter() - dpo_lightning.STARTED
        if is_rank_zero and not write_result(run_dir / RESULT_FILE, result):
            code = code or UserError.exit_code
        if code:
            if is_child():
                leave_word(run_dir, result["error"])
            children.end(code)
            if "LOCAL_RANK" in os.environ:
                end_soon(code)
        signals.remove()
    if error is not None and (is_rank_zero or code == 1):
        log.error("error: %s", result["error"])
    if is_rank_zero:
        requeue_slurm_job(stopped_by, config.resume)
    return code


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
    """Whether this process writes the files; torchrun, Lightning and srun number them."""
    if "RANK" in os.environ:
        return os.environ["RANK"] == "0"
    names = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return {os.environ.get(name, "0") for name in names} == {"0"}
