"""Answers to some prompts, side by side: the recommended configuration's first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpo_lightning.run.page.text import cut
from dpo_lightning.run.page.values import as_rows
from dpo_lightning.sweeps.report.analysis import Analysis
from dpo_lightning.sweeps.report.pooling import Configuration
from dpo_lightning.sweeps.report.read import TrialResult

# More answers side by side than this cannot be compared by a reader.
_MOST_COLUMNS = 7
_MOST_PROMPTS = 6


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers to some prompts, side by side.

    Attributes:
        columns: Label of each that answers, and True if that is the pick, which comes first.
        rows: A prompt and the answer of each.
    """

    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def answers_of(analysis: Analysis) -> Answers | None:
    """Greedy answers where there are any, else drawn ones; one column per configuration."""
    shown = spread(analysis.configurations, analysis.pick, most=_MOST_COLUMNS)
    found = [(c, _texts(c.trials[0])) for c in shown]
    found = [(c, texts) for c, texts in found if texts]
    if not found:
        return None
    picked = [(c, texts) for c, texts in found if c is analysis.pick]
    others = [(c, texts) for c, texts in found if c is not analysis.pick]
    rows = []
    for prompt, (preferred, reference, _) in found[0][1].items():
        if all(prompt in texts for _, texts in found):
            own, rest = ([cut(texts[prompt][2]) for _, texts in part] for part in (picked, others))
            columns = (*own, cut(reference), cut(preferred), *rest)
            rows.append((cut(prompt, keep_end=True), columns))
    heads = [(c.label, True) for c, _ in picked]
    heads += [("reference", False), ("preferred in the data", False)]
    heads += [(c.label, False) for c, _ in others]
    return Answers(tuple(heads), tuple(rows[:_MOST_PROMPTS])) if rows else None


def _texts(trial: TrialResult) -> dict[str, tuple[str, str, str]]:
    """Answers of each prompt: the preferred one, the reference's and the policy's."""
    found: dict[str, tuple[str, str, str]] = {}
    for kind, own in (("answers", "after"), ("samples", "policy")):
        for row in as_rows(trial.evaluation.get(kind)):
            texts = [row.get(name) for name in ("prompt", "preferred", "reference", own)]
            prompt, preferred, reference, policy = (
                text if isinstance(text, str) else "" for text in texts
            )
            found.setdefault(prompt, (preferred, reference, policy))
        if found:
            break
    return found


def spread(
    configurations: Sequence[Configuration], pick: Configuration | None, *, most: int
) -> list[Configuration]:
    """The pick and others at equal distances, by beta where they have one.

    Args:
        configurations: All of them.
        pick: The one that is always among them, if there is one.
        most: Number of them at most, two or more.
    """
    ordered = sorted(
        (c for c in configurations if c.trials),
        key=lambda c: (c.beta is None, c.beta or 0.0, c.label),
    )
    if len(ordered) <= most:
        return ordered
    last = len(ordered) - 1
    places = {round(i * last / (most - 1)) for i in range(most)}
    if pick is not None:
        own = ordered.index(pick)
        # It takes the place of its nearest neighbour.
        places = places - {min(places, key=lambda place: abs(place - own))} | {own}
    return [ordered[place] for place in sorted(places)]
