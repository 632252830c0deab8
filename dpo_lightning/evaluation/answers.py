"""Answers of the policy: a few to read, many to measure KL divergence and judge by."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from dpo_lightning.data.rows import prompt_of_key
from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.backends import BackendDrawer
from dpo_lightning.evaluation.judges import Judge
from dpo_lightning.evaluation.partition_check import LONGEST, check_partition
from dpo_lightning.evaluation.sampling import (
    Precision,
    answer_prompts,
    end_ids,
    sampled_divergences,
)
from dpo_lightning.evaluation.verdicts import judged_metrics, put_verdicts, sample_mean
from dpo_lightning.evaluation.win_rates import why_withheld
from dpo_lightning.models.sharding import is_sharded
from dpo_lightning.objectives.partition import estimate_log_partition
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
    """

    tokenizer: Any
    max_new_tokens: int
    batch_size: int
    precision: Precision
    positions: int | None = None
    cuts: bool = True
    drawer: BackendDrawer | None = None

    def text(self, ids: Ids) -> str:
        """Token ids as text, without special tokens."""
        text: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return text

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
        remedy = "prompts of a lower data.max_length= leave more"
    else:
        where = f"evaluation.max_new_tokens={limit}"
        remedy = "a larger one lets them go on"
    return (
        f"{where}: {cut} of {len(answers)} answers were cut off there, so that KL and marks are of "
        f"their beginnings alone; {remedy}"
    )


def _say_if_cut_off(answers: Sequence[Ids], model: Any, answering: Answering) -> None:
    note = cut_off_note(answers, end_ids(model, answering.tokenizer), answering)
    if note is not None:
        log.info(note)


def choose_prompts(
    groups: Sequence[TokenGroup], *, count: int, max_tokens: int
) -> list[TokenGroup]:
    """The first groups with different prompts that leave room for an answer."""
    chosen: dict[str, TokenGroup] = {}
    for group in groups:
        if len(chosen) == count:
            break
        if len(group.prompt) < max_tokens:
            chosen.setdefault(group.prompt_key, group)
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
        preferred = [text(group.responses[0]).strip() for group in self._groups]
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


def evaluate_samples(
    models: Models,
    groups: Sequence[TokenGroup],
    *,
    count: int,
    seed: int,
    answering: Answering,
    judge: Judge | None,
    device: torch.device,
    beta: float = 1.0,
    partition_samples: int = 0,
) -> Sampled:
    """Draws answers from the policy and says how far they are from the reference, and how good.

    Args:
        models: Policy and reference; the policy is on the device.
        groups: Their prompts are answered, in turn; each at most once more than another.
        count: Answers to draw.
        seed: Of all draws.
        answering: How they are drawn.
        judge: Judges answers of policy and reference; None: nothing does.
        device: Where to compute.
        beta: Of the optimum whose log Z the marks give an estimate of.
        partition_samples: Answers of the reference for the check of the log-probabilities.

    Returns:
        Rows and metrics; empty where there is nothing to answer.
    """
    if not groups or not (count or partition_samples):
        return Sampled()
    asked = [groups[i % len(groups)] for i in range(count)]
    prompts = [group.prompt for group in asked]
    drawn = _Drawn(asked, answering.answers(models, models.policy, prompts, seed=seed))
    _say_if_cut_off(drawn.policy, models.policy, answering)
    metrics: dict[str, float] = {}
    with models.reference_model(device) as reference:
        drawn.divergences = sampled_divergences(
            models.policy,
            reference,
            models.scorer,
            prompts,
            drawn.policy,
            pad=answering.tokenizer.eos_token_id,
            precision=answering.precision,
        )
        if judge is not None:
            drawn.reference = answering.answers(models, reference, prompts, seed=seed)
        if partition_samples:
            begun = [groups[i % len(groups)].prompt for i in range(partition_samples)]
            metrics |= _partition(models, reference, begun, answering=answering, seed=seed)
    if not count:
        return Sampled(metrics=metrics)
    ends = end_ids(models.policy, answering.tokenizer)
    metrics |= drawn.metrics(lambda ids: cut_off_count(ids, ends, answering) / len(ids))
    sampled = Sampled(drawn.rows(answering), metrics)
    with _costing_marks_alone(sampled):
        if judge is not None:
            sampled.judged = _judged(sampled.rows, drawn, answering, judge, metrics, beta=beta)
    return sampled


@dataclass(slots=True)
class Sampled:
    """Answers that were drawn, and their measurements.

    Attributes:
        rows: One for each answer: ``prompt`` (and ``question``, where the row has it otherwise),
            ``preferred``, ``reference``, ``policy``, ``kl``, and of a judge ``win``, ``judge``,
            ``reference_judge``.
        metrics: Among them ``samples/kl`` in nats per answer and the share ``samples/cut_off``.
        judged: What the judge did, as plain values; None where there is none, or it failed.
        failure: The reason why there are no marks, if a judge failed.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, float] = field(default_factory=dict)
    judged: dict[str, Any] | None = None
    failure: str | None = None


@contextlib.contextmanager
def _costing_marks_alone(sampled: Sampled) -> Iterator[None]:
    """Notes the failure of a judge, which all else survives."""
    try:
        yield
    except UserError as error:
        sampled.failure = str(error)


@dataclass(slots=True)
class _Drawn:
    """Answers that were drawn.

    Attributes:
        asked: The group of each.
        policy: Token ids of the policy's.
        divergences: Estimates of the divergence, from each.
        reference: Token ids of the reference's, where these are judged.
    """

    asked: list[TokenGroup]
    policy: list[Ids]
    divergences: list[float] = field(default_factory=list)
    reference: list[Ids] = field(default_factory=list)

    def metrics(self, cut_off: Callable[[Sequence[Ids]], float]) -> dict[str, float]:
        """KL of the policy's answers; of both models' the length and the share that was cut off."""
        lengths = [float(len(ids)) for ids in self.policy]
        found = sample_mean("kl", self.divergences) | {
            "samples/kl_per_token": math.fsum(self.divergences) / math.fsum(lengths),
            "samples/length": statistics.fmean(lengths),
            "samples/cut_off": cut_off(self.policy),
        }
        if self.reference:
            found["samples/reference_length"] = statistics.fmean(map(len, self.reference))
            found["samples/reference_cut_off"] = cut_off(self.reference)
        return found

    def rows(self, answering: Answering) -> list[dict[str, Any]]:
        """A row for each, before anything is judged."""
        rows: list[dict[str, Any]] = [
            {
                "prompt": answering.text(group.prompt).strip(),
                "preferred": answering.text(group.responses[0]).strip(),
                "reference": "",
                "policy": answering.text(ids).strip(),
                "kl": kl,
                "judge": None,
                "reference_judge": None,
            }
            for group, ids, kl in zip(self.asked, self.policy, self.divergences, strict=True)
        ]
        for row, ids in zip(rows, self.reference, strict=False):
            row["reference"] = answering.text(ids).strip()
        for row, group in zip(rows, self.asked, strict=True):
            question = prompt_of_key(group.prompt_key)
            if question != row["prompt"]:
                row["question"] = question  # for a judge that is named later
        return rows


def _partition(
    models: Models, reference: Any, prompts: Sequence[Ids], *, answering: Answering, seed: int
) -> dict[str, float]:
    """The check of the log-probabilities, on beginnings of the reference's answers."""
    short = replace(answering, max_new_tokens=min(answering.max_new_tokens, LONGEST))
    return check_partition(
        models.policy,
        reference,
        models.scorer,
        prompts,
        short.answers(models, reference, prompts, seed=seed),
        precision=answering.precision,
    )


def _judged(
    rows: Sequence[dict[str, Any]],
    drawn: _Drawn,
    answering: Answering,
    judge: Judge,
    metrics: dict[str, float],
    *,
    beta: float,
) -> dict[str, Any]:
    """Counts and notes of a judge, whose verdicts are put into the rows and into the metrics."""
    questions = [prompt_of_key(group.prompt_key) for group in drawn.asked]
    own = [answering.text(ids) for ids in drawn.policy]
    judged = judge.compare(questions, own, [answering.text(ids) for ids in drawn.reference])
    put_verdicts(rows, judged)
    owners = [group.prompt_key for group in drawn.asked]
    metrics |= judged_metrics(judged, owners)
    reference = [mark for mark in judged.other_marks or () if mark is not None]
    if reference and why_withheld(judged.other_marks or ()) is None:
        # Of the marks' own optimum: what exp(mark / beta) averages over the reference's answers.
        estimate = estimate_log_partition(torch.tensor(reference).double(), beta)
        names = ("samples/log_z", "samples/log_z_stderr", "samples/log_z_ess")
        metrics |= dict(zip(names, (float(value) for value in estimate), strict=True))
    for note in judged.notes:
        log.warning("judge: %s", note)
    return {**judged.facts, "notes": list(judged.notes)}
