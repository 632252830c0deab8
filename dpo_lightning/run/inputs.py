"""The rows that the settings name, read and judged. Imports no torch."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from dpo_lightning.data.fields import misses
from dpo_lightning.data.records import Rows, check_bad_rows, read_rows, write_quarantine
from dpo_lightning.data.source_names import hub_ids
from dpo_lightning.plugins import find_scorer
from dpo_lightning.settings.schema import BASE, Config

log = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"


_HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class SourceRows:
    """The rows of ``data.train`` and of ``data.eval``, if that is named."""

    train: Rows
    eval: Rows | None


def prefer_cache_without_network(config: Config) -> None:
    """Uses the hub's local cache at once if the hub is named but does not answer.

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
    on_hub = [s for s in models if s is not None and not Path(s).exists()]
    on_hub += [*hub_ids(config.data.train), *hub_ids(config.data.eval)]
    if on_hub:
        ask_hub(on_hub)


def ask_hub(names: Sequence[str]) -> bool:
    """Asks the hub for a sign of life; without one its libraries use the local cache from here on.

    Args:
        names: The ids that are wanted of it.

    Returns:
        True if it may be asked for them.
    """
    if "HF_HUB_OFFLINE" in os.environ:
        return False
    if any(name in os.environ for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    hub = urlparse(os.environ.get("HF_ENDPOINT", _HUB))
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout=5).close()
    except OSError:
        log.info("%s does not answer: %s from the local cache", hub.hostname, ", ".join(names))
        os.environ["HF_HUB_OFFLINE"] = "1"
        return False
    return True


def _is_function(config: Config) -> bool:
    scorer = config.evaluation.scorer
    return scorer is not None and find_scorer(scorer, config.plugins) is not None


def read_sources(
    config: Config,
    run_dir: Path,
    *,
    when_begun: Callable[[Callable[[], None]], None],
    key: str = "data.train",
) -> SourceRows | None:
    """Reads the rows that the settings name; None for the controlled task.

    Args:
        config: The settings.
        run_dir: The run's folder, where bad rows go.
        when_begun: Calls what writes there, once the run may.
        key: The setting by which the user named ``data.train``, for errors.

    Raises:
        UserError: If a source cannot be read, or rows are bad and ``data.on_bad_row`` is stop.
    """
    data = config.data
    if data.train is None:
        return None

    def read(source: object, split: str, named: str) -> Rows:
        return read_rows(
            source,
            key=named,
            format=data.format,
            columns=data.columns,
            split=split,
            subset=data.subset,
            revision=data.revision,
            ignore=data.ignore_fields,
        )

    train = read(data.train, data.train_split, key)
    evaluation = None
    if data.eval is not None or data.eval_split is not None:
        evaluation = read(data.eval or data.train, data.eval_split or data.train_split, "data.eval")
    sources = [train] if evaluation is None else [train, evaluation]
    met = [name for rows in sources for name in rows.ignored]
    there = [name for rows in sources for name in rows.fields]
    train.notes.extend(misses(data.ignore_fields, met, there))
    bad = [row for rows in sources for row in rows.bad]
    total = sum(rows.total for rows in sources)
    check_bad_rows(Rows([], bad, total, []), on_bad_row=data.on_bad_row)
    if bad:
        when_begun(lambda: write_quarantine(run_dir / QUARANTINE_FILE, bad))
        are = "bad row goes" if len(bad) == 1 else "bad rows go"
        log.info("%d %s to %s", len(bad), are, run_dir / QUARANTINE_FILE)
    return SourceRows(train=train, eval=evaluation)
