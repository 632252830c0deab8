"""The pick of a sweep in words: why this one, against how many, and what would decide."""

from __future__ import annotations

from dpo_lightning.run.page.text import number_text
from dpo_lightning.sweeps.report.comparable import MOST_CUT_OFF
from dpo_lightning.sweeps.report.pick import PickCandidate, PickDecision
from dpo_lightning.sweeps.report.pooling import METRICS, Configuration

_LIMIT = f"{MOST_CUT_OFF:.0%}"


def reason_of(decision: PickDecision, metric: str) -> str:
    """The reason of the pick, a few sentences; or why there is none.

    Args:
        decision: Outcome of the rule.
        metric: The ranking metric.
    """
    if decision.pick is None or decision.best is None:
        return " ".join([_no_pick(decision, metric), *_left_out(decision)])
    said = [_why(decision, metric)]
    if decision.undecided:
        said.append(_what_would_decide(decision))
    if decision.pick.unfinished:
        said.append(f"Of its trials {decision.pick.unfinished} did not finish and do not count.")
    said += _left_out(decision)
    if len(decision.candidates) > 1 and decision.ground.seeds < 2:
        said.append("Each has one seed, so the variance of training is not covered.")
    return " ".join(said)


def _no_pick(decision: PickDecision, metric: str) -> str:
    if decision.kl_budget is not None:
        kls = [c.kl.mean for c, _ in decision.left_out if c.kl is not None]
        least = f", the smallest is {number_text(min(kls))}" if kls else ""
        return (
            f"No pick: no configuration has a known KL within sweep.kl_budget="
            f"{decision.kl_budget:g} nats per answer{least}; raise it, or try a larger β."
        )
    return (
        f"No pick by the {METRICS[metric]}: more than {_LIMIT} of the answers were cut off at "
        "evaluation.max_new_tokens, and what is cut off has neither a mark nor a KL; raise it."
    )


def _why(decision: PickDecision, metric: str) -> str:
    best, pick = decision.candidates[0], decision.pick
    assert pick is not None
    chosen = decision.of(pick)
    assert chosen is not None
    name, top = METRICS[metric], _value(best.configuration)
    within = ""
    if decision.kl_budget is not None:
        within = f" within {decision.kl_budget:g} nats of the reference"
    others = len(decision.candidates) - 1
    if not others:
        only = "configuration left" if decision.left_out else "finished configuration"
        return f"{pick.label} is the only {only}{within}: {name} {top}."
    if decision.undecided:
        rivals = [c for c in decision.candidates[1:] if c.may_be_best]
        rest = "one other" if len(rivals) == 1 else f"{len(rivals)} others"
        return (
            f"Undecided: {pick.label} has the best {name}{within}, {top}, but {rest} may be as "
            f"good or better{_basis(decision)}, and none surely loses at most the margin of "
            f"{number_text(decision.margin)}."
        )
    if pick is not best.configuration:
        return _closer(decision, best, chosen, name)
    kl = "" if chosen.kl is None else f", KL {number_text(chosen.kl)} nats"
    eligible = len(decision.eligible)
    if decision.kl_budget is not None:
        return f"{pick.label} has the best {name}{within}, {top}{kl}{_basis(decision)}."
    if eligible == 1:
        return f"{pick.label} has the best {name}, {top}; all others are worse{_basis(decision)}."
    known = all(c.kl is not None for c in decision.eligible)
    closest = "is the closest to the reference" if known else "is not known to be farther"
    if chosen.kl is None:
        closest = "without a KL nothing says which is closer to the reference"
        return (
            f"{pick.label} has the best {name}, {top}; {eligible - 1} more lose at most "
            f"{number_text(decision.margin)}{_basis(decision)}, and {closest}."
        )
    return (
        f"{pick.label} has the best {name}, {top}, and of the {eligible} configurations that lose "
        f"at most {number_text(decision.margin)}{_basis(decision)} it {closest}: KL "
        f"{number_text(chosen.kl)} nats."
    )


def _closer(decision: PickDecision, best: PickCandidate, chosen: PickCandidate, name: str) -> str:
    text = (
        f"{chosen.configuration.label}: its {name}, {_value(chosen.configuration)}, is below the "
        f"best, {_value(best.configuration)} of {best.configuration.label}, by at most "
        f"{number_text(chosen.upper)}{_basis(decision)}, within the margin of "
        f"{number_text(decision.margin)}; of the {len(decision.eligible)} configurations for which "
        f"that holds it stays closest to the reference: KL {number_text(chosen.kl)} nats"
    )
    return f"{text}{'' if best.kl is None else f', not {number_text(best.kl)}'}."


def _basis(decision: PickDecision) -> str:
    """Items and seeds that the bounds rest on, in brackets."""
    if decision.ground.exact and decision.ground.seeds < 2:
        return " (exact for these trials)"
    over = []
    if decision.ground.items is not None:
        over.append(f"{decision.ground.items:,} {decision.ground.unit}")
    if decision.ground.seeds > 1:
        over.append(f"{decision.ground.seeds} seeds")
    paired = f"paired over {' and '.join(over)}" if over else "not paired"
    return f" (95% for all {len(decision.candidates)} at once, {paired})"


def _what_would_decide(decision: PickDecision) -> str:
    if decision.rows_needed is not None:
        return (
            f"About {decision.rows_needed:,} {decision.ground.unit} would decide, if the "
            f"differences stay as they are; there are {decision.ground.items:,}."
        )
    if decision.seeds_needed is not None:
        return (
            f"No number of rows would decide alone, as seeds differ too much; about "
            f"{decision.seeds_needed:,} seeds would."
        )
    if decision.ground.items is None and not decision.ground.exact:
        return "Results by held-out row, which could be paired, are missing."
    return "The best are the same in what was measured; no number of rows would tell them apart."


def _left_out(decision: PickDecision) -> list[str]:
    """A sentence for each reason why some take no part."""
    labels: dict[str, list[str]] = {}
    for c, why in decision.left_out:
        labels.setdefault(why, []).append(c.label)
    return [
        f"{'; '.join(who)} {'takes' if len(who) == 1 else 'take'} no part: {why}."
        for why, who in labels.items()
    ]


def _value(configuration: Configuration) -> str:
    return number_text(None if configuration.value is None else configuration.value.mean)
