"""Answers that are drawn from the policy, to measure its KL divergence and be judged."""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dpo_lightning.data.rows import prompt_of_key
from dpo_lightning.data.tokens import Ids, TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answers import Answering, cut_off_count, cut_off_note
from dpo_lightning.evaluation.judges import Judge
from dpo_lightning.evaluation.partition_check import LONGEST, check_partition
from dpo_lightning.evaluation.sampling import (
    end_ids,
    sampled_divergences,
)
from dpo_lightning.evaluation.verdicts import judged_metrics, put_verdicts, sample_mean
from dpo_lightning.evaluation.win_rates import why_withheld
from dpo_lightning.objectives.partition import estimate_log_partition
from dpo_lightning.reference.pair import Models

log = logging.getLogger(__name__)


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
                "preferred": answering.preferred(group),
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
    others = [answering.text(ids) for ids in drawn.reference]
    judged = judge.compare(questions, own, others, show=answering.show)
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


def _say_if_cut_off(answers: Sequence[Ids], model: Any, answering: Answering) -> None:
    note = cut_off_note(answers, end_ids(model, answering.tokenizer), answering)
    if note is not None:
        log.info(note)
