"""Measurements of held-out groups, one by one: sums that every metric is made of, and margins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_lightning.data.packing import GroupBatch, StepBatch
from dpo_lightning.evaluation.held_out import fitted_log_losses
from dpo_lightning.objectives.by_example import (
    Examples,
    desirable_of,
    group_rows,
    metrics_of_sums,
    sum_names,
)
from dpo_lightning.objectives.comparison import (
    SUMS,
    Comparison,
    Logps,
    compare_responses,
    metrics_from_sums,
)
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.objectives.partition import group_shares, log_partition

FITTED = "eval/fitted_log_loss"
LABEL_GAIN = "eval/label_gain"

Array = NDArray[np.float64]

_OF_PAIRS = ObjectiveSettings(terms={"sigmoid": 1.0})


@dataclass(frozen=True, slots=True)
class GroupItems:
    """Measurements of G held-out groups, in their order.

    Attributes:
        sums: What each group adds to the entries of :func:`sum_names`, (G, 12) or (G, 13).
        margins: Log-ratio of the better response less that of the worse one, of each pair, (M,).
        owner: Group of each pair, (M,).
        share: Share of each pair in its group, (M,).
        beta: What rewards are multiples of.
        objective: Of the loss.
    """

    sums: Array
    margins: Array
    owner: NDArray[np.int64]
    share: Array
    beta: float
    objective: ObjectiveSettings = _OF_PAIRS

    def metrics(self, groups: NDArray[np.int64] | None = None) -> dict[str, float]:
        """Metrics over some of the groups, as an evaluation has them over all.

        Args:
            groups: Their numbers, of which one may be there several times; None is all.
        """
        rows = self.sums if groups is None else self.sums[groups]
        return self.of_sums(rows.sum(axis=0))

    def of_sums(self, row: Array) -> dict[str, float]:
        """Metrics of sums over groups, (C,)."""
        return metrics_of_sums(self.objective, row.tolist(), beta=self.beta)

    def values(self) -> dict[str, Array]:
        """Metrics by group, (G,); of K responses those that are best against the mean of the rest.

        A group that has no value, as all its responses are of one rank, has NaN.
        """
        column = dict(zip(sum_names(self.objective), self.sums.T, strict=True))
        if self.objective.is_unpaired:
            return self._of_examples(column)
        with np.errstate(invalid="ignore", divide="ignore"):
            chosen = column["best_logratios"] / column["best"]
            rejected = column["rest_logratios"] / column["rest"]
            loss = column["loss"] / column["weight"]
        return {
            "eval/rewards/accuracies": column["accuracy"],
            FITTED: self.fitted_losses(),
            "eval/loss": loss,
            "eval/logratios/margins": chosen - rejected,
            "eval/logratios/chosen": chosen,
            "eval/logratios/rejected": rejected,
        }

    def _of_examples(self, column: dict[str, Array]) -> dict[str, Array]:
        """Metrics by group where single responses are examples, (G,)."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                LABEL_GAIN: column["gain"] / column["gains"],
                "eval/loss": column["loss"] / column["weight"],
                "eval/logratios/desirable": column["desirable_logratios"] / column["desirable"],
                "eval/logratios/undesirable": (
                    column["undesirable_logratios"] / column["undesirable"]
                ),
            }

    def fitted_losses(self) -> Array:
        """Log-loss of each group's pairs at the scale at which it is least, (G,)."""
        parts = (torch.from_numpy(part) for part in (self.margins, self.owner, self.share))
        found: Array = fitted_log_losses(*parts).numpy()
        return found


@torch.no_grad()
def measure_groups(
    batches: Iterable[StepBatch],
    *,
    count: int,
    objective: ObjectiveSettings,
    logps: Callable[[GroupBatch], Logps],
    device: torch.device,
    betas: tuple[float, float],
    running: float | None = None,
) -> tuple[dict[str, float], GroupItems]:
    """Measures all groups once, as the evaluation of a run does.

    Args:
        batches: The groups, in whatever batches.
        count: Number of groups.
        objective: Of the loss.
        logps: Scores a micro-batch on the device.
        device: Where to compute.
        betas: That of the loss, which is the last step's, and that of rewards, the first one's.
        running: Mean log-ratio of the training, which BCO compares with; None takes that of these
            rows.

    Returns:
        The metrics of all groups together, and the groups one by one.
    """
    beta, reward_beta = betas
    if objective.is_unpaired:
        found = _examples(batches, count=count, logps=logps, device=device)
        own = float(found.logratios.mean()) if running is None else running
        anchor = found.anchor(objective, running=own)
        rows = group_rows(objective, found, count=count, beta=beta, anchor=anchor)
        return _without_pairs(rows, objective, reward_beta)
    total = torch.zeros(len(SUMS), dtype=torch.float64)
    sums = np.zeros((count, len(SUMS)))
    seen = np.zeros(count, dtype=np.int64)
    pairs: list[Tensor] = []
    for batch in batches:
        for part in batch.counted:
            moved = part.to(device)
            scored = logps(moved)
            comparison = compare_responses(objective, moved, scored, beta=beta)
            total = total + comparison.sums.double().cpu()
            sums[list(part.rows)] = group_sums(comparison, moved, scored.ratios(), beta=beta)
            seen[list(part.rows)] += 1
            pairs.append(_pairs(moved, scored.ratios()))
    if (seen != 1).any():
        raise AssertionError("a held-out group was not measured once")
    margins = torch.cat(pairs, dim=1) if pairs else torch.zeros(3, 0, dtype=torch.float64)
    # Of one group all pairs are of one batch, whose order stays.
    margins = margins[:, margins[0].argsort(stable=True)]
    items = GroupItems(
        sums,
        margins=margins[1].numpy(),
        owner=margins[0].long().numpy(),
        share=margins[2].numpy(),
        beta=reward_beta,
        objective=objective,
    )
    return metrics_from_sums(total.tolist(), beta=reward_beta), items


def _without_pairs(
    rows: Tensor, objective: ObjectiveSettings, beta: float
) -> tuple[dict[str, float], GroupItems]:
    """Metrics and groups of which nothing is ranked."""
    nothing = np.zeros(0)
    items = GroupItems(
        rows.numpy(),
        margins=nothing,
        owner=nothing.astype(np.int64),
        share=nothing,
        beta=beta,
        objective=objective,
    )
    return items.metrics(), items


def _examples(
    batches: Iterable[StepBatch],
    *,
    count: int,
    logps: Callable[[GroupBatch], Logps],
    device: torch.device,
) -> Examples:
    """All examples of the groups, and the log-ratios of their mismatched responses."""
    seen = np.zeros(count, dtype=np.int64)
    found: list[Tensor] = []
    mismatched: list[Tensor] = []
    for batch in batches:
        for part in batch.counted:
            moved = part.to(device)
            scored = logps(moved)
            rows = [moved.places[moved.group], scored.ratios(), scored.policy]
            rows += [desirable_of(moved), moved.weight[moved.group]]
            found.append(torch.stack([row.double().cpu() for row in rows]))
            seen[list(part.rows)] += 1
        for part in batch.counted_mismatched:
            mismatched.append(logps(part.to(device)).ratios().double().cpu())
    if (seen != 1).any():
        raise AssertionError("a held-out group was not measured once")
    place, ratios, policy, desirable, weight = torch.cat(found, dim=1)
    # Of one group all responses are of one batch, whose order stays.
    order = place.argsort(stable=True)
    return Examples(
        place=place[order].long(),
        logratios=ratios[order],
        policy_logps=policy[order],
        desirable=desirable[order] == 1,
        weight=weight[order],
        mismatched=torch.cat(mismatched) if mismatched else torch.zeros(0, dtype=torch.float64),
    )


def group_sums(
    comparison: Comparison, batch: GroupBatch, logratios: Tensor, *, beta: float
) -> Array:
    """Shares of each group of a micro-batch in the entries of ``SUMS``, (G, 12), float64.

    Args:
        comparison: Of the micro-batch.
        batch: The micro-batch.
        logratios: Log-ratio of each response, (N,).
        beta: Strength of the pull towards the reference.
    """
    groups = len(batch.weight)
    dtype = torch.float32 if logratios.device.type == "mps" else torch.float64
    ratios, policy = logratios.to(dtype), comparison.policy_logps.to(dtype)
    scores = beta * ratios
    best = (batch.rank == 1).to(dtype)

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(groups).index_add(0, batch.group, values)

    weight = batch.weight.to(dtype)
    shares = group_shares(scores, batch.group, groups=groups)
    columns: dict[str, Tensor] = {
        "loss": comparison.losses.to(dtype) * weight,
        "weight": weight,
        "groups": torch.ones_like(weight),
        "accuracy": comparison.accuracies.to(dtype),
        "log_z": log_partition(scores, batch.group, groups=groups),
        "best_share": total(best * shares),
        "best": total(best),
        "best_logps": total(best * policy),
        "best_logratios": total(best * ratios),
        "rest": total(1 - best),
        "rest_logps": total((1 - best) * policy),
        "rest_logratios": total((1 - best) * ratios),
    }
    stacked = torch.stack([columns[name].to(dtype) for name in SUMS], dim=1)
    found: Array = stacked.double().cpu().numpy()
    return found


def _pairs(batch: GroupBatch, logratios: Tensor) -> Tensor:
    """Group, margin and share in it of each pair, (3, M), float64."""
    group = batch.places[batch.group[batch.chosen]]
    margins = logratios[batch.chosen] - logratios[batch.rejected]
    return torch.stack([row.double().cpu() for row in (group, margins, batch.pair_share)])


def numbered(keys: Sequence[Any]) -> NDArray[np.int64]:
    """A number for each key, the same for the same ones, in the order of their first places."""
    places: dict[Any, int] = {}
    return np.array([places.setdefault(key, len(places)) for key in keys], dtype=np.int64)
