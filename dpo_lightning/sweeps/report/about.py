"""Facts of a sweep that its trials share: model, data, rows, steps, seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo_lightning.data.source_names import source_label
from dpo_lightning.run.page.text import clean, cut, seconds_text
from dpo_lightning.run.page.values import as_mapping, number
from dpo_lightning.sweeps.report.read import Sweep, TrialResult

_CONFIG = "config.yaml"
_LONGEST_NAME = 60
# The C loader is ten times as fast, and a package without it still reads.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, slots=True)
class About:
    """A sweep's title and what stands below it.

    Attributes:
        title: Model, data, rows, steps and seeds, as far as they are known; else the folder.
        facts: More about the trials, a few words each.
    """

    title: str
    facts: tuple[str, ...]


def about(sweep: Sweep) -> About:
    """The title of a sweep, from its finished trials, else from those that began."""
    trials = sweep.finished or tuple(t for t in sweep.trials if t.result)
    configs = [_config(sweep.folder / trial.folder / _CONFIG) for trial in trials]
    model = _one((trial.section("model").get("name") for trial in trials), "models", _name)
    data = _one((_data(config) for config in configs), "data sets", _name)
    head = f"{model} on {data}" if model and data else model or data
    counts = [
        _counted(_numbers(t.section("data").get("train_groups") for t in trials), "row"),
        _counted(_numbers(t.step for t in trials), "step"),
        _seeds(trials),
    ]
    known = ", ".join(text for text in counts if text)
    title = f"{head}: {known}" if head and known else head or sweep.folder.resolve().name
    return About(clean(title), tuple(clean(fact) for fact in _facts(trials, configs) if fact))


def _facts(trials: Sequence[TrialResult], configs: Sequence[Mapping[str, Any]]) -> list[str]:
    evaluated = _numbers(t.section("data").get("eval_groups") for t in trials)
    batches = _numbers(as_mapping(config.get("data")).get("batch_size") for config in configs)
    rates = _numbers(as_mapping(config.get("optimizer")).get("lr") for config in configs)
    seconds = _numbers(t.section("throughput").get("total_seconds") for t in trials)
    losses = list(dict.fromkeys(t.loss for t in trials if t.loss))
    return [
        _counted(evaluated, "evaluation row"),
        f"batches of {_counted(batches, 'row')}" if batches else "",
        f"loss {', '.join(losses)}" if losses else "",
        f"learning rate {_range(rates)}" if rates else "",
        f"{seconds_text(sum(seconds))} of wall time in all trials" if seconds else "",
    ]


def _config(path: Path) -> Mapping[str, Any]:
    """A trial's settings; empty where they cannot be read."""
    try:
        return as_mapping(yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}


def _data(config: Mapping[str, Any]) -> str | None:
    data = config.get("data")
    if not isinstance(data, dict) or "train" not in data:
        return None
    if data["train"] is None:
        return "the controlled task"
    label = source_label(data["train"])
    # Of a path the end says which; an id of the hub stays whole.
    return Path(label).name if label.count("/") > 1 or Path(label).suffix else label


def _name(value: object) -> str:
    return cut(value, _LONGEST_NAME) if isinstance(value, str) else ""


def _one(values: Iterable[object], several: str, name: Callable[[object], str]) -> str:
    found = list(dict.fromkeys(text for value in values if (text := name(value))))
    return found[0] if len(found) == 1 else f"{len(found)} {several}" if found else ""


def _numbers(values: Iterable[object]) -> list[float]:
    return [value for item in values if (value := number(item)) is not None]


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    texts = [f"{value:,.0f}" if value >= 1000 else f"{value:g}" for value in (low, high)]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"


def _counted(values: Sequence[float], what: str) -> str:
    if not values:
        return ""
    return f"{_range(values)} {what}{'' if set(values) == {1.0} else 's'}"


def _seeds(trials: Sequence[TrialResult]) -> str:
    seeds = sorted({trial.seed for trial in trials if trial.seed is not None})
    if len(seeds) > 4:
        return f"{len(seeds)} seeds"
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else ""
