"""Held-out examples of an evaluation, collected batch by batch and measured at its end.

The loss of an example depends on a point that is known when all of its set were seen. So their
log-ratios are kept, and ranks meet once: the metrics are exact over ranks and ragged batches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpo_lightning.data.packing import GroupBatch
from dpo_lightning.objectives.by_example import Examples, desirable_of
from dpo_lightning.objectives.comparison import Logps

# Columns of what is kept of an example, in order; a mismatched response has 0 where it has none.
_COLUMNS = ("set", "rest", "place", "mismatched", "ratio", "policy", "desirable", "weight")


@dataclass(slots=True)
class ExampleLog:
    """Examples that an evaluation has seen so far on this rank.

    Attributes:
        parts: Rows of the micro-batches, (8, N) each, in the order of ``_COLUMNS``.
    """

    parts: list[Tensor] = field(default_factory=list)

    def add(self, batch: GroupBatch, logps: Logps, *, set: int, rest: bool) -> None:
        """Keeps the examples of a micro-batch.

        Args:
            batch: The micro-batch.
            logps: Its log-probabilities.
            set: Number of the held-out set.
            rest: False if they are of the set's sample.
        """
        self._keep(
            batch.places[batch.group],
            (logps.ratios(), logps.policy, desirable_of(batch), batch.weight[batch.group]),
            (set, rest, False),
        )

    def add_mismatched(self, batch: GroupBatch, logratios: Tensor, *, set: int, rest: bool) -> None:
        """Keeps the log-ratios of responses to other prompts, (N,)."""
        nothing = torch.zeros_like(logratios)
        self._keep(batch.places, (logratios, nothing, nothing, nothing), (set, rest, True))

    def _keep(
        self, places: Tensor, values: tuple[Tensor, ...], about: tuple[int, bool, bool]
    ) -> None:
        number, rest, mismatched = about
        found = [values[0].new_full((len(places),), float(x)) for x in (number, rest)]
        kind = values[0].new_full((len(places),), float(mismatched))
        rows = [*found, places, kind, *values]
        self.parts.append(torch.stack([row.detach().double().cpu() for row in rows]))

    def rows(self, *, world_size: int) -> Tensor:
        """All that was kept, over all ranks, by place; of a group in its order, (8, N), float64."""
        own = torch.cat(self.parts, dim=1) if self.parts else torch.zeros(len(_COLUMNS), 0).double()
        if world_size > 1:
            everyone: list[Tensor] = [own] * world_size
            torch.distributed.all_gather_object(everyone, own)
            own = torch.cat(everyone, dim=1)
        return own[:, own[_COLUMNS.index("place")].argsort(stable=True)]


def examples_of(rows: Tensor, *, set: int, sampled: bool) -> Examples | None:
    """The examples of a held-out set; None where it has none.

    Args:
        rows: As :meth:`ExampleLog.rows` gives them.
        set: Number of the set.
        sampled: True for those of its sample alone.
    """
    column = dict(zip(_COLUMNS, rows, strict=True))
    chosen = column["set"] == set
    if sampled:
        chosen = chosen & (column["rest"] == 0)
    own = chosen & (column["mismatched"] == 0)
    if not own.any():
        return None
    return Examples(
        place=column["place"][own].long(),
        logratios=column["ratio"][own],
        policy_logps=column["policy"][own],
        desirable=column["desirable"][own] == 1,
        weight=column["weight"][own],
        mismatched=column["ratio"][chosen & (column["mismatched"] == 1)],
    )
