"""One experiment from its settings to result.json, whatever the outcome.

Rows are read and judged here, before torch is imported; the rest is in ``experiment``.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shlex
import socket
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import dpo_lightning
from dpo_lightning.config import Config
from dpo_lightning.consistency import is_local_data
from dpo_lightning.data.records import Rows, check_bad_rows, read_rows, write_quarantine
from dpo_lightning.errors import DpoLightningError
from dpo_lightning.fingerprint import settings_hash
from dpo_lightning.plugins import find_scorer, load_plugins, make_callbacks
from dpo_lightning.results import RESULT_FILE, write_json

log = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"
_PACKAGES = ("torch", "lightning", "transformers", "hydra-core", "datasets", "wandb", "numpy")
_HUB = "https://huggingface.co"
_STATUS = {0: "finished", 3: "diverged", 130: "stopped", 143: "stopped"}


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
        (run_dir / RESULT_FILE).unlink(missing_ok=True)
    else:
        logging.getLogger().setLevel(logging.ERROR)
    # wandb, tokenizers and others would otherwise ask, warn or fork in ways nobody asked for.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    result: dict[str, Any] = {
        "status": "running",
        "error": None,
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
    code, error = 1, None
    try:
        load_plugins(config.plugins)
        make_callbacks(config.trainer.callbacks)  # what is wrong with them is said first
        prefer_cache_without_network(config)
        rows = read_sources(config, run_dir, is_rank_zero=is_rank_zero)
        from dpo_lightning.experiment import run_experiment

        run_experiment(config, rows, run_dir=run_dir, resolved=resolved, result=result)
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
        error = "stopped by SIGTERM" if code == 143 else f"ended with exit code {code}"
    except Exception as caught:
        code, error = 1, f"{type(caught).__name__}: {caught}"
        log.exception("unexpected error")
    finally:
        result["status"] = _STATUS.get(code, "failed")
        result["error"] = None if error is None else " ".join(error.split())
        result["throughput"]["total_seconds"] = time.perf_counter() - dpo_lightning.STARTED
        if is_rank_zero:
            write_json(run_dir / RESULT_FILE, result)
    if error is not None and (is_rank_zero or code == 1):
        log.error("error: %s", result["error"])
    return code


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
