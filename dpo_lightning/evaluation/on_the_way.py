"""Evaluations before the last one: the one at the start, and answers that are drawn at each.

Nothing here touches the training: generators are put back, and the time is not that of its loop.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from dpo_lightning.data.rows import prompt_of_key
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answer_rows import AnswerRows
from dpo_lightning.evaluation.answers import Answering, cut_off_count
from dpo_lightning.evaluation.judges import Judge, Mark
from dpo_lightning.evaluation.sampling import end_ids, sampled_divergences
from dpo_lightning.evaluation.verdicts import known
from dpo_lightning.evaluation.win_rates import why_withheld
from dpo_lightning.models.sharding import is_sharded
from dpo_lightning.reference.pair import Models
from dpo_lightning.settings.credentials import redact
from dpo_lightning.training.checkpoints.exact_resume import evaluate_now

log = logging.getLogger(__name__)

# Share of the wall time of a training from which on the answers are said to cost too much.
_TOO_MUCH = 0.1


class StartEvaluation(Callback):
    """Evaluates before the first step; stands behind all that prepares rows of metrics."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Evaluates, but not where the training goes on from a checkpoint."""
        if trainer.global_step == 0:
            evaluate_now(trainer)


class AnswersOnTheWay(Callback):
    """Draws answers at each evaluation before the last, keeps them, has them judged, and logs.

    It asks nothing until :meth:`ask` says what and whom. On rank 0, or of a sharded model on all.

    Args:
        count: Answers of an evaluation.
        total_steps: Steps of the run.
        seed: Of all draws, the same at each evaluation.
        last_too: True if the last evaluation draws as well, as its marks select checkpoints.
        rows: Keeps the answers.
        always_kl: True if the KL is measured with a reference that has to be loaded for it, too.

    Attributes:
        rows: Keeps the answers.
        seconds: Wall time of the drawing and judging so far.
    """

    def __init__(
        self,
        *,
        count: int,
        total_steps: int,
        seed: int,
        last_too: bool,
        rows: AnswerRows,
        always_kl: bool = False,
    ) -> None:
        self._count = count
        self._total = total_steps
        self._seed = seed
        self._last_too = last_too
        self._always_kl = always_kl
        self.rows = rows
        self._judge: Judge | None = None
        self._is_judged = False
        # Step of the last evaluation, as a checkpoint knows it.
        self._last: int | None = None
        self._groups: Sequence[TokenGroup] = ()
        self._begin = 0.0
        self._said = False
        self.seconds = 0.0

    def ask(
        self,
        groups: Sequence[TokenGroup],
        *,
        models: Models,
        answering: Answering,
        judge: Judge | None,
    ) -> None:
        """Says what is asked, before the training.

        Args:
            groups: Whose prompts are answered, in turn.
            models: Policy and reference.
            answering: How.
            judge: Marks answers by themselves; None, or one that compares them: nothing does.
        """
        self._groups = groups
        self._models = models
        self._answering = answering
        self._judge = judge if judge is not None and judge.gives_marks else None
        self._is_judged = self._judge is not None

    def state_dict(self) -> dict[str, Any]:
        """The last evaluation, so that a run that goes on keeps its rows and none behind it."""
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on behind the last evaluation of a checkpoint."""
        self._last = state_dict["last"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Starts the clock of the training, and the rows from what the checkpoint knew of."""
        self._begin = time.perf_counter()
        if trainer.is_global_zero:
            self.rows.start(trainer.global_step, self._last)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Draws, measures, logs, and says once if it takes long."""
        fits = trainer.state.fn == TrainerFn.FITTING
        is_last = trainer.global_step >= self._total
        if not fits or (is_last and not self._last_too) or not self._groups:
            return
        if not (trainer.is_global_zero or is_sharded(self._models.policy)):
            return
        begin = time.perf_counter()
        metrics = self._measured(pl_module.device, trainer)
        self._last = trainer.global_step
        self.seconds += time.perf_counter() - begin
        for logger in pl_module.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        if trainer.is_global_zero:
            self._say_if_slow(trainer.global_step)

    def share(self) -> float:
        """Share of the wall time since the start of the training that answers took."""
        return self.seconds / max(time.perf_counter() - self._begin, 1e-9)

    @torch.no_grad()
    def _measured(self, device: torch.device, trainer: pl.Trainer) -> dict[str, float]:
        models, answering = self._models, self._answering
        groups = [self._groups[i % len(self._groups)] for i in range(self._count)]
        asked = [group.prompt for group in groups]
        answers = answering.answers(models, models.policy, asked, seed=self._seed)
        ends = end_ids(models.policy, answering.tokenizer)
        metrics = {
            "samples/length": statistics.fmean(len(ids) for ids in answers),
            "samples/cut_off": cut_off_count(answers, ends, answering) / len(answers),
        }
        # Else it would have to be loaded beside all that a training holds.
        if self._always_kl or models.start_in_memory:
            with models.reference_model(device) as reference:
                kl = sampled_divergences(
                    models.policy,
                    reference,
                    models.scorer,
                    asked,
                    answers,
                    pad=answering.tokenizer.eos_token_id,
                    precision=answering.precision,
                )
            metrics["samples/kl"] = statistics.fmean(kl)
        if trainer.is_global_zero:
            texts = [answering.text(ids) for ids in answers]
            marks = self._marks(groups, texts)
            step = trainer.global_step
            prompts = [answering.text(ids).strip() for ids in asked]
            self.rows.add(
                [
                    (step, prompt, text.strip(), mark)
                    for prompt, text, mark in zip(prompts, texts, marks, strict=True)
                ]
            )
            if self._is_judged:
                # Not a number where no mean is given: an earlier one would be taken for this one.
                metrics["samples/judge"] = mean_mark(marks)
        return metrics

    def _marks(self, groups: Sequence[TokenGroup], texts: Sequence[str]) -> list[Mark]:
        """The judge's marks; a judge that fails is said once and asked no more."""
        if self._judge is None:
            return [None] * len(texts)
        try:
            prompts = [prompt_of_key(own.prompt_key) for own in groups]
            return self._judge.mark(prompts, texts, show=self._answering.show)[0]
        except UserError as error:
            log.warning(
                "the judge failed: later evaluations are not judged, training continues: %s",
                redact(" ".join(str(error).split())),
            )
            self._judge = None
            return [None] * len(texts)

    def _say_if_slow(self, step: int) -> None:
        # The first one warms up.
        share = self.share()
        if step < self._total / 4 or self._said or share <= _TOO_MUCH:
            return
        self._said = True
        log.info(
            "answers at evaluations took %.0f%% of the wall time so far; lower "
            "evaluation.intermediate_samples=%d, or set it to 0",
            *(100 * share, self._count),
        )


def mean_mark(marks: Sequence[Mark]) -> float:
    """Mean of the marks that are known; NaN if there is none, or if too many are missing."""
    given = known(marks)
    return statistics.fmean(given) if given and why_withheld(marks) is None else math.nan
