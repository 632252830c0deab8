"""Prompts of a run's own data, and the answers that mixtures of its two models draw to them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lightning.data.controlled import MAX_TOKENS, ControlledTask, word_values
from dpo_lightning.data.tokens import Ids
from dpo_lightning.evaluation.interpolated import Pair, draw_mixed, score_mixed
from dpo_lightning.evaluation.judges import Judge
from dpo_lightning.evaluation.one_policy import Drawn, Mixture, gather
from dpo_lightning.evaluation.sampling import Precision, answer_prompts, end_ids
from dpo_lightning.models.loading import max_positions
from dpo_lightning.models.source import ModelSource
from dpo_lightning.plugins import Prompt
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.settings.judging import judge_label, longest_answer
from dpo_lightning.settings.schema import Config

# Answers of each mixture that are kept to be read.
_KEPT = 4


@dataclass(frozen=True, slots=True)
class Questions:
    """Prompts, and how answers to them are marked.

    Attributes:
        ids: Token ids of each.
        texts: As their rows have them.
        task: The controlled task, if they are its own.
        marker: The judge, of rows.
    """

    ids: Sequence[Ids]
    texts: Sequence[Prompt]
    task: ControlledTask | None
    marker: Judge | None

    def judge(
        self, text: Callable[[Ids], str], owners: Sequence[int]
    ) -> Callable[[Sequence[Ids]], Sequence[float]] | None:
        """A function that marks answers; None where nothing does.

        Args:
            text: Token ids as text.
            owners: The prompt of each answer.
        """
        if self.task is not None:
            values = [[0.0, *row] for row in word_values()]
            return lambda answers: [
                sum(values[prompt][token] for token in ids.tolist())
                for prompt, ids in zip(owners, answers, strict=True)
            ]
        marker = self.marker
        if marker is None:
            return None
        questions = [self.texts[prompt] for prompt in owners]

        def mark(answers: Sequence[Ids]) -> list[float]:
            marks, _ = marker.mark(questions, [text(ids) for ids in answers])
            return [value for value in marks if value is not None]

        return mark


class Drawer:
    """Draws and scores the answers.

    Args:
        config: The run's settings.
        source: Its model's source.
        pair: Policy and reference.
        questions: The prompts.
        precision: The context to compute in.
        show: Shows how far the drawing is.

    Attributes:
        longest: Tokens of the longest answer.
        precision: The context to compute in.
    """

    def __init__(
        self,
        config: Config,
        source: ModelSource,
        pair: Pair,
        questions: Questions,
        precision: Precision,
        show: ShowPhase = unshown,
    ) -> None:
        longest = longest_answer(config)
        if questions.task is not None:
            longest = min(longest, MAX_TOKENS)
        positions = max_positions(source.config)
        if positions is not None:
            longest = min(longest, positions - max(map(len, questions.ids)))
        self.longest = longest
        self._batch_size = config.evaluation.batch_size
        self._judge = None if questions.marker is None else judge_label(config.evaluation)
        self._tokenizer = source.tokenizer
        self._pair = pair
        self._questions = questions
        self.precision = precision
        self._show = show

    def draw(self, mixtures: Sequence[Mixture]) -> Drawn:
        """All answers, with their log-probabilities and marks."""
        prompts = self._questions.ids
        answers = [self._answers(mixture) for mixture in mixtures]
        owners = [
            prompt
            for mixture in mixtures
            for prompt in range(len(prompts))
            for _ in range(mixture.count)
        ]
        _say(f"scoring {len(owners)} answers")
        return gather(
            mixtures,
            answers,
            score=lambda ids, own: score_mixed(
                self._pair,
                [prompts[i] for i in owners],
                ids,
                own=own,
                lambdas=[mixture.lam for mixture in mixtures],
                pad=self._tokenizer.eos_token_id,
                precision=self.precision,
            ),
            judge=self._questions.judge(self._text, owners),
            prompts=len(prompts),
        )

    @property
    def pad(self) -> int:
        """A token id to stand where nothing is."""
        pad: int = self._tokenizer.eos_token_id
        return pad

    def drawn_at(self, lam: float, *, count: int, seed: int) -> tuple[list[Ids], list[Ids]]:
        """Answers of one place to all prompts, and the prompt of each.

        Args:
            lam: The place.
            count: Answers to each prompt.
            seed: Of all draws.
        """
        prompts = [ids for ids in self._questions.ids for _ in range(count)]
        return prompts, self._answers(Mixture(lam, count, seed))

    def _answers(self, mixture: Mixture) -> list[Ids]:
        """Answers of one mixture, all of one prompt together."""
        prompts = [ids for ids in self._questions.ids for _ in range(mixture.count)]
        names = {0.0: "the reference", 1.0: "the policy"}
        _say(f"drawing {len(prompts)} answers of {names.get(mixture.lam, f'λ {mixture.lam:g}')}")
        asked: dict[str, Any] = {
            "max_new_tokens": self.longest,
            "batch_size": self._batch_size,
            "seed": mixture.seed,
            "precision": self.precision,
            "show": self._show,
        }
        pair = self._pair
        if mixture.lam in (0.0, 1.0):  # one of the models alone
            model = pair.policy if mixture.lam else pair.reference
            return answer_prompts(model, pair.scorer, self._tokenizer, prompts, **asked)
        return draw_mixed(pair, self._tokenizer, prompts, mixture.lam, **asked)

    def _text(self, ids: Ids) -> str:
        text: str = self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text

    def samples(self, drawn: Drawn, number: int) -> list[dict[str, Any]]:
        """A few answers of a mixture, to different prompts."""
        first = drawn.of(number).start
        asked = zip(self._questions.ids, drawn.answers, strict=True)
        return [
            {"prompt": self._text(prompt).strip(), "response": self._text(answers[first]).strip()}
            for prompt, answers in list(asked)[:_KEPT]
        ]

    def facts(self, drawn: Drawn) -> dict[str, Any]:
        """Facts of the drawing, and the share of the answers that were cut off."""
        ends = end_ids(self._pair.policy, self._tokenizer)
        own = [drawn.answers[p][drawn.of(1)] for p in range(len(drawn.answers))]
        cut = [
            len(ids) >= self.longest and int(ids[-1]) not in ends for part in own for ids in part
        ]
        return {
            "prompts": len(drawn.answers),
            "answers": {f"{mixture.lam:g}": mixture.count for mixture in drawn.mixtures},
            "temperature": 1.0,
            "max_new_tokens": self.longest,
            "policy_cut_off": sum(cut) / len(cut),
            "judge": "true reward" if self._questions.task is not None else self._judge,
        }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
