"""Sets of held-out groups, the sample of them that evaluations before the last see, and batches.

A batch is of one set, and of its sample or of the rest: so an evaluation of all knows the metrics
of the sample too, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EvalBatch:
    """Rows of one batch of an evaluation.

    Attributes:
        set: Number of the set that they are of.
        sampled: True if they are of the set's sample.
        rows: Their numbers among all held-out groups.
    """

    set: int
    sampled: bool
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Held-out sets, which follow each other in one list of groups.

    Attributes:
        sizes: Number of groups of each set.
        names: Its name; None where it has none. The first set ranks trials.
        sample: Numbers of the groups that evaluations before the last see, ascending; None: all.
    """

    sizes: tuple[int, ...]
    names: tuple[str | None, ...] = (None,)
    sample: tuple[int, ...] | None = None

    def batches(self, size: int) -> list[EvalBatch]:
        """All batches, those of the samples first.

        Args:
            size: Groups of a batch, over all ranks.
        """
        sampled = None if self.sample is None else frozenset(self.sample)
        first: list[EvalBatch] = []
        rest: list[EvalBatch] = []
        for number, rows in enumerate(self._rows()):
            inside = [row for row in rows if sampled is None or row in sampled]
            outside = [row for row in rows if sampled is not None and row not in sampled]
            first += (EvalBatch(number, True, part) for part in _parts(inside, size))
            rest += (EvalBatch(number, False, part) for part in _parts(outside, size))
        return [*first, *rest]

    def metrics_of(self, number: int) -> list[str]:
        """Beginnings of the names of a set's metrics, ``eval/`` left out: the first has two."""
        name = self.names[number]
        return [*([""] if number == 0 else []), *([] if name is None else [f"{name}/"])]

    def _rows(self) -> Iterator[range]:
        start = 0
        for size in self.sizes:
            yield range(start, start + size)
            start += size


def _parts(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
