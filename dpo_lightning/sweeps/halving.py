"""Decisions of a pruned sweep, made of what its trials reported at a rung. Reads no file, no clock.

Trials that differ by their seed alone are one *cell*: they stay or go together. Cells are ranked
inside a *pool*; the best share of it stays, and with the best one its neighbours along beta, which
may still turn out better, at every rung but the last. A cell that is not significantly worse than
its pool's best may stay beside them for as long as the steps of the sweep are within its budget;
a report at a rung counts as the steps that take as long.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# A difference of more standard errors than this is significant: 95%, two-sided.
_SIGNIFICANT = 1.96
# Shares such as 0.3 of 10 cells come out below a whole number by rounding.
_ROUNDING = 1e-9

Scores = Mapping[int, Sequence[float]]
"""What each seed of a cell reported: a value for each held-out item, more is better."""


@dataclass(frozen=True, slots=True)
class Cell:
    """Trials that differ by their seed alone, as they stand at a rung.

    Attributes:
        name: Its name, which no other cell has.
        pool: Cells of equal pools are compared with each other.
        line: All of its settings but seed and beta; cells of one line are neighbours along beta.
        beta: Its beta.
        trials: Trials that it had when the sweep began.
        scores: What its seeds reported, by seed; empty where none of its trials is left.
    """

    name: str
    pool: tuple[str, ...]
    line: tuple[str, ...]
    beta: float
    trials: int = 1
    scores: Scores = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Terms:
    """Terms of a sweep's pruning.

    Attributes:
        fractions: Share of a trial's steps at each rung, rising.
        keep: Share of a pool that stays after each.
        budget: Most steps of the sweep, as a share of the whole grid's.
        report: Work of a trial's report at a rung, as a share of its steps.
    """

    fractions: tuple[float, ...]
    keep: float
    budget: float
    report: float = 0.0

    def is_last(self, rung: int) -> bool:
        """True for the rung behind which nothing is pruned any more."""
        return rung + 1 == len(self.fractions)

    def quota(self, cells: int) -> int:
        """Number of a pool's cells that stay by their rank."""
        return max(1, math.floor(self.keep * cells + _ROUNDING))


@dataclass(frozen=True, slots=True)
class Decision:
    """The decision of one rung.

    Attributes:
        kept: Names of the cells that go on, sorted.
        pruned: Names of those that stop.
        why: The reason for each, in a few words.
        spent: Steps of the sweep if nothing else stays, reports at rungs counted by their work, as
            a share of the whole grid's.
    """

    kept: tuple[str, ...]
    pruned: tuple[str, ...]
    why: Mapping[str, str]
    spent: float


def decide(
    cells: Iterable[Cell],
    alone: Iterable[Cell],
    terms: Terms,
    *,
    rung: int,
    spent: float,
    trials: int,
) -> Decision:
    """Decides which cells go on after a rung.

    Args:
        cells: Cells that others of their pool ran beside; those without scores have no trial left
            and are neither kept nor pruned.
        alone: Cells that nothing is compared with: they stay, and take their steps.
        terms: Terms of the pruning.
        rung: Number of the rung, from 0.
        spent: Steps that the sweep takes up to this rung and its reports, in whole trials.
        trials: Trials of the whole grid.
    """
    pools = _pools(cells)
    kept = {cell.name: cell for cell in alone}
    why = dict.fromkeys(kept, "alone")
    others: list[tuple[float, str, Cell]] = []
    for pool in pools.values():
        ranked = _ranked(pool)
        staying = _staying(ranked, terms, rung=rung)
        kept |= {cell.name: cell for cell in staying}
        for place, cell in enumerate(ranked, start=1):
            why[cell.name] = f"rank {place} of {len(ranked)}"
            if cell.name not in kept:
                distance = _distance(ranked[0], cell)
                if distance < _SIGNIFICANT:
                    others.append((distance, cell.name, cell))
            elif place > terms.quota(len(ranked)):
                why[cell.name] += ", neighbour of the best"
    needed = spent + _ahead(kept.values(), terms, rung=rung)
    for _, name, cell in sorted(others, key=lambda item: item[:2]):
        with_it = spent + _ahead([*kept.values(), cell], terms, rung=rung)
        if with_it <= terms.budget * trials + _ROUNDING:
            kept[name], needed = cell, with_it
            why[name] += ", not significantly worse"
    return Decision(
        kept=tuple(sorted(kept)),
        pruned=tuple(sorted(name for name in why if name not in kept)),
        why=why,
        spent=needed / trials,
    )


def surely_kept(
    reported: Iterable[Cell], missing: Mapping[tuple[str, ...], int], terms: Terms, *, rung: int
) -> set[str]:
    """Names of the cells that stay after a rung whatever the missing ones will report.

    Args:
        reported: Cells that have reported, with their scores.
        missing: Cells of each pool that have not; any of them may yet fail.
        terms: Terms of the pruning.
        rung: Number of the rung, from 0.
    """
    sure: set[str] = set()
    for key, pool in _pools(reported).items():
        open_places = missing.get(key, 0)
        ranked = _ranked(pool)
        for place, cell in enumerate(ranked, start=1):
            if _stays_anyhow(place, len(ranked), open_places, terms, last=terms.is_last(rung)):
                sure.add(cell.name)
    return sure


def _stays_anyhow(place: int, reported: int, missing: int, terms: Terms, *, last: bool) -> bool:
    """True if a cell at a place stays, however many of the missing cells come in before it."""
    for better in range(missing + 1):
        for worse in range(missing - better + 1):
            quota = terms.quota(reported + better + worse)
            # Two neighbours of the best may take places from others.
            free = quota if last or place + better == 1 else quota - 2
            if place + better > max(1, free):
                return False
    return True


def _pools(cells: Iterable[Cell]) -> dict[tuple[str, ...], list[Cell]]:
    """Cells that have scores, by pool."""
    pools: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        if cell.scores:
            pools.setdefault(cell.pool, []).append(cell)
    return pools


def _ranked(pool: Sequence[Cell]) -> list[Cell]:
    """The cells of a pool, the best first; the place of two does not depend on the others."""

    def mean(cell: Cell) -> float:
        return statistics.fmean(statistics.fmean(values) for values in cell.scores.values())

    return sorted(pool, key=lambda cell: (-mean(cell), cell.name))


def _staying(ranked: Sequence[Cell], terms: Terms, *, rung: int) -> list[Cell]:
    """The cells that stay by rank, or as neighbours of the best."""
    quota = terms.quota(len(ranked))
    first = [ranked[0]]
    if not terms.is_last(rung):
        first += _neighbours(ranked[0], ranked)
    rest = [cell for cell in ranked if cell not in first]
    return [*first, *rest[: max(0, quota - len(first))]]


def _neighbours(cell: Cell, pool: Sequence[Cell]) -> list[Cell]:
    """The cells with the next smaller and the next larger beta on the same line."""
    line = [other for other in pool if other.line == cell.line]
    below = [other for other in line if other.beta < cell.beta]
    above = [other for other in line if other.beta > cell.beta]
    found = []
    if below:
        found.append(max(below, key=lambda other: (other.beta, other.name)))
    if above:
        found.append(min(above, key=lambda other: (other.beta, other.name)))
    return found


def _distance(best: Cell, cell: Cell) -> float:
    """Distance of a cell below the best one, in standard errors of their paired difference.

    Infinite where there is no error to measure by, unless both are equal.
    """
    differences = _differences(best, cell)
    if differences is None:
        return math.inf
    mean = statistics.fmean(differences)
    if mean <= 0:
        return 0.0
    if len(differences) < 2:
        return math.inf
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean / error if error > 0 else math.inf


def _differences(best: Cell, cell: Cell) -> list[float] | None:
    """Differences on the same items, averaged over the seeds that both have; None without any."""
    seeds = sorted(set(best.scores) & set(cell.scores))
    pairs = [(best.scores[seed], cell.scores[seed]) for seed in seeds]
    if not pairs or len({len(values) for pair in pairs for values in pair}) > 1:
        return None
    rows = [[a - b for a, b in zip(one, other, strict=True)] for one, other in pairs]
    return [statistics.fmean(column) for column in zip(*rows, strict=True)]


def _ahead(kept: Iterable[Cell], terms: Terms, *, rung: int) -> float:
    """Steps after a rung, in whole trials, if from then on only those stay that have to."""
    pools: dict[tuple[str, ...], list[Cell]] = {}
    for cell in kept:
        pools.setdefault(cell.pool, []).append(cell)
    total = 0.0
    for pool in pools.values():
        cells, each = len(pool), sum(cell.trials for cell in pool) / len(pool)
        beside = 3 if len({cell.beta for cell in pool}) > 1 else 1
        for number in range(rung, len(terms.fractions)):
            if number > rung:
                least = 1 if terms.is_last(number) else min(cells, beside)
                cells = max(terms.quota(cells), least)
            end, report = 1.0, 0.0
            if not terms.is_last(number):
                end, report = terms.fractions[number + 1], terms.report
            total += cells * each * (end - terms.fractions[number] + report)
    return total


def spent_until(alive: Sequence[int], fractions: Sequence[float], report: float = 0.0) -> float:
    """Steps that a sweep takes up to a rung, in whole trials.

    Args:
        alive: Trials that ran to each rung so far.
        fractions: Share of a trial's steps at each of these.
        report: Work of a trial's report at a rung, as a share of its steps.
    """
    begun = (0.0, *fractions)
    return sum(
        count * (end - start + report)
        for count, start, end in zip(alive, begun, fractions, strict=False)
    )
