"""The objectives of a sweep side by side: the best cell of each, at equal KL, and its grid."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dpo_lightning.run.page.values import number
from dpo_lightning.sweeps.report.pooling import Configuration, words_of
from dpo_lightning.sweeps.report.read import TrialResult, override_key, override_value
from dpo_lightning.sweeps.report.text import own_words

# Axes that are scales: what lies beyond their ends is worth a try.
_SCALES = ("beta", "optimizer.lr")
_BEYOND = 2


@dataclass(frozen=True, slots=True)
class GridMap:
    """The metric over beta and learning rate.

    Attributes:
        betas: Values of beta, rising.
        rates: Values of the learning rate, rising.
        cells: The best value of each beta and rate, None where there is none.
        seeds: Largest number of seeds of a cell.
    """

    betas: tuple[float, ...]
    rates: tuple[float, ...]
    cells: tuple[tuple[float | None, ...], ...]
    seeds: int


@dataclass(frozen=True, slots=True)
class Edge:
    """A best cell at the end of a scale.

    Attributes:
        key: The setting.
        value: Its value in the best cell.
        low: True if that is the smallest tried.
        beyond: Values to try next.
        command: Command that tries them in the same folder.
    """

    key: str
    value: float
    low: bool
    beyond: tuple[float, ...]
    command: str


@dataclass(frozen=True, slots=True)
class Objective:
    """The cells of one objective.

    Attributes:
        name: The loss, with what makes it another objective.
        best: The cell with the best metric.
        cells: Number of cells that finished.
        tried: Number of cells that were begun.
        device_hours: Hours of devices that all of its trials took, None where no trial says.
        at_kl: The metric at the common KL, None where it does not reach that.
        grid: The map, where several betas met several rates.
        edges: Scales at whose end the best cell is.
    """

    name: str
    best: Configuration
    cells: int
    tried: int
    device_hours: float | None
    at_kl: float | None
    grid: GridMap | None
    edges: tuple[Edge, ...]


@dataclass(frozen=True, slots=True)
class Objectives:
    """The objectives of a sweep, best first, and the KL at which they are compared."""

    rows: tuple[Objective, ...] = ()
    kl: float | None = None


def objectives_of(
    ranked: Sequence[Configuration],
    trials: Iterable[TrialResult],
    *,
    folder: str,
    kl_budget: float | None,
    reference_value: float | None,
) -> Objectives:
    """The objectives, best first.

    Args:
        ranked: Configurations with the metric.
        trials: All trials, finished or not.
        folder: The sweep's folder.
        kl_budget: Largest KL of the pick; the common KL is no larger.
        reference_value: The metric of the reference, at KL 0, where it is known.
    """
    cells: defaultdict[str, list[Configuration]] = defaultdict(list)
    for c in ranked:
        cells[objective_name(c.trials[0])].append(c)
    own: defaultdict[str, list[TrialResult]] = defaultdict(list)
    for trial in trials:
        own[objective_name(trial)].append(trial)
    kl = _common_kl(list(cells.values()), kl_budget)
    found = [
        Objective(
            name=name,
            best=max(group, key=_mean),
            cells=len(group),
            tried=max(len(group), len({trial.settings for trial in own[name]})),
            device_hours=_device_hours(own[name]),
            at_kl=None if kl is None else _at_kl(group, kl, reference_value),
            grid=_grid_map(group),
            edges=_edges(group, max(group, key=_mean), folder),
        )
        for name, group in cells.items()
    ]
    return Objectives(tuple(sorted(found, key=lambda o: -_mean(o.best))), kl)


def objective_name(trial: TrialResult) -> str:
    """The loss of a trial, with the swept settings without a scale that make it another one."""
    more = []
    for line in trial.settings:
        key, value = override_key(line), override_value(line)
        of_loss = key.startswith("loss.") and number_in(line) is None
        of_reference = key in ("reference", "reference.kind") or key.startswith("reference.sync_")
        if of_loss or of_reference:
            more.append(f"{key.removeprefix('loss.')} {value}")
    return ", ".join([trial.loss or "unknown", *sorted(more)])


def number_in(line: str) -> float | None:
    """The value of an override if it is a number."""
    try:
        return number(float(override_value(line)))
    except ValueError:
        return None


def _mean(configuration: Configuration) -> float:
    return -math.inf if configuration.value is None else configuration.value.mean


def _device_hours(trials: Sequence[TrialResult]) -> float | None:
    known = [
        seconds * trial.devices
        for trial in trials
        if (seconds := number(trial.section("throughput").get("total_seconds"))) is not None
    ]
    return math.fsum(known) / 3600 if known else None


def _common_kl(groups: Sequence[Sequence[Configuration]], budget: float | None) -> float | None:
    """The largest KL that every objective reaches, or the budget where that is smaller."""
    reached = [
        max((c.kl.mean for c in group if c.kl is not None), default=None) for group in groups
    ]
    known = [kl for kl in reached if kl is not None]
    if not known or len(known) < len(reached):
        return None
    return min(known) if budget is None else min(budget, *known)


def _at_kl(
    group: Sequence[Configuration], kl: float, reference_value: float | None
) -> float | None:
    """The metric at a KL, on straight lines over the best cells; from the reference, if known."""
    points = sorted((c.kl.mean, _mean(c)) for c in group if c.kl is not None)
    if reference_value is not None:
        points = [(0.0, reference_value), *points]
    below = [p for p in points if p[0] <= kl]
    above = [p for p in points if p[0] >= kl]
    if not below or not above:
        return None
    # The upper edge of all lines between a point below and one above.
    return max(
        b[1] if b[0] == a[0] else b[1] + (a[1] - b[1]) * (kl - b[0]) / (a[0] - b[0])
        for b in below
        for a in above
    )


def _scale(configuration: Configuration, key: str) -> float | None:
    """A setting's number: as it was swept, else as it was typed for all."""
    lines = [*words_of(configuration.trials[0]), *configuration.settings]
    found = [number_in(line) for line in lines if override_key(line) == key]
    return found[-1] if found else None


def _grid_map(group: Sequence[Configuration]) -> GridMap | None:
    best: dict[tuple[float, float], float] = {}
    for c in group:
        beta, rate = _scale(c, "beta"), _scale(c, "optimizer.lr")
        if beta is not None and rate is not None:
            best[beta, rate] = max(best.get((beta, rate), -math.inf), _mean(c))
    betas = tuple(sorted({beta for beta, _ in best}))
    rates = tuple(sorted({rate for _, rate in best}))
    if len(betas) < 2 or len(rates) < 2:
        return None
    cells = tuple(tuple(best.get((beta, rate)) for rate in rates) for beta in betas)
    return GridMap(betas, rates, cells, max(len(c.trials) for c in group))


def _edges(group: Sequence[Configuration], best: Configuration, folder: str) -> tuple[Edge, ...]:
    found = []
    keys = {override_key(line) for line in best.settings}
    for key in sorted(k for k in keys if k in _SCALES or k.startswith("loss.")):
        values = sorted({x for c in group if (x := _scale(c, key)) is not None and x > 0})
        value = _scale(best, key)
        if value is None or len(values) < 2 or value not in (values[0], values[-1]):
            continue
        low = value == values[0]
        ratio = values[0] / values[1] if low else values[-1] / values[-2]
        beyond = tuple(float(f"{value * ratio ** (i + 1):.2g}") for i in range(_BEYOND))
        beyond = tuple(x for x in dict.fromkeys(beyond) if x not in values)
        if beyond:
            found.append(Edge(key, value, low, beyond, _command(best, key, beyond, folder)))
    return tuple(found)


def _command(best: Configuration, key: str, beyond: Sequence[float], folder: str) -> str:
    """The command of the best cell with other values of a key, into the same folder."""
    words = shlex.split(own_words(best.trials[0].command or ""))
    replaced = {key, "hydra.sweep.dir", *(["seed"] if len(best.seeds) > 1 else [])}
    words = [word for word in words if override_key(word) not in replaced]
    words.append(f"{key}={','.join(f'{x:g}' for x in beyond)}")
    if len(best.seeds) > 1:
        words.append(f"seed={','.join(map(str, best.seeds))}")
    split = next((i for i, word in enumerate(words) if "=" in word), len(words))
    return shlex.join([*words[:split], "-m", *words[split:], f"hydra.sweep.dir={folder}"])
