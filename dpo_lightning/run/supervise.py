"""One experiment from its settings to result.json, whatever the outcome.

Rows are read and judged here, before torch is imported; the rest is in ``experiment``.
"""

from __future__ import annotations

import errno
import importlib.metadata
import logging
import os
import platform
import re
import shlex
import signal
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import dpo_lightning
from dpo_lightning.data.records import Rows, check_bad_rows, read_rows, write_quarantine
from dpo_lightning.errors import DpoLightningError, UserError
from dpo_lightning.plugins import find_scorer, load_plugins, make_callbacks
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
from dpo_lightning.results import DIVERGED_FILE, RESULT_FILE, write_json
from dpo_lightning.settings.combinations import is_local_data
from dpo_lightning.settings.credentials import redact
from dpo_lightning.settings.fingerprint import settings_hash
from dpo_lightning.settings.schema import BASE, Config

log = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"
_PACKAGES = (
    *("torch", "lightning", "transformers", "peft", "hydra-core", "datasets", "wandb", "numpy"),
)
_HUB = "https://huggingface.co"
_DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EIO}
_STATUS = {0: "finished", 3: "diverged", 130: "stopped", 143: "stopped"}
# How long this process may take to notice that another rank of its run is gone.
_GRACE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class SourceRows:
    """The rows of ``data.train`` and of ``data.eval``, if that is named."""

    train: Rows
    eval: Rows | None


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
        "versions": _versions(),
        "command": shlex.join(["python", "train.py", *overrides]),
    }
    code, error, stopped_by = 1, None, 0

    def leave(code: int) -> None:
        death = children.death
        children.kill()
        if is_rank_zero:
            error = "stopped by a signal" if death is None else death.message
            left = dict(result) | {"status": _STATUS.get(code, "failed"), "error": error}
            _write_result(run_dir / RESULT_FILE, left)

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
        from dpo_lightning.run.prepare import run_experiment

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
        if is_rank_zero and not _write_result(run_dir / RESULT_FILE, result):
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


def _write_result(path: Path, result: dict[str, Any]) -> bool:
    """Writes ``result.json``; where even that cannot be, the run still says how it ended."""
    try:
        write_json(path, result)
    except OSError as error:
        log.error("error: %s: %s", path, error.strerror or error)
        return False
    return True


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


def prefer_cache_without_network(config: Config) -> None:
    """Where the hub is named but does not answer, uses its local cache at once.

    Left to themselves the hub's libraries try again for half a minute.
    """
    models = (
        config.model.pretrained,
        config.model.tokenizer,
        config.model.config,
        config.reference.pretrained,
        config.peft.adapter,
        None if config.reference.adapter == BASE else config.reference.adapter,
        None if _is_function(config) else config.evaluation.scorer,
    )
    data = (config.data.train, config.data.eval)
    on_hub = [s for s in models if s is not None and not Path(s).exists()]
    on_hub += [s for s in data if s is not None and not is_local_data(s)]
    through_proxy = any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"))
    if not on_hub or through_proxy or "HF_HUB_OFFLINE" in os.environ:
        return
    hub = urlparse(os.environ.get("HF_ENDPOINT", _HUB))
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout=5).close()
    except OSError:
        log.info("%s does not answer: %s from the local cache", hub.hostname, ", ".join(on_hub))
        os.environ["HF_HUB_OFFLINE"] = "1"


def _is_function(config: Config) -> bool:
    scorer = config.evaluation.scorer
    return scorer is not None and find_scorer(scorer, config.plugins) is not None


def read_sources(config: Config, run_dir: Path, *, is_rank_zero: bool) -> SourceRows | None:
    """Reads the rows that the settings name; None for the controlled task.

    Raises:
        UserError: If a source cannot be read, or rows are bad and ``data.on_bad_row`` is stop.
    """
    data = config.data
    if data.train is None:
        return None

    def read(source: str, split: str, key: str) -> Rows:
        return read_rows(
            source,
            key=key,
            format=data.format,
            columns=data.columns,
            split=split,
            subset=data.subset,
            revision=data.revision,
        )

    train = read(data.train, data.train_split, "data.train")
    evaluation = None
    if data.eval is not None or data.eval_split is not None:
        evaluation = read(data.eval or data.train, data.eval_split or data.train_split, "data.eval")
    sources = [train] if evaluation is None else [train, evaluation]
    bad = [row for rows in sources for row in rows.bad]
    total = sum(rows.total for rows in sources)
    check_bad_rows(Rows([], bad, total, []), on_bad_row=data.on_bad_row)
    if bad and is_rank_zero:
        write_quarantine(run_dir / QUARANTINE_FILE, bad)
        log.info("%d bad rows went to %s", len(bad), run_dir / QUARANTINE_FILE)
    return SourceRows(train=train, eval=evaluation)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "dpo-lightning": dpo_lightning.__version__}
    for package in _PACKAGES:
        versions[package] = importlib.metadata.version(package)
    return versions
