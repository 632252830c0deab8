"""Judges of answers, and those that mark each answer by a function. No torch.

A judge either marks each answer by itself, and of two answers the one with the higher mark is
better, or it compares two answers. Settings choose one in :mod:`named_judge`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dpo_lightning.evaluation.win_rates import of_marks
from dpo_lightning.plugins import Prompt
from dpo_lightning.processes.phases import ShowPhase, unshown

Mark = float | None
"""A number, or None where the judge gave none."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Verdicts on answers and on others to the same prompts.

    Attributes:
        wins: 1 where ours is better, 0 where the other is, 0.5 for a tie, None where it is unknown.
        marks: The mark of each of ours; None where answers were compared without one.
        other_marks: The same of the others.
        facts: Counts, as plain values.
        notes: What a reader of the numbers has to know, a sentence each.
    """

    wins: list[Mark]
    marks: list[Mark] | None = None
    other_marks: list[Mark] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Judge(Protocol):
    """A judge of answers."""

    @property
    def gives_marks(self) -> bool:
        """True if an answer alone gets a number."""

    def mark(
        self, prompts: Sequence[Prompt], answers: Sequence[str], *, show: ShowPhase = unshown
    ) -> tuple[list[Mark], dict[str, Any]]:
        """The mark of each answer, and counts.

        Args:
            prompts: Of the answers.
            answers: Those that are judged.
            show: Shows how far it is.

        Raises:
            UserError: If the judge fails, or gives no marks.
        """

    def compare(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        others: Sequence[str],
        *,
        show: ShowPhase = unshown,
    ) -> Judged:
        """Verdicts on answers and on others to the same prompts.

        Args:
            prompts: Of the answers.
            answers: Those that are judged.
            others: Those that they are compared with.
            show: Shows how far it is.

        Raises:
            UserError: If the judge fails.
        """

    def forecast(self, prompts: Sequence[Prompt], *, answer_tokens: int) -> str | None:
        """The most that a comparison of answers can cost, in words; None where it costs nothing."""


class MarkingJudge:
    """A judge that is a function from prompts and answers to numbers.

    Args:
        function: Marks each answer; its numbers are finite, None stands for no mark.
    """

    gives_marks = True

    def __init__(self, function: Callable[[list[Prompt], list[str]], Sequence[Mark]]) -> None:
        self._function = function

    def mark(
        self, prompts: Sequence[Prompt], answers: Sequence[str], *, show: ShowPhase = unshown
    ) -> tuple[list[Mark], dict[str, Any]]:
        """The mark of each answer, and no counts."""
        with show("judging", total=len(answers), unit="answers") as say:
            marks: list[Mark] = [*self._function(list(prompts), list(answers))]
            say(len(answers))
        return marks, {}

    def compare(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        others: Sequence[str],
        *,
        show: ShowPhase = unshown,
    ) -> Judged:
        """Marks of both, and the outcomes that they make."""
        own, other = (self.mark(prompts, texts, show=show)[0] for texts in (answers, others))
        return Judged([of_marks(a, b) for a, b in zip(own, other, strict=True)], own, other)

    def forecast(self, prompts: Sequence[Prompt], *, answer_tokens: int) -> str | None:
        """Nothing: it asks nobody."""
        return None


class SilentJudge:
    """A judge of nothing, for ranks that leave the judging to the first."""

    gives_marks = True

    def mark(
        self, prompts: Sequence[Prompt], answers: Sequence[str], *, show: ShowPhase = unshown
    ) -> tuple[list[Mark], dict[str, Any]]:
        """A mark of 0 for each answer."""
        return [0.0] * len(answers), {}

    def compare(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        others: Sequence[str],
        *,
        show: ShowPhase = unshown,
    ) -> Judged:
        """A tie for each answer."""
        return Judged([0.5] * len(answers))

    def forecast(self, prompts: Sequence[Prompt], *, answer_tokens: int) -> str | None:
        """Nothing: it asks nobody."""
        return None
