"""The work of a run's rounds: its models, judge and cache, as their conductor takes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from dpo_lightning.data.controlled import MAX_TOKENS, ControlledTask
from dpo_lightning.data.marked import MarkedPrompt
from dpo_lightning.evaluation.answers import Answering
from dpo_lightning.models.loading import max_positions
from dpo_lightning.processes.phases import ShowPhase
from dpo_lightning.run.placement import Placed, reference_cache
from dpo_lightning.run.plan import RunPlan
from dpo_lightning.run.prepare import Prepared
from dpo_lightning.run.rounds.conduct import RoundWork
from dpo_lightning.run.rounds.drawing import Drawing
from dpo_lightning.run.rounds.filling import Filling, ParkedModel
from dpo_lightning.run.rounds.marking import mark_prompts

TRUE_REWARD = "the embedded task's true reward"
"""Who marks the answers of the embedded task, in words."""


def make_round_work(
    plan: RunPlan,
    prepared: Prepared,
    placed: Placed,
    *,
    answering: Answering,
    check: Callable[[], None],
    show: ShowPhase,
) -> RoundWork:
    """All that the rounds are made with; the reference is ready.

    Args:
        plan: The run's.
        prepared: Models and data.
        placed: Their devices.
        answering: How answers are drawn for an evaluation.
        check: Raises if another rank is gone.
        show: Shows how far long phases are.
    """
    assert plan.batches.rounds is not None
    settings, source = plan.batches.rounds.settings, prepared.source
    positions = max_positions(source.config) or source.max_length
    longest = settings.max_new_tokens
    if prepared.task is not None:
        longest = min(longest, MAX_TOKENS)
    marker, seed = prepared.marker, plan.seed

    def mark(
        drawn: Sequence[MarkedPrompt], *, round: int, check: Callable[[], object]
    ) -> list[MarkedPrompt]:
        if marker is None:
            assert prepared.task is not None
            return true_marks(prepared.task, drawn)
        return mark_prompts(marker, drawn, seed=seed, round=round, show=show, check=check)[0]

    return RoundWork(
        given=prepared.data.train,
        room=min(positions, source.max_length) - 1,
        longest=longest,
        draws=Drawing(
            policy=prepared.models.policy,
            scorer=prepared.models.scorer,
            tokenizer=source.tokenizer,
            batch_tokens=placed.budget.tokens,
            precision=answering.precision,
            drawer=answering.drawer,
            show=show,
        ),
        text=answering.text,
        mark=mark,
        gives_marks=marker is None or marker.gives_marks,
        judge=TRUE_REWARD if marker is None else str(plan.evaluation.judge),
        filling=_filling(plan, prepared, placed),
        check=check,
        show=show,
    )


def _filling(plan: RunPlan, prepared: Prepared, placed: Placed) -> Filling:
    models = prepared.models
    assert models.reference is not None
    assert plan.batches.rounds is not None
    return Filling(
        reference=models.reference,
        previous=plan.batches.rounds.settings.previous,
        start=ParkedModel(models.make_reference, parks=models.adapters is None),
        cache=lambda weights, folder: reference_cache(
            plan, prepared, placed, weights=weights, folder=folder
        ),
        policy=models.policy,
        scorer=models.scorer,
        device=placed.device,
        precision=placed.context,
        dtype=placed.computation.dtype(prepared.source.dtype),
        micro_batch_tokens=placed.budget.tokens,
        per_token=plan.learning.objective.desensitises,
        threads=prepared.threads if placed.device.type == "cpu" else None,
    )


def true_marks(task: ControlledTask, drawn: Sequence[MarkedPrompt]) -> list[MarkedPrompt]:
    """Prompts of the embedded task with the true reward of each answer.

    Args:
        task: The task.
        drawn: Its prompts, with answers as token ids.
    """
    return [replace(own, marks=tuple(task.marks(own.prompt_key, own.answers))) for own in drawn]
