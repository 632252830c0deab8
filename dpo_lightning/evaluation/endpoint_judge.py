"""A judge that is a language model behind an address. No torch.

It marks each answer, or compares two in both orders; with its client it is imported where it is
named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.endpoint import Endpoint, JudgeQuestion, Spent
from dpo_lightning.evaluation.judges import Judged, Mark
from dpo_lightning.evaluation.mark_cache import MarkCache
from dpo_lightning.evaluation.rubric import (
    QUESTIONS,
    conversation,
    question,
    read_mark,
    read_verdict,
)
from dpo_lightning.evaluation.win_rates import of_both_orders, of_marks, why_withheld
from dpo_lightning.plugins import Prompt
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.settings.judging import EndpointSettings


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
        why = f" (last error: {facts['last_error']})" if "last_error" in facts else ""
        notes.append(
            f"{facts['nonsense']} replies could not be read and {facts['failed']} questions got no "
            f"reply{why}; no mean includes them"
        )
    withheld = why_withheld(values)
    if withheld is not None:
        notes.append(withheld)
    return tuple(notes)
