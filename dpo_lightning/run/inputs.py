"""The rows that the settings name, read and judged. Imports no torch."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlparse

from dpo_lightning.data.fields import misses
from dpo_lightning.data.records import BadRow, Rows, check_bad_rows, read_rows, write_quarantine
from dpo_lightning.data.source_names import eval_key, eval_sets, hub_ids
from dpo_lightning.errors import UserError
from dpo_lightning.objectives.registry import UNPAIRED_LOSSES
from dpo_lightning.plugins import find_scorer
from dpo_lightning.settings.judging import model_judge
from dpo_lightning.settings.schema import BASE, Config, LossConfig

log = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"


_HUB = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class SourceRows:
    """The rows of ``data.train`` and of ``data.eval``.

    Attributes:
        train: Rows to train on.
        eval: Held-out rows, of the first set where there are several; None: none are named.
        sets: Held-out rows of all sets by their names; empty where they have no names.
    """

    train: Rows
    eval: Rows | None
    sets: Mapping[str, Rows] = field(default_factory=dict)

    @property
    def held_out(self) -> Mapping[str | None, Rows]:
        """Held-out rows by the name of their set, which is None where they have none."""
        found: dict[str | None, Rows] = {name: rows for name, rows in self.sets.items()}
        return {None: self.eval} if self.eval is not None and not found else found

    @property
    def all(self) -> list[Rows]:
        """The rows of every source."""
        return [self.train, *self.held_out.values()]


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
        None if _is_function(config) else model_judge(config.evaluation),
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
    new = [name for name in names if not _is_cached(name)]
    if new:
        log.info("downloading from %s: %s", hub.hostname, ", ".join(new))
    return True


def _is_cached(name: str) -> bool:
    """True if something of a repository is in the hub's local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = name.replace("/", "--")
    kinds = ("models", "datasets")
    return any(Path(HF_HUB_CACHE, f"{kind}--{folder}").is_dir() for kind in kinds)


def _is_function(config: Config) -> bool:
    judge = model_judge(config.evaluation)
    return judge is not None and find_scorer(judge, config.plugins) is not None


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
    rows = read_named(config, key=key)
    if rows is None:
        return None
    bad = check_named(rows, config)
    check_labels(rows, config.loss, key=key)
    if bad:
        when_begun(lambda: write_quarantine(run_dir / QUARANTINE_FILE, bad))
        are = "bad row goes" if len(bad) == 1 else "bad rows go"
        log.info("%d %s to %s", len(bad), are, run_dir / QUARANTINE_FILE)
    return rows


def read_named(config: Config, *, key: str = "data.train") -> SourceRows | None:
    """Reads the rows that the settings name, and judges none; None for the controlled task.

    Args:
        config: The settings.
        key: The setting by which the user named ``data.train``, for errors.

    Raises:
        UserError: If a source cannot be read.
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
            threshold=data.threshold,
        )

    train = read(data.train, data.train_split, key)
    held_out = eval_sets(data.eval)
    if not held_out and data.eval_split is not None:
        held_out = {None: data.train}
    split = data.eval_split or data.train_split
    evaluation = {name: read(own, split, eval_key(name)) for name, own in held_out.items()}
    found = SourceRows(
        train,
        next(iter(evaluation.values()), None),
        {name: rows for name, rows in evaluation.items() if name is not None},
    )
    sources = found.all
    met = [name for rows in sources for name in rows.ignored]
    there = [name for rows in sources for name in rows.fields]
    train.notes.extend(misses(data.ignore_fields, met, there))
    if data.threshold is not None and not any(rows.by_threshold for rows in sources):
        train.notes.append(
            f"data.threshold={data.threshold:g}: no row has a number as its label; "
            "'data.columns={label: <column>}' names the column of the ratings"
        )
    return found


def check_named(rows: SourceRows, config: Config) -> list[BadRow]:
    """The bad rows of all sources, to be set aside.

    Args:
        rows: The rows that were read.
        config: The settings.

    Raises:
        UserError: If there are any and ``data.on_bad_row`` is stop, or no row is good.
    """
    bad = [row for source in rows.all for row in source.bad]
    total = sum(source.total for source in rows.all)
    check_bad_rows(Rows([], bad, total, []), on_bad_row=config.data.on_bad_row)
    return bad


def check_labels(rows: SourceRows, loss: LossConfig, *, key: str = "data.train") -> None:
    """Checks that the loss can learn from the rows: from one response, or from several.

    Args:
        rows: The rows that were read.
        loss: The settings of the loss.
        key: The setting by which the user named ``rows.train``, for errors.

    Raises:
        UserError: If a row has one response with a label, and the loss compares two; or if one has
            a ranking, and the loss takes each response by itself. A pair is two of these.
    """
    names = [*loss.terms] or [loss.name]
    takes_one = all(name in UNPAIRED_LOSSES for name in names)
    shown, *others = ",".join(names), *(f"loss={name}" for name in UNPAIRED_LOSSES)
    named = {key: rows.train} | {eval_key(name): own for name, own in rows.held_out.items()}
    for where, part in named.items():
        alone = [group for group in part.groups if group.label is not None]
        if alone and not takes_one:
            raise UserError(
                f"{where}: {alone[0].source} has one response and a label ({len(alone):,} of "
                f"{part.total:,} rows), and loss={shown} compares responses; use "
                f"{' or '.join(others)}, or give rows with chosen and rejected"
            )
        ranked = [g for g in part.groups if g.label is None and len(g.responses) > 2]
        if ranked and takes_one:
            raise UserError(
                f"{where}: {ranked[0].source} has {len(ranked[0].responses)} ranked responses "
                f"({len(ranked):,} of {part.total:,} rows), and loss={shown} takes each as "
                "desirable or undesirable, which a ranking does not say; give pairs or labels, or "
                "use loss=plackett_luce"
            )
