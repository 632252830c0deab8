"""Policies that are compared: values of each held-out item, and the facts that these are of.

Of a run that finished they are in its folder; of all else they come from an evaluation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from dpo_lightning.errors import UserError
from dpo_lightning.files import RESULT_FILE, read_json
from dpo_lightning.run.opened import Opened
from dpo_lightning.run.page.values import as_mapping, as_rows, number
from dpo_lightning.settings.recorded import SETTINGS_FILE
from dpo_lightning.settings.renamed import present_evaluation, present_result
from dpo_lightning.settings.schema import BASE, Config
from dpo_lightning.sweeps.report.pooling import ACCURACY, MARK, SAMPLED_KL, WIN_RATE, win_of
from dpo_lightning.sweeps.report.read import EVALUATION_FILE

if TYPE_CHECKING:
    from dpo_lightning.run.evaluate.measure import Evaluation

Key = tuple[str, int]
"""A row or a prompt by name, and the number of the item among those of that name."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A policy with its values by item.

    Attributes:
        label: Its name in tables, unlike those of the others.
        name: Its name as it was typed.
        beta: Beta that it was trained at; None where that is not known.
        items: Values by metric and item.
        rows: Names of the held-out rows, of each one as often as it is there.
        settings: Settings by dotted key.
        answers: Answers as rows of texts, ``prompt``, ``preferred`` and ``answer``.
        cut_off: Share of drawn answers that ended at the limit; None where it is not known.
    """

    label: str
    name: str
    beta: float | None
    items: Mapping[str, Mapping[Key, float]]
    rows: Counter[str]
    settings: Mapping[str, Any]
    answers: Sequence[Mapping[str, str]] = ()
    cut_off: float | None = None

    @property
    def reference(self) -> tuple[Any, ...]:
        """The model that it is compared with, as far as the settings say."""
        of = self.settings.get
        if of("reference.pretrained") is not None:
            return (_place(of("reference.pretrained")), None, of("reference.revision"), None)
        adapter = of("reference.adapter") or of("peft.adapter")
        return (
            *(_place(of("model.pretrained")), _place(of("model.config")), of("model.revision")),
            None if adapter == BASE else _place(adapter),
        )


def _place(name: Any) -> Any:
    """A folder by its whole path, whatever it was seen from; a hub id as it is."""
    return str(Path(name).resolve()) if isinstance(name, str) and Path(name).exists() else name


def labels_of(names: Sequence[str]) -> list[str]:
    """Short names that tell policies apart.

    Args:
        names: As they were typed.

    Example:
        >>> labels_of(["runs/a", "runs/b", "runs/b"]), labels_of(["x/a", "y/a"])
        (['a', 'b', 'b (2)'], ['x/a', 'y/a'])
    """
    whole = [str(Path(name)) for name in names]
    short = [Path(name).name or name for name in whole]
    of_short: dict[str, set[str]] = {}
    for name, own in zip(whole, short, strict=True):
        of_short.setdefault(own, set()).add(name)
    found = [
        own if len(of_short[own]) == 1 else name for name, own in zip(whole, short, strict=True)
    ]
    seen: Counter[str] = Counter()
    labels = []
    for label in found:
        seen[label] += 1
        labels.append(label if seen[label] == 1 else f"{label} ({seen[label]})")
    return labels


# From a run's folder ----------------------------------------------------------------------------


def recorded(opened: Opened, label: str) -> Subject | None:
    """A run with the values that are in its folder; None where they are not.

    Args:
        opened: The run.
        label: Its name in tables.
    """
    if opened.run is None:
        return None
    evaluation = present_evaluation(read_json(opened.run / EVALUATION_FILE))
    result = present_result(read_json(opened.run / RESULT_FILE))
    groups, accuracies = evaluation.get("groups"), evaluation.get("accuracies")
    if not isinstance(groups, list) or not isinstance(accuracies, list):
        return None
    if len(groups) != len(accuracies):
        return None
    samples = as_rows(evaluation.get("samples"))
    items = {ACCURACY: group_items([str(own) for own in groups], accuracies)}
    return Subject(
        label,
        opened.name,
        beta=number(result.get("beta")),
        items=items | sample_items(samples),
        rows=Counter(map(str, groups)),
        settings=flat_settings(opened.run / SETTINGS_FILE),
        answers=_answers(evaluation.get("answers"), "after") or _answers(samples, "policy"),
        cut_off=number(as_mapping(result.get("metrics")).get("samples/cut_off")),
    )


def flat_settings(path: Path) -> dict[str, Any]:
    """Settings of a run as it recorded them, by dotted key.

    Args:
        path: Its ``config.yaml``.

    Raises:
        UserError: If they are gone or damaged.
    """
    try:
        found = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UserError(
            f"{path}: the settings of the run are gone, or damaged, so it is not known which rows "
            "its numbers are of"
        )
    return _flat(found)


def _flat(section: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key; mappings are there whole as well."""
    found: dict[str, Any] = {}
    for name, value in section.items():
        found[f"{prefix}{name}"] = value
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
    return found


def group_items(groups: Sequence[str], values: Sequence[Any]) -> dict[Key, float]:
    """Values by item, of groups by their names, which begin with that of the prompt.

    Args:
        groups: Names, ``<prompt>-<group>``.
        values: A value each; what is no number is NaN.
    """
    # Policies may have the groups of a prompt in any order: each is found by its whole name.
    counts: Counter[str] = Counter()
    found: dict[Key, float] = {}
    for name, value in zip(groups, values, strict=True):
        found[name, counts[name]] = _or_nan(value)
        counts[name] += 1
    return found


def sample_items(samples: Sequence[Mapping[str, Any]]) -> dict[str, dict[Key, float]]:
    """Values of drawn answers by metric and item.

    Args:
        samples: A row for each answer.
    """
    counts: Counter[str] = Counter()
    found: dict[str, dict[Key, float]] = {SAMPLED_KL: {}, MARK: {}, WIN_RATE: {}}
    for row in samples:
        prompt = str(row.get("prompt"))
        key = (prompt, counts[prompt])
        counts[prompt] += 1
        found[SAMPLED_KL][key] = _or_nan(row.get("kl"))
        found[MARK][key] = _or_nan(row.get("judge"))
        found[WIN_RATE][key] = win_of(row)
    return {
        name: own
        for name, own in found.items()
        if own and not all(math.isnan(value) for value in own.values())
    }


def _or_nan(value: object) -> float:
    known = number(value)
    return math.nan if known is None else known


def _answers(rows: object, own: str) -> list[dict[str, str]]:
    """Answers as rows of texts, the first to each prompt."""
    found: dict[str, dict[str, str]] = {}
    for row in as_rows(rows):
        texts = {name: row.get(name) for name in ("prompt", "preferred", own)}
        prompt, preferred, answer = (
            text if isinstance(text, str) else "" for text in texts.values()
        )
        found.setdefault(prompt, {"prompt": prompt, "preferred": preferred, "answer": answer})
    return list(found.values())


# From an evaluation -----------------------------------------------------------------------------


def evaluated(opened: Opened, label: str, settings: Sequence[str]) -> Subject:
    """A policy with the values that an evaluation finds.

    Args:
        opened: The policy.
        label: Its name in tables.
        settings: As they were typed beside it.

    Raises:
        UserError: If it cannot be evaluated.
    """
    from dpo_lightning.run.evaluate.command import checked, measured

    config = checked(opened, settings)
    return subject_of(opened, label, config, measured(opened, config, settings))


def subject_of(opened: Opened, label: str, config: Config, found: Evaluation) -> Subject:
    """A policy with the values of an evaluation.

    Args:
        opened: The policy.
        label: Its name in tables.
        config: Its settings.
        found: Its measurements.
    """
    from dpo_lightning.data.splits import group_id

    names = [group_id(group) for group in found.groups]
    items: dict[str, Mapping[Key, float]] = {
        metric: group_items(names, values.tolist())
        for metric, values in found.items.values().items()
    }
    return Subject(
        label,
        opened.name,
        beta=config.beta if opened.trained_beta else None,
        items=items | sample_items(found.samples),
        rows=Counter(names),
        settings=_flat(asdict(config)) | {"data.max_length": found.max_length},
        answers=_answers(list(found.samples), "policy"),
        cut_off=found.metrics.get("samples/cut_off"),
    )
