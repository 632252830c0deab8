"""From log-probabilities of responses that count by themselves to loss, sums and metrics.

Every response is an example, desirable or undesirable, with its group's weight; a pair is two. A
step's loss is sum(w * loss) / sum(w) over its examples. The point that rewards are compared with is
one number for all of them: the caller knows it before.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from dpo_lightning.objectives.comparison import SUMS, Comparison, Logps, metrics_from_sums
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.objectives.unpaired import ExampleLogps, evaluate_unpaired

# The entries of a vector of metric sums, in order.
UNPAIRED_SUMS = (
    "loss",
    "weight",
    "groups",
    "anchor",
    "anchors",
    "desirable",
    "desirable_logps",
    "desirable_logratios",
    "undesirable",
    "undesirable_logps",
    "undesirable_logratios",
    "gain",
    "gains",
)

_ANCHORS = {"mismatched": "kto/z0", "running": "bco/delta"}

# Newton steps of the fit of labels by log-ratios, and where it has arrived.
_STEPS = 50
_ARRIVED = 1e-10
_RIDGE = 1e-6
# Where the labels are told apart without an error the scale would grow for ever: a log-ratio of the
# standard deviation counts as so many nats at most.
_LARGEST = 50.0


class LabelledResponses(Protocol):
    """N responses in G groups; a ``GroupBatch`` is such."""

    @property
    def group(self) -> Tensor:
        """Group of each response, numbered 0..G-1 in order, shape (N,), int64."""

    @property
    def rank(self) -> Tensor:
        """Rank of each response, 1 is best, shape (N,), int64."""

    @property
    def weight(self) -> Tensor:
        """Weight of each group, shape (G,), float32."""

    @property
    def desirable(self) -> Tensor | None:
        """True for desirable responses, shape (N,), bool; None where ranks alone say it."""


def desirable_of(batch: LabelledResponses) -> Tensor:
    """Desirable responses, (N,), bool: by their label, else the best of their group."""
    return batch.rank == 1 if batch.desirable is None else batch.desirable


def sum_names(objective: ObjectiveSettings) -> tuple[str, ...]:
    """Entries of the sums that an objective's metrics are made of."""
    return UNPAIRED_SUMS if objective.is_unpaired else SUMS


def metrics_of_sums(
    objective: ObjectiveSettings, sums: list[float], *, beta: float
) -> dict[str, float]:
    """The metrics that users read, made of sums over groups, micro-batches, steps and ranks.

    Args:
        objective: What is minimised.
        sums: In the order of :func:`sum_names`.
        beta: What rewards are multiples of.
    """
    if not objective.is_unpaired:
        return metrics_from_sums(sums, beta=beta)
    total = dict(zip(UNPAIRED_SUMS, sums, strict=True))

    def mean(value: str, count: str) -> float:
        return total[value] / total[count] if total[count] else float("nan")

    found = {"loss": mean("loss", "weight")}
    for kind in ("desirable", "undesirable"):
        ratio = mean(f"{kind}_logratios", kind)
        found |= {
            f"rewards/{kind}": beta * ratio,
            f"logps/{kind}": mean(f"{kind}_logps", kind),
            f"logratios/{kind}": ratio,
        }
    found["logratios/separation"] = found["logratios/desirable"] - found["logratios/undesirable"]
    if objective.anchor in _ANCHORS:
        found[_ANCHORS[objective.anchor]] = mean("anchor", "anchors")
    if total["gains"]:  # of held-out examples alone
        found["label_gain"] = mean("gain", "gains")
    return found


def shown_anchor(objective: ObjectiveSettings, anchor: Tensor, *, beta: float | Tensor) -> Tensor:
    """The anchor as its metric has it: KTO's z0 in nats, BCO's delta in units of reward."""
    return anchor * beta if objective.anchor == "running" else anchor


def anchor_sums(
    objective: ObjectiveSettings, anchor: Tensor, *, beta: float | Tensor, like: Tensor
) -> Tensor:
    """The part of a step's sums that says its anchor, shape (13,).

    Args:
        objective: What is minimised.
        anchor: Of the step, a scalar in nats.
        beta: Of the step.
        like: Sums, for type and place.
    """
    found = torch.zeros_like(like)
    found[UNPAIRED_SUMS.index("anchor")] = shown_anchor(objective, anchor, beta=beta).to(like)
    found[UNPAIRED_SUMS.index("anchors")] = 1
    return found


def judge_examples(
    objective: ObjectiveSettings,
    batch: LabelledResponses,
    logps: Logps,
    *,
    beta: float | Tensor,
    anchor: Tensor | float,
) -> Comparison:
    """Compares each response of a micro-batch with the anchor.

    Args:
        objective: What is minimised; of one loss on single responses.
        batch: The responses.
        logps: Their log-probabilities.
        beta: Strength of the pull towards the reference.
        anchor: Log-ratio that theirs are compared with, in nats, without a gradient.

    Returns:
        The sum of weight times loss over the examples, the sums of ``UNPAIRED_SUMS``, (13,), and
        each group's losses added up. Accuracies are zeros: nothing is ranked.
    """
    logratios, desirable = logps.ratios(), desirable_of(batch)
    losses = example_losses(objective, logratios, desirable, beta=beta, anchor=anchor)
    weight = batch.weight[batch.group]
    loss_sum = (losses * weight).sum()
    with torch.no_grad():
        policy = logps.policy.detach()
        rows = _rows(batch, losses.detach(), desirable, policy, logratios.detach())
        dtype = torch.float32 if policy.device.type == "mps" else torch.float64
        stacked = torch.stack([rows[name].to(dtype).sum() for name in UNPAIRED_SUMS])
        zeros = torch.zeros(len(batch.weight), device=policy.device)
        of_group = zeros.to(losses.dtype).index_add(0, batch.group, losses.detach())
    return Comparison(
        loss=loss_sum,
        sums=stacked,
        accuracies=zeros,
        losses=of_group,
        policy_logps=policy,
        reference_logps=logps.reference,
    )


def example_losses(
    objective: ObjectiveSettings,
    logratios: Tensor,
    desirable: Tensor,
    *,
    beta: float | Tensor,
    anchor: Tensor | float,
) -> Tensor:
    """Loss of each example, (n,) and (n,) -> (n,)."""
    [(name, weight)] = objective.terms.items()
    examples = ExampleLogps(logratios=logratios, desirable=desirable, anchor=anchor)
    options = objective.own_options(name)
    return weight * evaluate_unpaired(name, examples, beta=beta, options=options)


def _rows(
    batch: LabelledResponses,
    losses: Tensor,
    desirable: Tensor,
    policy: Tensor,
    logratios: Tensor,
) -> dict[str, Tensor]:
    """Parts of each response in the entries of ``UNPAIRED_SUMS``, (N,); of groups, (G,)."""
    weight = batch.weight[batch.group]
    good = desirable.to(weight.dtype)
    bad = 1 - good
    nothing = torch.zeros_like(weight)
    return {
        "loss": losses * weight,
        "weight": weight,
        "groups": torch.ones_like(batch.weight),
        "anchor": nothing,
        "anchors": nothing,
        "desirable": good,
        "desirable_logps": good * policy,
        "desirable_logratios": good * logratios,
        "undesirable": bad,
        "undesirable_logps": bad * policy,
        "undesirable_logratios": bad * logratios,
        "gain": nothing,
        "gains": nothing,
    }


# Held-out examples --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Held-out examples of one set, seen once each: all (n,) but for the last.

    Attributes:
        place: Number of the group of each, int64.
        logratios: Policy less reference log-probability, float64.
        policy_logps: The policy's, float64.
        desirable: True for desirable ones, bool.
        weight: Of the group, float64.
        mismatched: Log-ratios of responses behind prompts that are not theirs, (m,), float64.
    """

    place: Tensor
    logratios: Tensor
    policy_logps: Tensor
    desirable: Tensor
    weight: Tensor
    mismatched: Tensor

    def anchor(self, objective: ObjectiveSettings, *, running: float) -> float:
        """Log-ratio that the examples are compared with.

        Args:
            objective: What is minimised; with `mismatched` it is the mean of this set's own.
            running: The mean log-ratio of the training so far.
        """
        if objective.anchor == "mismatched":
            return max(0.0, float(self.mismatched.mean())) if len(self.mismatched) else 0.0
        return running if objective.anchor == "running" else 0.0


def group_rows(
    objective: ObjectiveSettings, examples: Examples, *, count: int, beta: float, anchor: float
) -> Tensor:
    """Parts of each group in the entries of ``UNPAIRED_SUMS``, (count, 13), float64.

    The anchor, and what log-ratios tell about labels, are those of all groups together.

    Args:
        objective: What is minimised.
        examples: All examples.
        count: Number of groups, which the places are numbers of.
        beta: Strength of the pull towards the reference.
        anchor: Log-ratio that all are compared with.
    """
    losses = example_losses(
        objective, examples.logratios, examples.desirable, beta=beta, anchor=anchor
    )
    good = examples.desirable.double()
    bad = 1 - good

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(count).index_add(0, examples.place, values)

    ones = torch.ones(count, dtype=torch.float64)
    shown = shown_anchor(objective, ones * anchor, beta=beta)
    columns = {
        "loss": total(losses * examples.weight),
        "weight": total(examples.weight),
        "groups": ones,
        "anchor": shown,
        "anchors": ones,
        "desirable": total(good),
        "desirable_logps": total(good * examples.policy_logps),
        "desirable_logratios": total(good * examples.logratios),
        "undesirable": total(bad),
        "undesirable_logps": total(bad * examples.policy_logps),
        "undesirable_logratios": total(bad * examples.logratios),
        "gain": total(label_gains(examples.logratios, examples.desirable)),
        "gains": total(torch.ones_like(good)),
    }
    return torch.stack([columns[name] for name in UNPAIRED_SUMS], dim=1)


def measure_examples(
    objective: ObjectiveSettings,
    examples: Examples,
    *,
    beta: float,
    reward_beta: float,
    running: float,
) -> dict[str, float]:
    """Metrics of a set of held-out examples.

    Args:
        objective: What is minimised.
        examples: The examples.
        beta: That of the loss.
        reward_beta: What rewards are multiples of.
        running: The mean log-ratio of the training so far, which BCO compares with.
    """
    # Groups are numbered over all sets: of one set there are as many as it has different ones.
    _, place = examples.place.unique(return_inverse=True)
    own = replace(examples, place=place)
    anchor = own.anchor(objective, running=running)
    count = int(place.max()) + 1 if len(place) else 0
    rows = group_rows(objective, own, count=count, beta=beta, anchor=anchor)
    return metrics_of_sums(objective, rows.sum(0).tolist(), beta=reward_beta)


def label_gains(logratios: Tensor, desirable: Tensor) -> Tensor:
    """Nats that the log-ratio of each example tells about its label.

    The log-loss of the label by the share of desirable ones alone, less that of a logistic in the
    log-ratio. A policy's log-ratios have a scale of its own, by beta, and an offset: the logistic
    has the best of both, the scale at least 0, so that trials of different betas compare.

    Args:
        logratios: Of each example, (n,).
        desirable: True for desirable ones, (n,), bool.

    Returns:
        The gains, (n,), float64. Their mean is between 0, where the log-ratios say nothing, and the
        entropy of the labels.
    """
    ratios, label = logratios.double(), desirable.double()
    share = label.mean() if len(label) else label.sum()
    if not len(label) or share in (0, 1):
        return torch.zeros_like(label)
    spread = ratios.std(correction=0)
    scale, offset = _fit(ratios, label, spread) if spread > 0 else (0.0, float(share.logit()))
    sign = 2 * label - 1
    leads = scale * (ratios - ratios.mean()) + offset
    return softplus(-share.logit() * sign) - softplus(-leads * sign)


def _fit(ratios: Tensor, label: Tensor, spread: Tensor) -> tuple[float, float]:
    """Scale and offset, of deviations from the mean, at which the mean log-loss is least.

    Newton's method in the two, damped by halves: the loss is convex.
    """
    x = (ratios - ratios.mean()) / spread
    design = torch.stack([x, torch.ones_like(x)], dim=1)
    start = torch.stack([label.new_zeros(()), label.mean().logit()])
    # A millionth of a nat keeps the least point finite where nothing is told wrong.
    ridge = x.new_tensor([_RIDGE, 0.0])

    def loss(values: Tensor) -> Tensor:
        logits = design @ values
        return softplus(-logits * (2 * label - 1)).mean() + (ridge * values.square()).sum()

    values = start
    for _ in range(_STEPS):
        share = (design @ values).sigmoid()
        slope = design.T @ (share - label) / len(x) + 2 * ridge * values
        curve = design.T @ (design * (share * (1 - share))[:, None]) / len(x)
        step = torch.linalg.solve(curve + torch.diag(2 * ridge + 1e-12), slope)
        before = loss(values)
        while float(step.abs().max()) > _ARRIVED and loss(values - step) > before:
            step = step / 2
        if float(step.abs().max()) <= _ARRIVED:
            break
        values = values - step
    if values[0] <= 0:
        return 0.0, float(start[1])
    return float(values[0].clamp(max=_LARGEST) / spread), float(values[1])
