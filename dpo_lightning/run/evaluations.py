"""Evaluations of a run: at which steps, and on how many of the held-out rows, decided once."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_lightning.data.evaluations import HeldOut
from dpo_lightning.data.held_out import within_tokens
from dpo_lightning.data.splits import PreparedData
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.settings.metric_names import set_of
from dpo_lightning.settings.schema import CheckpointConfig, EvaluationConfig
from dpo_lightning.settings.selection import Selection, selection_of

log = logging.getLogger(__name__)

DEFAULT_TOKEN_SHARE = 0.05
"""Share of the trained tokens for evaluations before the last, where no interval is set."""

# Fewer rows of a set than these are not worth an evaluation that nobody asked for.
_LEAST_ROWS = 16

# A metric of fewer rows is too rough to select by without a word.
_FEW_ROWS = 100


@dataclass(frozen=True, slots=True)
class EvaluationCourse:
    """Evaluations of a run.

    Attributes:
        every: Steps between two.
        on_start: True if there is one before the first step.
        before_last: Number of evaluations before the last one, which is after the last step.
        share: Most tokens of those together, as a share of the trained ones; None: no limit.
        held_out: The sets, and the sample of them that those see.
        samples: Answers that are drawn at each of those.
        selection: What selects checkpoints; None: nothing does.
        exact: True if what is exactly known of the embedded task is measured at each of them. It
            enumerates all answers, which takes as long as ten steps.
    """

    every: int
    on_start: bool
    before_last: int
    share: float | None
    held_out: HeldOut
    samples: int
    selection: Selection | None
    exact: bool

    @property
    def rows(self) -> int:
        """Rows that an evaluation before the last sees."""
        sample = self.held_out.sample
        return sum(self.held_out.sizes) if sample is None else len(sample)

    def describe(self) -> str:
        """A line for the header."""
        total = sum(self.held_out.sizes)
        if not total:
            return "none: no rows are held out"
        start = "at the start, " if self.on_start else ""
        if not self.before_last:
            return f"at the end, on {total:,} rows"
        seen = "all" if self.rows == total else f"a fixed sample of {self.rows:,} of"
        limit = "" if self.share is None else f" (at most {self.share:.3g} of the trained tokens)"
        return f"{start}every {self.every:,} steps on {seen} {total:,} rows{limit}, all at the end"


def plan_evaluations(
    evaluation: EvaluationConfig,
    checkpoint: CheckpointConfig,
    data: PreparedData,
    *,
    total_steps: int,
    batch_size: int,
    shared: bool,
    round_steps: int | None = None,
) -> EvaluationCourse:
    """Decides the evaluations of a run.

    The limit is shared out evenly over evaluations and sets. It is of the mean training row, so
    that neither seed nor order decides the sample. Where no interval is set and it leaves too few
    rows for ten evaluations there are fewer of them. With rounds they are at ends of rounds.

    Args:
        evaluation: The settings.
        checkpoint: What selects checkpoints.
        data: The groups.
        total_steps: Steps of the run.
        batch_size: Groups of a step.
        shared: True if a prompt is computed once for all its responses.
        round_steps: Steps of a round; None where there are no rounds.

    Raises:
        UserError: If an evaluation that was asked for has no rows, or a metric is to select that no
            evaluation before the last measures.
    """
    sets, monitor = data.evaluated_sets(), checkpoint.monitor or ""
    sizes, names = tuple(map(len, sets.values())), tuple(sets)
    share = evaluation.max_token_share
    if share is None and evaluation.every_n_steps is None:
        share = DEFAULT_TOKEN_SHARE
    if not any(sizes):
        _refuse_without_rows(evaluation, checkpoint)
        share = None
    trained = _trained_tokens(data.train, total_steps, batch_size, shared=shared)
    budget = math.inf if share is None else share * trained / len(sets)
    intervals = _intervals(evaluation, total_steps, round_steps)
    every, sample = _interval(
        [*sets.values()], evaluation, intervals, total_steps, budget, shared=shared
    )
    if not sample:
        _refuse_without_room(evaluation, share)
    count = _before(evaluation, every, total_steps) if sample else 0
    whole = count == 0 or len(sample) == sum(sizes)
    course = EvaluationCourse(
        every=every,
        on_start=evaluation.on_start and count > 0,
        before_last=count,
        share=share,
        held_out=HeldOut(sizes, names, None if whole else tuple(sample)),
        samples=evaluation.intermediate_samples if count and evaluation.samples else 0,
        selection=selection_of(checkpoint),
        exact=intervals.least == 1 or monitor.startswith("controlled/"),
    )
    if monitor:
        _check_monitor(checkpoint, course)
    return course


def monitored_rows(monitor: str, held_out: HeldOut) -> list[int]:
    """Numbers of the rows that a metric is measured on at an evaluation before the last.

    Args:
        monitor: The metric.
        held_out: The sets and their sample.
    """
    own = set_of(monitor)
    number = 0 if own is None else held_out.names.index(own)
    start = sum(held_out.sizes[:number])
    rows = range(start, start + held_out.sizes[number])
    sample = None if held_out.sample is None else frozenset(held_out.sample)
    return [row for row in rows if sample is None or row in sample]


def say_selection(course: EvaluationCourse | None) -> None:
    """Logs what is to know of the metric that selects checkpoints.

    Args:
        course: The evaluations.
    """
    for note in [] if course is None else selection_notes(course):
        log.info(note)


def selection_notes(course: EvaluationCourse) -> list[str]:
    """Lines to say once of what selects checkpoints.

    Args:
        course: The evaluations.
    """
    if course.selection is None:
        return []
    monitor, notes = course.selection.monitor, []
    if set_of(monitor) in (None, course.held_out.names[0]):
        notes.append(
            f"checkpoint.monitor={monitor}: the rows that select checkpoints also rank trials, so "
            "the best one looks better than it is; name a second set to select by, "
            "data.eval={rank: <file>, select: <file>} checkpoint.monitor=eval/select/loss"
        )
    rows = len(monitored_rows(monitor, course.held_out))
    if monitor.startswith("eval/") and rows < _FEW_ROWS and course.held_out.sample is not None:
        notes.append(
            f"checkpoint.monitor={monitor}: it is measured on {rows} rows, which is rough; a "
            "larger evaluation.max_token_share= takes more, evaluation.every_n_steps= takes all"
        )
    return notes


def _before(evaluation: EvaluationConfig, every: int, total_steps: int) -> int:
    """Number of evaluations before the last one."""
    return (total_steps - 1) // every + evaluation.on_start


@dataclass(frozen=True, slots=True)
class _Intervals:
    """Steps between two evaluations, to choose from.

    Attributes:
        possible: The shortest first.
        least: Rows of each set that are enough for an evaluation.
    """

    possible: tuple[int, ...]
    least: int


def _intervals(
    evaluation: EvaluationConfig, total_steps: int, round_steps: int | None
) -> _Intervals:
    """Intervals that may be chosen: one that is set, ends of rounds, or any."""
    if evaluation.every_n_steps is not None:
        return _Intervals((evaluation.every_n_steps,), 1)
    unit = round_steps or 1
    found = dict.fromkeys(unit * math.ceil(total_steps / n / unit) for n in range(10, 0, -1))
    # What nobody asked for has to be worth an evaluation; ends of rounds are anyway.
    return _Intervals(tuple(found), _LEAST_ROWS if round_steps is None else 1)


def _interval(
    sets: Sequence[Sequence[TokenGroup]],
    evaluation: EvaluationConfig,
    intervals: _Intervals,
    total_steps: int,
    budget: float,
    *,
    shared: bool,
) -> tuple[int, list[int]]:
    """Steps between two evaluations, and the rows that those before the last see.

    Args:
        sets: The groups of each set.
        evaluation: The settings.
        intervals: Those to choose from.
        total_steps: Steps of the run.
        budget: Tokens that all those evaluations may take of each set.
        shared: True if a prompt is computed once for all its responses.

    Returns:
        The interval and the rows' numbers; all steps, and no rows, where there are none before the
        last one.
    """
    own = evaluation.every_n_steps
    for every in intervals.possible:
        count = _before(evaluation, every, total_steps)
        if not count:
            continue
        if sample := _sample(sets, budget / count, least=intervals.least, shared=shared):
            return every, sample
    return own or total_steps, []


def _trained_tokens(
    train: Sequence[TokenGroup], total_steps: int, batch_size: int, *, shared: bool
) -> float:
    """Tokens of all steps, each row counted as the mean one."""
    per_epoch = -(-len(train) // batch_size)
    epochs, rest = divmod(total_steps, per_epoch)
    rows = epochs * len(train) + min(rest * batch_size, len(train))
    return rows * sum(_costs(train, shared=shared)) / len(train)


def _costs(groups: Sequence[TokenGroup], *, shared: bool) -> list[int]:
    return [group.tokens if shared else group.padded_tokens for group in groups]


def _sample(
    sets: Sequence[Sequence[TokenGroup]], budget: float, *, least: int, shared: bool
) -> list[int]:
    """Numbers of the sampled rows among all; empty where a set has too few within its budget.

    Args:
        sets: The groups of each set.
        budget: Most tokens of each set's sample.
        least: Rows of each that are enough; a set that has fewer is seen whole.
        shared: True if a prompt is computed once for all its responses.
    """
    chosen: list[int] = []
    start = 0
    for groups in sets:
        own = within_tokens(groups, _costs(groups, shared=shared), budget)
        if len(own) < min(least, len(groups)):
            return []
        chosen += [start + row for row in own]
        start += len(groups)
    return chosen


def _refuse_without_rows(evaluation: EvaluationConfig, checkpoint: CheckpointConfig) -> None:
    asked = "evaluation.on_start=true" if evaluation.on_start else None
    if checkpoint.monitor is not None and checkpoint.monitor.startswith("eval/"):
        asked = f"checkpoint.monitor={checkpoint.monitor}"
    if asked is not None:
        raise UserError(
            f"{asked}: no rows are held out to evaluate on; set data.eval=, or a larger "
            "data.eval_fraction="
        )


def _refuse_without_room(evaluation: EvaluationConfig, share: float | None) -> None:
    """Refuses evaluations that were asked for and for which the limit leaves no rows.

    Raises:
        UserError: Then.
    """
    asked = None
    if share is None:
        return
    if evaluation.on_start:
        asked = "evaluation.on_start=true"
    if evaluation.max_token_share is not None:
        asked = f"evaluation.max_token_share={share:g}"
    if asked is not None:
        raise UserError(
            f"{asked}: evaluations before the last may take {share:.3g} of the trained tokens, and "
            "that leaves no held-out rows for them; set evaluation.every_n_steps=<steps> "
            "alone, which evaluates on all rows, or a larger evaluation.max_token_share="
        )


def _check_monitor(checkpoint: CheckpointConfig, course: EvaluationCourse) -> None:
    """Refuses a metric that is measured after the last step alone.

    Raises:
        UserError: Then.
    """
    if course.before_last > course.on_start:
        return
    if course.share is None:
        why = f"evaluation.every_n_steps={course.every} leaves no evaluation before the last"
    else:
        why = (
            f"{course.share:.3g} of the trained tokens leave no rows for an evaluation before the "
            "last"
        )
    raise UserError(
        f"checkpoint.monitor={checkpoint.monitor}: {why}, so nothing is selected; set "
        "evaluation.every_n_steps= to a part of the steps"
    )
