"""Judges of answers: functions of a user's own modules, reward models, language models. No torch.

A judge either marks each answer by itself, and of two answers the one with the higher mark is
better, or it compares two answers. A reward model is loaded by :mod:`scorers`, when it is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.endpoint import Endpoint, JudgeQuestion, Spent
from dpo_lightning.evaluation.mark_cache import MarkCache
from dpo_lightning.evaluation.rubric import (
    QUESTIONS,
    conversation,
    question,
    read_mark,
    read_verdict,
)
from dpo_lightning.evaluation.win_rates import of_both_orders, of_marks, why_withheld
from dpo_lightning.plugins import SCORERS, Prompt, ScoreFunction, find_scorer
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.settings.judging import EndpointSettings, JudgeSettings

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


def make_judge(
    settings: JudgeSettings, *, reward_model: Callable[[str], ScoreFunction] | None = None
) -> Judge:
    """The judge that the settings name, checked as far as it can be beforehand.

    Args:
        settings: Its settings.
        reward_model: Loads one by folder or hub id; None: it is looked at and not loaded.

    Raises:
        UserError: If there is no such function or model.
    """
    if settings.endpoint is not None:
        return EndpointJudge(settings.endpoint, cache=settings.cache)
    name = settings.name
    function = find_scorer(name, settings.plugins)
    if function is None:
        _check_is_model(name, settings.plugins)
        assert reward_model is not None, "a reward model needs torch"
        function = reward_model(name)
    return MarkingJudge(partial(checked_marks, name, function))


def is_function(settings: JudgeSettings) -> bool:
    """True if the judge is a function of a plugin."""
    return settings.endpoint is None and find_scorer(settings.name, settings.plugins) is not None


def checked_marks(
    name: str, function: ScoreFunction, prompts: Sequence[Prompt], answers: Sequence[str]
) -> list[float]:
    """Marks of a function, of which each has to be a finite number.

    Args:
        name: The judge's, for messages.
        function: Marks them.
        prompts: Of the answers.
        answers: To be marked.

    Raises:
        UserError: If it fails, or gives something else.
    """
    try:
        marks = [float(value) for value in function(list(prompts), list(answers))]
    except UserError:
        raise
    except Exception as error:  # the user's own code
        raise UserError(f"evaluation.judge={name}: {type(error).__name__}: {error}") from error
    if len(marks) != len(answers):
        raise UserError(
            f"evaluation.judge={name}: {len(marks)} marks for {len(answers)} answers; it takes a "
            "list of prompts and a list of answers and returns a number for each"
        )
    if not all(map(math.isfinite, marks)):
        raise UserError(f"evaluation.judge={name}: a mark is not finite")
    return marks


def _check_is_model(name: str, plugins: Sequence[str]) -> None:
    if plugins and "/" not in name and not Path(name).exists():
        known = ", ".join(sorted(SCORERS)) or "none"
        raise UserError(
            f"evaluation.judge={name}: no plugin registers it (registered: {known}); it may be "
            f"{plugins[0]}.<function>, or a folder or hub id of a reward model"
        )


class MarkingJudge:
    """A judge that is a function from prompts and answers to numbers.

    Args:
        function: Marks each answer; its numbers are finite.
    """

    gives_marks = True

    def __init__(self, function: Callable[[list[Prompt], list[str]], Sequence[float]]) -> None:
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


class EndpointJudge:
    """A judge that is a language model behind an address.

    Args:
        settings: Its settings.
        cache: Folder of its replies.
        wait: Waits between attempts; None: real seconds.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        *,
        cache: Path,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._form = settings.form
        self._bounded = settings.template is None
        self._template = settings.template or QUESTIONS[settings.form]
        self._endpoint = Endpoint(
            settings, template=self._template, cache=MarkCache(cache), wait=wait
        )

    @property
    def gives_marks(self) -> bool:
        """True if it is asked for a number for each answer."""
        return self._form == "marks"

    def mark(
        self, prompts: Sequence[Prompt], answers: Sequence[str], *, show: ShowPhase = unshown
    ) -> tuple[list[Mark], dict[str, Any]]:
        """The mark of each answer, None where the reply had none, and counts.

        Raises:
            UserError: If it compares answers, or takes no question.
        """
        if not self.gives_marks:
            raise UserError(
                "evaluation.judge_form=pairs compares two answers; name others with --against, or "
                "use evaluation.judge_form=marks"
            )
        asked = [
            self._question(prompt, {"answer": answer.strip()})
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        read = partial(read_mark, bounded=self._bounded)
        values, spent = self._endpoint.ask(asked, read, show=show)
        marks = [None if value is None else float(value) for value in values]
        return marks, self._endpoint.facts(spent) | _said_of(spent)

    def compare(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        others: Sequence[str],
        *,
        show: ShowPhase = unshown,
    ) -> Judged:
        """Marks of both, or each pair in both orders.

        Raises:
            UserError: If it takes no question.
        """
        if not self.gives_marks:
            return self._in_both_orders(prompts, answers, others, show)
        marks, facts = self.mark([*prompts, *prompts], [*answers, *others], show=show)
        own, other = marks[: len(answers)], marks[len(answers) :]
        wins = [of_marks(a, b) for a, b in zip(own, other, strict=True)]
        return Judged(wins, own, other, facts, _notes(wins, facts))

    def _in_both_orders(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[str],
        others: Sequence[str],
        show: ShowPhase,
    ) -> Judged:
        pairs = [
            (place, prompt, one.strip(), two.strip())
            for place, (prompt, one, two) in enumerate(zip(prompts, answers, others, strict=True))
            # Two equal answers are a tie, which nobody has to be asked for.
            if one.strip() != two.strip()
        ]
        orders = [(p, {"first": a, "second": b}) for _, p, a, b in pairs]
        orders += [(p, {"first": b, "second": a}) for _, p, a, b in pairs]
        asked = [self._question(prompt, texts) for prompt, texts in orders]
        values, spent = self._endpoint.ask(asked, read_verdict, show=show)
        said = [None if value is None else str(value) for value in values]
        wins: list[Mark] = [0.5] * len(answers)
        disagreed = 0
        for (place, *_), first, swapped in zip(
            pairs, said[: len(pairs)], said[len(pairs) :], strict=True
        ):
            wins[place] = of_both_orders(first, swapped)
            disagreed += first == swapped and first in ("first", "second")
        facts = self._endpoint.facts(spent) | _said_of(spent)
        facts |= {"equal": len(answers) - len(pairs), "disagreed": disagreed}
        return Judged(wins, facts=facts, notes=_notes(wins, facts))

    def forecast(self, prompts: Sequence[Prompt], *, answer_tokens: int) -> str | None:
        """The most that a comparison can cost, with two of its tokens for each of an answer's."""
        texts = [self._question(prompt, {}).text for prompt in prompts]
        size = sum(len(text.encode()) for text in texts)
        own = 2 * answer_tokens * (1 if self.gives_marks else 2)
        count = 2 * len(texts)
        return f"{count} questions, {self._endpoint.upper_bound(2 * size + own * count, count)}"

    def _question(self, prompt: Prompt, texts: Mapping[str, str]) -> JudgeQuestion:
        written = question(self._template, {"prompt": conversation(prompt), **texts})
        return JudgeQuestion({"prompt": prompt, **texts}, written)


def _said_of(spent: Spent) -> dict[str, Any]:
    return {} if spent.last_error is None else {"last_error": spent.last_error}


def _notes(values: Sequence[Mark], facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Sentences about what the judge did not do."""
    notes = []
    lost = facts["nonsense"] + facts["failed"]
    if lost:
        why = f", the last one as {facts['last_error']}" if "last_error" in facts else ""
        notes.append(
            f"{facts['nonsense']} replies were nonsense and {facts['failed']} questions got none"
            f"{why}; they count in no mean"
        )
    withheld = why_withheld(values)
    if withheld is not None:
        notes.append(withheld)
    return tuple(notes)
