"""Reads a sweep's folder: every trial as far as its files tell. Imports nothing heavy.

A trial may have crashed, may still run, or may have been killed while it wrote: a file that is
missing or damaged makes a trial say less, and never stops a report.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dpo_lightning.errors import UserError
from dpo_lightning.files import (
    INTERPOLATION_FILE,
    METRICS_FILE,
    REPORT_FILE,
    RESULT_FILE,
    json_object,
)
from dpo_lightning.run.page.values import as_mapping, as_rows, number
from dpo_lightning.settings.renamed import present_evaluation, present_result
from dpo_lightning.sweeps.trials import TRIAL_FILE

EVALUATION_FILE = "evaluation.json"
_HYDRA_OVERRIDES = Path(".hydra", "overrides.yaml")
# Where a run that this launcher did not start may have left its log.
_OTHER_LOG = "train.log"
_FAILED = ("failed", "diverged", "stopped")


@dataclass(frozen=True, slots=True)
class TrialResult:
    """A trial, as far as its files tell.

    Attributes:
        name: Its name for a reader.
        folder: Its folder's name below the sweep's folder.
        overrides: The swept settings, such as ``("beta=0.1", "seed=1")``.
        status: ``waiting``, ``running``, ``paused``, ``pruned``, ``finished``, ``failed``,
            ``diverged`` or ``stopped``.
        error: Reason why it did not finish, if it gave one.
        result: ``result.json``, empty if there is none.
        rows: The lines of ``metrics.jsonl``.
        evaluation: ``evaluation.json``, empty if there is none.
        log: Its log, relative to the sweep's folder.
        devices: Number of devices that it ran on.
        interpolation: The frontier of its policy, empty where nobody asked for it.
        page: True if it has a page of its own.
    """

    name: str
    folder: str
    overrides: tuple[str, ...]
    status: str
    error: str | None
    result: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    evaluation: Mapping[str, Any]
    log: str | None
    devices: int = 1
    interpolation: Mapping[str, Any] = field(default_factory=dict)
    page: bool = False

    @property
    def finished(self) -> bool:
        """True if the trial ran to its end."""
        return self.status == "finished"

    @property
    def failed(self) -> bool:
        """True if the trial stopped before its end."""
        return self.status in _FAILED

    @property
    def settings(self) -> tuple[str, ...]:
        """The swept settings without the seed."""
        return tuple(line for line in self.overrides if override_key(line) != "seed")

    @property
    def beta(self) -> float | None:
        """The strength of the pull towards the reference."""
        return self._fact("beta")

    @property
    def seed(self) -> int | None:
        """The seed."""
        value = self._fact("seed")
        return None if value is None else int(value)

    @property
    def loss(self) -> str | None:
        """The loss's name."""
        value = self.result.get("loss", self._override("loss"))
        return value if isinstance(value, str) else None

    @property
    def step(self) -> int | None:
        """Optimizer steps taken."""
        value = number(self.result.get("step"))
        return None if value is None else int(value)

    @property
    def command(self) -> str | None:
        """The command line as the trial was started."""
        value = self.result.get("command")
        return value if isinstance(value, str) else None

    @property
    def signs(self) -> tuple[str, ...]:
        """Signs of a training that went wrong, a sentence each."""
        said = [row.get("says") for row in as_rows(self.result.get("signs"))]
        return tuple(text for text in said if isinstance(text, str))

    def metric(self, name: str) -> float | None:
        """The last value of a metric, None where it is missing or not finite."""
        return number(self.section("metrics").get(name))

    def section(self, name: str) -> Mapping[str, Any]:
        """A part of ``result.json``, such as ``throughput``; empty where there is none."""
        return as_mapping(self.result.get(name))

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric; the later value of a step that was taken twice."""
        points: dict[float, float] = {}
        for row in self.rows:
            step, value = number(row.get("step")), number(row.get(name))
            if step is not None and value is not None:
                points[step] = value
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def _fact(self, key: str) -> float | None:
        value = number(self.result.get(key))
        return number(_as_number(self._override(key))) if value is None else value

    def _override(self, key: str) -> str | None:
        found = [line for line in self.overrides if override_key(line) == key]
        return override_value(found[-1]) if found else None


@dataclass(frozen=True, slots=True)
class Sweep:
    """The trials of one folder.

    Attributes:
        folder: The sweep's folder.
        trials: In the order of their swept values.
        notes: Notes about what could not be read.
    """

    folder: Path
    trials: tuple[TrialResult, ...]
    notes: tuple[str, ...]

    @property
    def finished(self) -> tuple[TrialResult, ...]:
        """The trials that ran to their end."""
        return tuple(trial for trial in self.trials if trial.finished)

    @property
    def status_counts(self) -> dict[str, int]:
        """Number of trials of each status."""
        return dict(Counter(trial.status for trial in self.trials).most_common())


def read_sweep(folder: Path) -> Sweep:
    """Reads the trials of a sweep, whatever state they are in.

    Args:
        folder: The sweep's folder; its direct children with a ``trial.json`` or a ``result.json``
            are the trials.

    Raises:
        UserError: If there is no such folder or no trial in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name the folder of a sweep")
    children = sorted(
        path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")
    )
    children = [path for path in children if any((path / name).is_file() for name in _TRIAL_MARKS)]
    if not children:
        raise UserError(
            f"{folder}: no trial in it (no folder with {TRIAL_FILE} or {RESULT_FILE}); name the "
            "folder of a sweep, such as outputs/sweeps/<date>"
        )
    notes: list[str] = []
    trials = [_read_trial(path, notes) for path in children]
    trials = _without_common(trials, [not (path / TRIAL_FILE).is_file() for path in children])
    keys = list(dict.fromkeys(override_key(line) for t in trials for line in t.overrides))
    trials.sort(key=lambda trial: (_swept_order(trial, keys), trial.name))
    return Sweep(folder, tuple(trials), tuple(notes))


_TRIAL_MARKS = (TRIAL_FILE, RESULT_FILE)


def _read_trial(folder: Path, notes: list[str]) -> TrialResult:
    about = _read_object(folder / TRIAL_FILE, notes)
    result = present_result(_read_object(folder / RESULT_FILE, notes))
    overrides = about.get("overrides")
    if not isinstance(overrides, list):
        overrides = _read_hydra_overrides(folder / _HYDRA_OVERRIDES, notes)
    status, error = _outcome(about, result)
    log = about.get("log")
    if not isinstance(log, str):
        log = _OTHER_LOG if (folder / _OTHER_LOG).is_file() else None
    name = about.get("name")
    return TrialResult(
        name=name if isinstance(name, str) and name else folder.name,
        folder=folder.name,
        overrides=tuple(str(line) for line in overrides),
        status=status,
        error=error,
        result=result,
        rows=_read_rows(folder / METRICS_FILE, notes),
        evaluation=present_evaluation(_read_object(folder / EVALUATION_FILE, notes)),
        log=None if log is None else f"{folder.name}/{log}",
        devices=max(1, len(devices)) if isinstance(devices := about.get("devices"), list) else 1,
        interpolation=_read_object(folder / INTERPOLATION_FILE, notes),
        page=(folder / REPORT_FILE).is_file(),
    )


def _outcome(about: Mapping[str, Any], result: Mapping[str, Any]) -> tuple[str, str | None]:
    """Status and error of a trial, where the launcher and the run may disagree."""
    said, launched = result.get("status"), about.get("status")
    error = result.get("error")
    error = " ".join(error.split()) if isinstance(error, str) else None
    # The launcher judges later and knows more, unless it has not noticed the end yet.
    if said == "finished" and launched not in _FAILED:
        return "finished", None
    status = launched if isinstance(launched, str) else said
    if status == "finished" or not isinstance(status, str):
        return "failed", error or f"ended without a readable {RESULT_FILE}"
    if status in _FAILED and error is None and about.get("exit_code") is not None:
        error = f"ended with exit code {about['exit_code']}"
    return status, error if status in (*_FAILED, "pruned") else None


def _read_object(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; empty where there is none, and noted where it is damaged."""
    if not path.is_file():
        return {}
    with contextlib.suppress(OSError):
        if (value := json_object(path.read_bytes())) is not None:
            return value
    notes.append(_damaged(path))
    return {}


def _read_rows(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of a file of JSON objects; a torn last line is what a killed run leaves."""
    if not path.is_file():
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        notes.append(_damaged(path))
        return []
    rows, bad = [], 0
    for count, line in enumerate(lines, start=1):
        if (row := json_object(line)) is not None:
            rows.append(row)
        elif line.strip() and count < len(lines):
            bad += 1
    if bad:
        notes.append(f"{path.parent.name}/{path.name}: {bad} damaged lines were left out")
    return rows


def _read_hydra_overrides(path: Path, notes: list[str]) -> list[str]:
    """Reads the overrides that Hydra wrote into a trial's folder, whoever launched it."""
    if not path.is_file():
        return []
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        notes.append(_damaged(path))
        return []
    lines = [str(line) for line in value] if isinstance(value, list) else []
    return [line for line in lines if not is_hydra_word(line)]


def _damaged(path: Path) -> str:
    inside = path.name if path.parent.name != ".hydra" else f".hydra/{path.name}"
    folder = path.parent.name if path.parent.name != ".hydra" else path.parents[1].name
    return f"{folder}/{inside} is damaged and was left out"


def _without_common(trials: Sequence[TrialResult], unsorted: Sequence[bool]) -> list[TrialResult]:
    """Removes the settings that all trials share, which were not swept, from Hydra's."""
    lists = [t.overrides for t, mixed in zip(trials, unsorted, strict=True) if mixed]
    common = set(lists[0]).intersection(*lists) if len(lists) > 1 else set()
    return [
        replace(trial, overrides=tuple(line for line in trial.overrides if line not in common))
        if mixed
        else trial
        for trial, mixed in zip(trials, unsorted, strict=True)
    ]


def _swept_order(trial: TrialResult, keys: Iterable[str]) -> list[tuple[int, float, str]]:
    values = {override_key(line): override_value(line) for line in trial.overrides}
    order = []
    for key in keys:
        text = values.get(key)
        value = _as_number(text)
        rank = 2 if text is None else int(value is None)
        order.append((rank, value or 0.0, text or ""))
    return order


def override_key(line: str) -> str:
    """The key of an override, such as ``beta``."""
    return line.partition("=")[0].lstrip("+~")


def override_value(line: str) -> str:
    """The value of an override as it was typed, without quotes around it."""
    value = line.partition("=")[2]
    quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if quoted else value


def is_hydra_word(word: str) -> bool:
    """True if a word of a command line is Hydra's, not the experiment's."""
    return override_key(word).startswith(("hydra.", "hydra/"))


def _as_number(text: str | None) -> float | None:
    try:
        return None if text is None else number(float(text))
    except ValueError:
        return None
