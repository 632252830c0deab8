"""Signs of a training that went wrong, in plain values, each with its numbers and the key to turn.

A run may finish with a low loss and be worth nothing. Every sign has thresholds of its own, which
stand in one table with their reason; a sign is said only where all of its thresholds are passed.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Limit:
    """A threshold.

    Attributes:
        value: From where on a sign is one.
        reason: Reason for this value, with its source.
    """

    value: float
    reason: str


LIMITS = {
    "moved_kl": Limit(
        0.02,
        "nats an answer; by Pinsker's inequality nobody could tell such an answer from the "
        "reference's in more than 55 of 100 cases: 0.5 + sqrt(KL / 8)",
    ),
    "moved_margin": Limit(
        0.02, "nats between chosen and rejected, where no KL is measured: the same size"
    ),
    "full_answers": Limit(0.95, "share of the longest answer that the mean answer reaches"),
    "short_data": Limit(
        0.5, "share of it that the mean preferred answer has: those would have ended long before"
    ),
    "repetition": Limit(
        0.5,
        "share of an answer's runs of four words that it has said already; people are at 0.01, "
        "looping models near 0.5 and above (Welleck et al. 2019, arXiv 1908.04319)",
    ),
    "repeating_answers": Limit(0.25, "share of the answers that repeat so"),
    "repeating_beyond_data": Limit(2.0, "times that share among the preferred answers"),
    "fall_per_token": Limit(
        -0.5,
        "nats a token of the chosen answer: each is 40% less likely than under the reference, "
        "though it is to be learned (Razin et al. 2024, arXiv 2410.08847)",
    ),
    "fall": Limit(-5.0, "nats of a whole chosen answer: 150 times less likely"),
    "judged_errors": Limit(
        2.0,
        "standard errors by which a win rate over the reference is above one half: then the "
        "policy went from the chosen answers to better ones, which a low beta asks for",
    ),
    "easy_accuracy": Limit(0.99, "share of the pairs, in all rows of metrics from some step on"),
    "easy_steps": Limit(20, "steps after which that begins; preferences of people take hundreds"),
    "easy_rows": Limit(5, "rows of metrics that say so, that it is no luck of one batch"),
    "length_agreement": Limit(
        0.85,
        "share of the pairs in which the policy prefers the longer answer, or the shorter one "
        "(Singhal et al. 2023, arXiv 2310.03716)",
    ),
    "length_lead": Limit(
        0.05, "by which the policy's accuracy is above that of the lengths alone, at most"
    ),
    "length_pairs": Limit(50, "pairs of unequal length: below, a share is off by 0.1 and more"),
}
"""The thresholds of all signs."""

# Runs of words that are counted, and the fewest words of an answer that has enough of them.
_RUN = 4
_FEWEST_WORDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Measurements of a run that has ended; what was not measured is None or empty.

    Attributes:
        metrics: The last value of each metric.
        accuracies: Steps and training accuracies, in the order of the steps.
        steps: Optimizer steps taken.
        learning_rate: The peak.
        greedy: Greedy answers to the same prompts before and after the training.
        answers: Answers that the trained policy drew.
        preferred: Preferred answers of the data to the same prompts.
        longest: Most tokens of a drawn answer.
        preferred_tokens: Mean tokens of the held-out preferred answers.
        pairs: Of each held-out pair the tokens of the better answer, of the worse one, and the
            policy's accuracy on it.
    """

    metrics: dict[str, float]
    accuracies: Sequence[tuple[int, float]] = ()
    steps: int = 0
    learning_rate: float | None = None
    greedy: Sequence[tuple[str, str]] = ()
    answers: Sequence[str] = ()
    preferred: Sequence[str] = ()
    longest: int | None = None
    preferred_tokens: float | None = None
    pairs: Sequence[tuple[int, int, float]] = ()


@dataclass(frozen=True, slots=True)
class Sign:
    """A sign that was found.

    Attributes:
        name: Its name.
        values: The numbers that show it.
        says: One sentence for the user, with the numbers and the keys to turn.
    """

    name: str
    values: dict[str, float] = field(default_factory=dict)
    says: str = ""

    def entry(self) -> dict[str, Any]:
        """The sign as an entry of ``result.json``."""
        return asdict(self)


def _limit(name: str) -> float:
    return LIMITS[name].value


def find_signs(facts: Facts) -> list[Sign]:
    """All signs of a run.

    Args:
        facts: Measurements of the run.
    """
    found = (
        hardly_moved(facts),
        never_ends(facts),
        repeats_itself(facts),
        both_fall(facts),
        too_easy(facts),
        follows_length(facts),
    )
    return [sign for sign in found if sign is not None]


def hardly_moved(facts: Facts) -> Sign | None:
    """The policy is still the reference: no KL, no margin, no changed greedy answer."""
    kl = facts.metrics.get("samples/kl")
    margin = facts.metrics.get(
        "eval/logratios/margins", facts.metrics.get("train/logratios/margins")
    )
    if kl is not None:
        name, size, words = "kl", kl, f"KL {kl:.2g} nats an answer"
        moved = kl >= _limit("moved_kl")
    elif margin is not None:
        name, size, words = "margin", margin, f"a margin of {margin:.2g} nats"
        moved = abs(margin) >= _limit("moved_margin")
    else:
        return None
    changed = sum(before != after for before, after in facts.greedy)
    if moved or changed or not facts.steps:
        return None
    values = {name: size, "changed_answers": float(changed), "steps": float(facts.steps)}
    if facts.greedy:
        words += f", {changed} of {len(facts.greedy)} greedy answers changed"
    rate = "" if facts.learning_rate is None else f" at optimizer.lr={facts.learning_rate:g}"
    return Sign(
        "hardly_moved",
        values,
        f"the policy hardly moved: {words} after {facts.steps} steps{rate}; raise optimizer.lr or "
        "trainer.max_steps, or lower beta",
    )


def never_ends(facts: Facts) -> Sign | None:
    """Drawn answers go on to their limit where preferred ones end long before."""
    mean, longest, preferred = (
        facts.metrics.get("samples/length"),
        facts.longest,
        facts.preferred_tokens,
    )
    if mean is None or not longest or preferred is None:
        return None
    if mean < _limit("full_answers") * longest or preferred > _limit("short_data") * longest:
        return None
    return Sign(
        "never_ends",
        {"answer_tokens": mean, "longest": float(longest), "preferred_tokens": preferred},
        f"answers do not end: {mean:.3g} of at most {longest} tokens on average, where preferred "
        f"answers have {preferred:.3g}; lower optimizer.lr, raise beta, or add loss.rpo_alpha=1",
    )


def repetition(text: str) -> float | None:
    """Share of a text's runs of four words that it has said already; None of a short text.

    Example:
        >>> repetition("a b c d " * 6), repetition("too short")
        (0.8095238095238095, None)
    """
    words = text.split()
    if len(words) < _FEWEST_WORDS:
        return None
    runs = [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]
    return 1 - len(set(runs)) / len(runs)


def _repeating(texts: Sequence[str]) -> float | None:
    """Share of the texts that repeat themselves; None where all are short."""
    found = [value for text in texts if (value := repetition(text)) is not None]
    if not found:
        return None
    return sum(value >= _limit("repetition") for value in found) / len(texts)


def repeats_itself(facts: Facts) -> Sign | None:
    """Drawn answers say the same again and again, and preferred ones do not."""
    share, usual = _repeating(facts.answers), _repeating(facts.preferred) or 0.0
    if share is None or share < _limit("repeating_answers"):
        return None
    if share < _limit("repeating_beyond_data") * usual:
        return None
    return Sign(
        "repeats_itself",
        {"repeating_answers": share, "repeating_preferred": usual},
        f"answers repeat themselves: {share:.0%} of them, and {usual:.0%} of the preferred ones; "
        "lower optimizer.lr, raise beta, or add loss.rpo_alpha=1",
    )


def _judged_better(metrics: dict[str, float]) -> bool:
    """True if a judge, or the true reward where it is known, finds the policy's answers better."""
    own, reference = (metrics.get(f"controlled/{x}_reward") for x in ("expected", "reference"))
    if own is not None and reference is not None:
        return own > reference
    wins, error = (metrics.get(f"samples/win_rate{x}") for x in ("", "_stderr"))
    return wins is not None and error is not None and wins - _limit("judged_errors") * error > 0.5


def both_fall(facts: Facts) -> Sign | None:
    """The chosen answers too have become far less likely than under the reference."""
    chosen = facts.metrics.get("eval/logratios/chosen")
    rejected = facts.metrics.get("eval/logratios/rejected")
    if chosen is None or rejected is None or not facts.preferred_tokens:
        return None
    per_token = chosen / facts.preferred_tokens
    if chosen > _limit("fall") or rejected > _limit("fall"):
        return None
    if per_token > _limit("fall_per_token") or _judged_better(facts.metrics):
        return None
    return Sign(
        "both_fall",
        {"chosen": chosen, "rejected": rejected, "chosen_per_token": per_token},
        f"chosen and rejected both fell far: log-ratios of {chosen:.3g} and {rejected:.3g} nats, "
        f"{per_token:.2g} a token of the chosen; raise beta, lower optimizer.lr, or add "
        "loss.rpo_alpha=1",
    )


def too_easy(facts: Facts) -> Sign | None:
    """The pairs are told apart within a few steps: by something else than quality, most often."""
    rows = list(facts.accuracies)
    easy = len(rows)
    while easy and rows[easy - 1][1] >= _limit("easy_accuracy"):
        easy -= 1
    told = rows[easy:]
    if len(told) < _limit("easy_rows") or told[0][0] > _limit("easy_steps"):
        return None
    accuracy = statistics.fmean(value for _, value in told)
    return Sign(
        "too_easy",
        {"accuracy": accuracy, "step": float(told[0][0])},
        f"accuracy is {accuracy:.3g} from step {told[0][0]} on: something simple tells the pairs "
        "apart, such as a format or a source of their own; look at the rows of data.train, or "
        "lower optimizer.lr",
    )


def follows_length(facts: Facts) -> Sign | None:
    """The policy prefers by length, and length alone would do as well."""
    unequal = [pair for pair in facts.pairs if pair[0] != pair[1]]
    if len(unequal) < _limit("length_pairs"):
        return None
    accuracy = statistics.fmean(right for _, _, right in unequal)
    longer_right = statistics.fmean(float(better > worse) for better, worse, _ in unequal)
    agreed = statistics.fmean(
        right if better > worse else 1 - right for better, worse, right in unequal
    )
    word, rule = "longer", longer_right
    if agreed < 0.5:
        word, rule, agreed = "shorter", 1 - longer_right, 1 - agreed
    if agreed < _limit("length_agreement") or accuracy - rule > _limit("length_lead"):
        return None
    correlation = _correlation(unequal)
    return Sign(
        "follows_length",
        {
            "agreement": agreed,
            "length_accuracy": rule,
            "accuracy": accuracy,
            "correlation": correlation,
        },
        f"length explains the gain: the policy prefers the {word} answer in {agreed:.0%} of the "
        f"pairs, and that alone is right in {rule:.0%}, the policy in {accuracy:.0%} (correlation "
        f"with the difference of lengths {correlation:.2f}); try loss=sigmoid_norm, loss=simpo or "
        "loss.ld_alpha=0.5",
    )


def _correlation(pairs: Sequence[tuple[int, int, float]]) -> float:
    """Correlation of the difference of lengths with the answer that the policy prefers."""
    # Both ways round, so that neither depends on which answer is named first.
    lengths = [float(s * (better - worse)) for better, worse, _ in pairs for s in (1, -1)]
    leaning = [s * (2 * right - 1) for _, _, right in pairs for s in (1, -1)]
    if not any(lengths) or not any(leaning):
        return 0.0
    return statistics.correlation(lengths, leaning)
