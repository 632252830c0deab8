"""Answers of the policy: a few to read, many to measure KL divergence and judge by."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.evaluation.backends import BackendDrawer
from dpo_lightning.evaluation.sampling import (
    Precision,
    answer_prompts,
    end_ids,
)
from dpo_lightning.models.sharding import is_sharded
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.reference.pair import Models

log = logging.getLogger(__name__)

COLUMNS = ("prompt", "preferred", "reference", "before", "after")

# Prompts whose greedy answers are shown.
SHOWN = 4


@dataclass(frozen=True, slots=True)
class Answering:
    """Settings for answering prompts.

    Attributes:
        tokenizer: The policy's tokenizer.
        max_new_tokens: Longest answer, in tokens.
        batch_size: Answers that are drawn at once.
        precision: The context to compute in.
        positions: Those of the model, where they and not the settings end an answer.
        cuts: False where no answer is longer by the task's own rules.
        drawer: Draws by another backend; None: transformers does.
        show: Shows how far long phases are.
    """

    tokenizer: Any
    max_new_tokens: int
    batch_size: int
    precision: Precision
    positions: int | None = None
    cuts: bool = True
    drawer: BackendDrawer | None = None
    show: ShowPhase = unshown

    def text(self, ids: Ids) -> str:
        """Token ids as text, without special tokens."""
        text: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text

    def preferred(self, group: TokenGroup) -> str:
        """The preferred answer of the data as text; empty where the only one is undesirable."""
        return "" if group.preferred is None else self.text(group.preferred).strip()

    def answers(
        self, models: Models, model: Any, prompts: Sequence[Ids], *, seed: int | None
    ) -> list[Ids]:
        """Answers of one of the models; drawn with a seed, greedy without.

        The few that are greedy are to be read, and always transformers'.
        """
        who = "policy" if model is models.policy else "reference"
        if self.drawer is not None and seed is not None and self.drawer.draws(who):
            return self.drawer.answers(
                who,
                model,
                prompts,
                ends=end_ids(model, self.tokenizer),
                max_new_tokens=self.max_new_tokens,
                seed=seed,
            )
        return answer_prompts(
            model,
            models.scorer,
            self.tokenizer,
            prompts,
            max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size,
            seed=seed,
            precision=self.precision,
            show=self.show,
        )


def cut_off_count(answers: Sequence[Ids], ends: Sequence[int], answering: Answering) -> int:
    """Number of answers that ended at the limit and not by themselves.

    Args:
        answers: Token ids of each answer.
        ends: Tokens that end an answer.
        answering: How they were drawn.
    """
    if not answering.cuts:
        return 0
    limit = answering.max_new_tokens
    return sum(len(ids) >= limit and int(ids[-1]) not in ends for ids in answers)


def cut_off_note(answers: Sequence[Ids], ends: Sequence[int], answering: Answering) -> str | None:
    """A line to say once where most answers ended at the limit and not by themselves.

    Args:
        answers: Token ids of each answer.
        ends: Tokens that end an answer.
        answering: How they were drawn.
    """
    limit, cut = answering.max_new_tokens, cut_off_count(answers, ends, answering)
    if 2 * cut <= len(answers):
        return None
    if answering.positions is not None:
        where = (
            f"the model's {answering.positions} positions leave {limit} tokens behind the longest "
            "prompt"
        )
        remedy = "lower data.max_length="
    else:
        where = f"evaluation.max_new_tokens={limit}"
        remedy = "raise it"
    return (
        f"{where}: {cut} of {len(answers)} answers were cut off there, so KL and marks cover only "
        f"their beginnings; {remedy}"
    )


def choose_prompts(
    groups: Sequence[TokenGroup], *, count: int, max_tokens: int
) -> list[TokenGroup]:
    """The first groups with different prompts that leave room for an answer.

    Of two answers to one prompt that are rated by themselves, a desirable one comes first.
    """
    chosen: dict[str, TokenGroup] = {}
    for group in groups:
        known = chosen.get(group.prompt_key)
        if known is not None:
            if known.preferred is None and len(group.prompt) < max_tokens:
                chosen[group.prompt_key] = group
        elif len(chosen) < count and len(group.prompt) < max_tokens:
            chosen[group.prompt_key] = group
    return list(chosen.values())


class SampleAnswers(Callback):
    """Collects greedy answers at both ends of the training; on rank 0, or of a sharded model all.

    It asks nothing until :meth:`ask` says what and whom.

    Attributes:
        rows: A row of ``COLUMNS`` for each prompt, once the training has ended.
    """

    def __init__(self) -> None:
        self._groups: Sequence[TokenGroup] = ()
        self._before: list[str] = []
        self._reference: list[str] = []
        self.rows: list[tuple[str, ...]] = []

    def ask(self, groups: Sequence[TokenGroup], *, models: Models, answering: Answering) -> None:
        """Says what is asked, before the training.

        Args:
            groups: Whose prompts are answered.
            models: Policy and reference.
            answering: How.
        """
        self._groups = groups
        self._models = models
        self._answering = answering

    def state_dict(self) -> dict[str, Any]:
        """The first answers, for a run that goes on later."""
        return {
            "prompts": [group.prompt_key for group in self._groups],
            "before": self._before,
            "reference": self._reference,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The first answers are those before the run's first step, if the prompts are the same."""
        if state_dict["prompts"] == [group.prompt_key for group in self._groups]:
            self._before, self._reference = state_dict["before"], state_dict["reference"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The first answers, of the reference and of the policy as it starts."""
        # Those of a run that goes on came with its checkpoint.
        if not self._groups or self._before or not self._answers_here(trainer):
            return
        models = self._models
        self._before = self._answers(models.policy)
        if models.starts_from_reference and trainer.global_step == 0:
            self._reference = self._before
        else:
            with models.reference_model(pl_module.device) as reference:
                self._reference = self._answers(reference)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The same prompts again, and the table of all; the training loop's time is over."""
        if not self._before or not self._answers_here(trainer):
            return  # nothing to ask, no step to take, or another rank
        after = self._answers(self._models.policy)
        text = self._answering.text
        prompts = [text(group.prompt).strip() for group in self._groups]
        preferred = [self._answering.preferred(group) for group in self._groups]
        self.rows = list(zip(prompts, preferred, self._reference, self._before, after, strict=True))

    def ask_again(self, trainer: pl.Trainer) -> None:
        """The answers after the training once more: others than the last weights are exported."""
        self._models.policy.to(trainer.strategy.root_device)
        self.on_fit_end(trainer, None)

    def _answers_here(self, trainer: pl.Trainer) -> bool:
        return trainer.is_global_zero or is_sharded(self._models.policy)

    def _answers(self, model: Any) -> list[str]:
        prompts = [group.prompt for group in self._groups]
        answers = self._answering.answers(self._models, model, prompts, seed=None)
        return [self._answering.text(ids).strip() for ids in answers]
