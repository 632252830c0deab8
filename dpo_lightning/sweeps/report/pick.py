"""The pick of a sweep: who surely loses no more than the margin, and of these the smallest KL.

Not significant is not equal: a configuration qualifies by an upper bound of its loss against the
best, which holds for all configurations at once, never by a difference that was not found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from dpo_lightning.sweeps.report.comparable import MOST_CUT_OFF, cut_off
from dpo_lightning.sweeps.report.intervals import Evidence, LossBounds, against_best
from dpo_lightning.sweeps.report.paired import common_seeds, evidence_of, seeds_of
from dpo_lightning.sweeps.report.pooling import (
    EXACT_KL,
    JUDGED,
    SHARES,
    Configuration,
)

# Of a share; of a metric on another scale a part of what the best has gained.
_MARGIN = 0.02
_MARGIN_OF_GAIN = 0.01

# A guess of how many items would decide: up to so many times what there is, to a part in a hundred,
# from fewer draws than a bound that is shown.
_MOST_TIMES = 1e6
_CLOSE = 0.01
_DRAWS_OF_A_GUESS = 2_000


@dataclass(frozen=True, slots=True)
class PickRule:
    """The rule of the pick as it was asked for.

    Attributes:
        margin: Loss that does not matter, in units of the metric; None takes one by the metric.
        kl_budget: Largest KL of the pick, in nats per answer; None sets no limit.
    """

    margin: float | None = None
    kl_budget: float | None = None


@dataclass(frozen=True, slots=True)
class PickCandidate:
    """A configuration against the best.

    Attributes:
        configuration: The configuration.
        loss: Its observed loss against the best.
        upper: Upper bound of that, for all at once; infinite where no error is known.
        eligible: True if the bound is within the margin, and of the best.
        may_be_best: True if it may be the best in truth.
        kl: Its KL as far as that may decide.
    """

    configuration: Configuration
    loss: float
    upper: float
    eligible: bool
    may_be_best: bool
    kl: float | None


@dataclass(frozen=True, slots=True)
class PickGround:
    """Items and seeds that the bounds of a ranking rest on.

    Attributes:
        unit: What is paired: held-out rows or prompts; None where nothing is.
        items: Number of them.
        seeds: Seeds of each configuration.
        exact: True if the metric has no error but that of the training.
    """

    unit: str | None = None
    items: int | None = None
    seeds: int = 0
    exact: bool = False


@dataclass(frozen=True, slots=True)
class PickDecision:
    """Outcome of the rule.

    Attributes:
        pick: The chosen configuration, None without one; the best where it is undecided.
        best: The one with the best metric of those that take part.
        undecided: True if the held-out items cannot tell the best from others, nor vouch for one.
        margin: The margin that was used.
        kl_budget: The largest KL that was allowed.
        candidates: All that take part, best first.
        left_out: Those that take no part, and why.
        ground: What the bounds rest on.
        rows_needed: About how many of these would decide; None where none would, or need to.
        seeds_needed: About how many seeds would, where rows alone do not.
    """

    pick: Configuration | None = None
    best: Configuration | None = None
    undecided: bool = False
    margin: float = 0.0
    kl_budget: float | None = None
    candidates: tuple[PickCandidate, ...] = ()
    left_out: tuple[tuple[Configuration, str], ...] = ()
    ground: PickGround = field(default_factory=PickGround)
    rows_needed: int | None = None
    seeds_needed: int | None = None

    @property
    def mark(self) -> str:
        """Words beside the pick: nothing undecided is recommended."""
        return "best so far" if self.undecided else "recommended"

    @property
    def eligible(self) -> tuple[PickCandidate, ...]:
        """Those that may be picked."""
        return tuple(c for c in self.candidates if c.eligible)

    def of(self, configuration: Configuration) -> PickCandidate | None:
        """The candidate that a configuration is, None if it takes no part."""
        return next((c for c in self.candidates if c.configuration is configuration), None)


def decide(
    ranked: Sequence[Configuration],
    metric: str,
    rule: PickRule,
    *,
    kl_metric: str | None,
    reference_value: float | None,
) -> PickDecision:
    """Applies the rule.

    Args:
        ranked: Configurations with the metric, which may be ranked together.
        metric: The ranking metric.
        rule: As it was asked for.
        kl_metric: Metric that gives the KL.
        reference_value: The metric of the reference, where it is known.
    """
    kls = [_usable_kl(c, kl_metric) for c in ranked]
    left_out = _left_out(ranked, metric, rule, kls)
    places = [i for i, c in enumerate(ranked) if not any(c is other for other, _ in left_out)]
    if not places:
        return PickDecision(left_out=left_out, kl_budget=rule.kl_budget)
    # Of two that are as good, the closer one is the best.
    places.sort(key=lambda i: (-_mean(ranked[i]), _or_infinite(kls[i])))
    taking = [ranked[i] for i in places]
    evidence = evidence_of(taking, metric)
    bounds = against_best(evidence)
    best = taking[bounds.best]
    margin = rule.margin
    if margin is None:
        margin = _own_margin(metric, evidence.means[bounds.best], reference_value)
    candidates = _candidates(taking, bounds, margin, [kls[i] for i in places])
    within = rule.kl_budget is not None
    undecided = _is_undecided(bounds, margin, within_budget=within)
    rows = _rows_needed(evidence, margin, within_budget=within) if undecided else None
    seeds = _seeds_needed(evidence, bounds, margin) if undecided and rows is None else None
    return PickDecision(
        pick=best if rule.kl_budget is not None else _closest(candidates),
        best=best,
        undecided=undecided,
        margin=margin,
        kl_budget=rule.kl_budget,
        candidates=candidates,
        left_out=left_out,
        ground=PickGround(
            evidence.unit, evidence.items, evidence.seeds, metric.startswith("controlled/")
        ),
        rows_needed=rows,
        seeds_needed=seeds,
    )


def _candidates(
    taking: Sequence[Configuration], bounds: LossBounds, margin: float, kls: Sequence[float | None]
) -> tuple[PickCandidate, ...]:
    """The configurations against the best, that one first."""
    order = sorted(range(len(taking)), key=lambda i: (bounds.loss[i], i != bounds.best))
    return tuple(
        PickCandidate(
            configuration=taking[i],
            loss=float(bounds.loss[i]),
            upper=float(bounds.upper[i]),
            eligible=bool(i == bounds.best or bounds.upper[i] <= margin),
            may_be_best=bool(i == bounds.best or bounds.may_be_best[i]),
            kl=kls[i],
        )
        for i in order
    )


def _mean(configuration: Configuration) -> float:
    return -math.inf if configuration.value is None else configuration.value.mean


def _or_infinite(kl: float | None) -> float:
    return math.inf if kl is None else kl


def _usable_kl(configuration: Configuration, kl_metric: str | None) -> float | None:
    """The KL, None where too many answers were cut off for it."""
    if configuration.kl is None:
        return None
    if kl_metric != EXACT_KL and _is_cut_off(configuration):
        return None
    return configuration.kl.mean


def _is_cut_off(configuration: Configuration) -> bool:
    return (cut_off(configuration.trials) or 0.0) > MOST_CUT_OFF


def _left_out(
    ranked: Sequence[Configuration], metric: str, rule: PickRule, kls: Sequence[float | None]
) -> tuple[tuple[Configuration, str], ...]:
    """Those that cannot be picked, and why."""
    whole = [c for c in ranked if not (metric in JUDGED and _is_cut_off(c))]
    seeds = common_seeds(whole, metric) if whole else ()
    found = []
    for c, kl in zip(ranked, kls, strict=True):
        if metric in JUDGED and _is_cut_off(c):
            share = cut_off(c.trials) or 0.0
            found.append((c, f"{share:.0%} of its answers were cut off at the limit"))
        elif len(seeds_of(c, metric)) != len(seeds):
            own = len(seeds_of(c, metric))
            found.append((c, f"it has {own} of {len(seeds)} seeds"))
        elif rule.kl_budget is not None and (kl is None or kl > rule.kl_budget):
            found.append((c, "its KL is unknown" if kl is None else "its KL is above the budget"))
    return tuple(found)


def _own_margin(metric: str, best: float, reference_value: float | None) -> float:
    if metric in SHARES:
        return _MARGIN
    return 0.0 if reference_value is None else _MARGIN_OF_GAIN * abs(best - reference_value)


def _closest(candidates: Sequence[PickCandidate]) -> Configuration:
    """The smallest KL of those that are eligible; an unknown one is not a small one."""
    known = [
        (c.kl, c.loss, place)
        for place, c in enumerate(candidates)
        if c.eligible and c.kl is not None
    ]
    return candidates[min(known)[2] if known else 0].configuration


def _is_undecided(bounds: LossBounds, margin: float, *, within_budget: bool) -> bool:
    """True if the best may not be it, and nothing else can be vouched for.

    Args:
        bounds: Of all that take part.
        margin: Loss that does not matter.
        within_budget: True if the best is picked, and none beside it.
    """
    others = np.arange(len(bounds.loss)) != bounds.best
    eligible = bounds.upper <= margin
    rivals = others & bounds.may_be_best
    if within_budget:
        return bool((rivals & ~eligible).any())
    return bool(rivals.any() and not (others & eligible).any())


def _rows_needed(evidence: Evidence, margin: float, *, within_budget: bool) -> int | None:
    """About how many items would decide, by the losses as observed; None if no number would.

    The bounds are asked again as they would be of so many items. The variance over items falls
    with their number, that over seeds does not.
    """
    items = evidence.items
    if items is None:
        return None

    def decides(times: float) -> bool:
        more = replace(
            evidence,
            item_covariance=evidence.item_covariance / times,
            floor=evidence.floor / times**2,
        )
        bounds = against_best(more, draws=_DRAWS_OF_A_GUESS)
        return not _is_undecided(bounds, margin, within_budget=within_budget)

    low, high = 0.0, math.log(_MOST_TIMES)
    if not decides(_MOST_TIMES):
        return None
    while high - low > _CLOSE:
        middle = (low + high) / 2
        low, high = (low, middle) if decides(math.exp(middle)) else (middle, high)
    return _rounded(items * math.exp(high))


def _seeds_needed(evidence: Evidence, bounds: LossBounds, margin: float) -> int | None:
    """About how many seeds would decide, by the losses as observed; None if no number would.

    That is: another qualifies, or all others are surely worse.
    """
    if evidence.seeds < 2:
        return None
    others = [i for i in range(len(bounds.loss)) if i != bounds.best]
    qualify = [margin - float(bounds.loss[i]) for i in others]
    worse = [float(bounds.loss[i]) if bounds.may_be_best[i] else math.inf for i in others]

    def count(i: int, gap: float) -> float:
        """Seeds at which as many standard errors as the bounds allow are no more than a gap."""
        variance = float(bounds.item_variance[i] + bounds.seed_variance[i])
        return evidence.seeds * variance * (bounds.quantile / gap) ** 2 if gap > 0 else math.inf

    least = min(
        min(map(count, others, qualify)),
        max(map(count, others, worse)),
    )
    return _rounded(max(least, evidence.seeds + 1)) if math.isfinite(least) else None


def _rounded(count: float) -> int:
    """A count upwards to two digits: it is no more than a guess."""
    scale = 10.0 ** max(0, math.floor(math.log10(max(count, 1.0))) - 1)
    return round(math.ceil(count / scale) * scale)
