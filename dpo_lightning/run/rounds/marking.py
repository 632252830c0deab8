"""Marks of a round's answers, by the judge of the run. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dpo_lightning.data.groups import prompt_of_key
from dpo_lightning.data.marked import MarkedPrompt, pair_numbers
from dpo_lightning.evaluation.judges import Judge, Mark
from dpo_lightning.evaluation.mark_cache import KeptMarks
from dpo_lightning.evaluation.named_judge import is_function, judge_identity
from dpo_lightning.files import ROUNDS_FOLDER
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.run.rounds.asking import Patience, RoundMarker, RoundMarks
from dpo_lightning.settings.judging import JudgeSettings

# Hidden from who reads the folder of rounds as rows.
_MARKS = ".marks"
# Answers of a call: a function may ask somebody for each, and a reward model is loaded for each.
_OF_FUNCTION, _OF_MODEL, _OF_ENDPOINT = 64, 2048, 1024


def make_marker(
    judge: Judge,
    settings: JudgeSettings,
    folder: Path,
    *,
    go_on: str,
    resumed: Path | None = None,
) -> RoundMarker:
    """The marker of a run's rounds.

    Args:
        judge: The run's judge, made so that it may leave answers without a mark.
        settings: Its settings.
        folder: The run's, which keeps the marks of a function or a reward model.
        go_on: What to do once the judge works again, for errors.
        resumed: The folder of the run that this one goes on from, whose marks count too.
    """
    if settings.endpoint is not None:
        # It has waited for each question already, and keeps replies for all runs.
        return RoundMarker(
            judge,
            label="evaluation.judge=endpoint",
            kept=None,
            per_call=_OF_ENDPOINT,
            go_on=go_on,
            patience=Patience(attempts=5, stall=None),
        )
    kept = KeptMarks(
        folder / ROUNDS_FOLDER / _MARKS,
        judge_identity(settings),
        earlier=None if resumed is None else resumed / ROUNDS_FOLDER / _MARKS,
    )
    return RoundMarker(
        judge,
        label=f"evaluation.judge={settings.name}",
        kept=kept,
        per_call=_OF_FUNCTION if is_function(settings) else _OF_MODEL,
        go_on=go_on,
    )


def mark_prompts(
    marker: RoundMarker,
    drawn: Sequence[MarkedPrompt],
    *,
    seed: int,
    round: int,
    show: ShowPhase = unshown,
    check: Callable[[], object] = lambda: None,
) -> tuple[list[MarkedPrompt], RoundMarks]:
    """Prompts with the marks of their answers.

    Of a judge that compares, the disjoint pairs of ``groups=pairs`` are asked for, and the better
    answer of each gets a mark of 1, the other one 0, and both a half where they tie.

    Args:
        marker: Has them marked.
        drawn: The prompts; marks that they have are not looked at.
        seed: Of all draws.
        round: Number of the round, from 1.
        show: Shows how far it is.
        check: Called between two calls of the judge and while it is waited for.

    Raises:
        UserError: If the judge fails for good.
    """
    owners: list[tuple[int, tuple[int, ...]]]
    if marker.gives_marks:
        owners = [(place, (k,)) for place, own in enumerate(drawn) for k in range(len(own.answers))]
    else:
        pairs = pair_numbers(drawn, seed=seed, round=round)
        owners = [(place, pair) for place, own in enumerate(pairs) for pair in own]
    prompts = [prompt_of_key(drawn[place].prompt_key) for place, _ in owners]
    texts = [tuple(drawn[place].texts[k] for k in numbers) for place, numbers in owners]
    found = marker.mark(prompts, texts, round=round, show=show, check=check)
    marks: list[list[Mark]] = [[None] * len(own.answers) for own in drawn]
    for (place, numbers), mark in zip(owners, found.marks, strict=True):
        for sign, number in zip((mark, None if mark is None else 1 - mark), numbers, strict=False):
            marks[place][number] = sign
    return [
        replace(own, marks=tuple(values)) for own, values in zip(drawn, marks, strict=True)
    ], found
