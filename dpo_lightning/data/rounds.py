"""Rounds of a run: steps, prompts and groups of each, and the data module that serves them.

A round's groups are there once the policy has drawn them, so a step of the run is looked up when it
is taken and not before: :class:`RoundsDataModule` asks for a round as its first step comes up.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import Dataset

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.packing import StepBatch, epoch_order, make_step_batch
from dpo_lightning.data.tokens import TokenGroup


@dataclass(frozen=True, slots=True)
class RoundPlan:
    """Steps, prompts and groups of each round: functions of these numbers alone.

    Rounds are counted from 1, steps from 0.

    Attributes:
        count: Rounds of the run.
        steps: Optimizer steps of each.
        prompts: Prompts of each; None: as many as its steps have groups for.
        groups_per_prompt: Groups that the answers to a prompt make, where none is dropped.
        batch_size: Groups of a step, over all ranks.
        offline_fraction: Share of a step's groups that are given rows.
        seed: Of all choices.
    """

    count: int
    steps: int
    prompts: int | None
    groups_per_prompt: int
    batch_size: int
    offline_fraction: float
    seed: int

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        return self.count * self.steps

    def round_at(self, step: int) -> int:
        """The round that a step is of."""
        return step // self.steps + 1

    def first_step(self, round: int) -> int:
        """First step of a round; steps completed before it."""
        return (round - 1) * self.steps

    def given_before(self, step: int) -> int:
        """Given rows that the steps before this one have, so that the share holds at each step.

        Example:
            >>> plan = RoundPlan(2, 4, None, 2, 6, 0.25, 1)
            >>> [plan.given_before(step) for step in range(5)]
            [0, 1, 3, 4, 6]
        """
        # A product of the share may fall short of a whole number by its rounding.
        return int(self.offline_fraction * self.batch_size * step + 1e-9)

    def drawn_before(self, step: int) -> int:
        """Drawn groups that the steps before this one have."""
        return self.batch_size * step - self.given_before(step)

    def choose_prompts(self, round: int, available: int) -> list[int]:
        """Numbers of a round's prompts among the training rows, no one twice.

        The rounds walk over all rows in one drawn order after the other, so that a prompt comes
        again when all have come.

        Args:
            round: The round.
            available: Training rows whose prompts can be answered.
        """
        wanted = min(self._prompts(round), available)
        chosen: dict[int, None] = {}
        place = (round - 1) * min(self._prompts(1), available)
        while len(chosen) < wanted:
            chosen.setdefault(_in_order(available, self.seed, place), None)
            place += 1
        return list(chosen)

    def _prompts(self, round: int) -> int:
        if self.prompts is not None:
            return self.prompts
        return max(1, -(-self.wanted(round) // self.groups_per_prompt))

    def wanted(self, round: int) -> int:
        """Drawn groups that a round's steps have room for."""
        first = self.first_step(round)
        return self.drawn_before(first + self.steps) - self.drawn_before(first)

    def used(self, round: int, *, drawn: int, prompts: int) -> int:
        """Drawn groups that a round's steps have, those that come again counted again.

        A group that was dropped leaves its place empty, which counts in the mean of its step as two
        equal answers do, that compare nothing. If those that are left took its place they would
        come many times, and a policy that hardly errs any more would learn the noise of a few
        labels. Only if the prompts are too few for the steps do groups come again, as often as the
        prompts would have to.

        Args:
            round: The round.
            drawn: Its groups.
            prompts: Prompts that were answered.

        Example:
            >>> plan = RoundPlan(1, 4, None, 2, 6, 0.0, 1)  # room for 24, of 12 prompts
            >>> [plan.used(1, drawn=drawn, prompts=12) for drawn in (24, 15, 0)]
            [24, 15, 0]
            >>> plan.used(1, drawn=5, prompts=3)  # 5 of 6, each of which has 4 places
            20
        """
        wanted = self.wanted(round)
        places = min(wanted, prompts * self.groups_per_prompt)
        return min(wanted, drawn * wanted // max(1, places))

    def given_rows(self, step: int, given: int) -> list[int]:
        """Numbers of the given rows of a step.

        Args:
            step: The step.
            given: Training rows.
        """
        places = range(self.given_before(step), self.given_before(step + 1))
        return [_in_order(given, self.seed, place) for place in places]

    def given_rows_of(self, round: int, given: int) -> list[int]:
        """Numbers of the given rows of a round's steps, ascending, each once.

        Args:
            round: The round.
            given: Training rows.
        """
        first = self.first_step(round)
        steps = range(first, first + self.steps)
        return sorted({row for step in steps for row in self.given_rows(step, given)})

    def drawn_groups(self, step: int, drawn: int, prompts: int) -> list[int]:
        """Numbers of a step's groups among those that its round drew.

        Args:
            step: The step.
            drawn: Groups of the round.
            prompts: Prompts that were answered in it.
        """
        round = self.round_at(step)
        used, wanted = self.used(round, drawn=drawn, prompts=prompts), self.wanted(round)
        first = self.drawn_before(self.first_step(round))
        # Each step has its share of them, rounded up: the first with room has one if any has.
        rooms = (self.drawn_before(number) - first for number in (step, step + 1))
        places = range(*(-(-used * room // max(1, wanted)) for room in rooms))
        return [_in_order(drawn, self.seed, place, round) for place in places]


@functools.lru_cache(maxsize=4)
def _order(count: int, seed: int, epoch: int, round: int) -> list[int]:
    """One of the drawn orders; given rows have that of a run without rounds."""
    if not round:
        return epoch_order(count, seed=seed, epoch=epoch)
    return [int(i) for i in np.random.default_rng([seed, round, epoch]).permutation(count)]


def _in_order(count: int, seed: int, place: int, round: int = 0) -> int:
    """The number at a place of the drawn orders, end to end."""
    epoch, offset = divmod(place, count)
    return _order(count, seed, epoch, round)[offset]


@dataclass(frozen=True, slots=True)
class RoundGroups:
    """Groups that a round trains on, with all that a step needs of them.

    Attributes:
        drawn: Those of the policy's answers.
        given: All given rows; those that the round's steps have are ready.
        prompts: Prompts that were answered.
    """

    drawn: Sequence[TokenGroup]
    given: Sequence[TokenGroup]
    prompts: int


class Rounds(Protocol):
    """The one who draws and marks, as the data module asks him."""

    @property
    def plan(self) -> RoundPlan:
        """Steps and groups of each round."""

    def begin(self, round: int) -> RoundGroups:
        """The groups of a round, whose first step comes next, or one behind it after a resume."""


class RoundsDataModule(PreferenceDataModule):
    """Serves the steps of a run whose groups are made round by round.

    To the trainer it is one epoch of all steps, as without rounds.

    Args:
        rounds: Gives the groups of each round.
        **served: Arguments of :class:`PreferenceDataModule`; its training groups are the given
            rows.

    Attributes:
        train_groups: The groups of the round that is trained on: the drawn ones, then all given
            rows.
    """

    def __init__(self, rounds: Rounds, **served: Any) -> None:
        super().__init__(**served)
        self._rounds = rounds

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a round: an epoch is one round."""
        return self._rounds.plan.steps

    def train_dataloader(self) -> Any:
        """The remaining steps, round by round."""
        assert self.trainer is not None
        return _RoundByRound(self, self.trainer.global_step)

    def batches(self, start: int) -> Iterator[StepBatch]:
        """The steps from one on; each round begins when its first batch is asked for.

        Args:
            start: The first step, from 0.
        """
        plan, step = self._rounds.plan, start
        while step < self.total_steps:
            round = plan.round_at(step)
            end = min(plan.first_step(round + 1), self.total_steps)
            groups = self._rounds.begin(round)
            self.train_groups = [*groups.drawn, *groups.given]
            steps = _StepsOfRound(plan, groups, share=self._my_share())
            # Its workers' seeds are no draw of the run's: a resume makes one more.
            loader = self._loader(steps, range(step, end), generator=torch.Generator())
            yield from loader
            step = end


class _RoundByRound:
    """The loader of a run: a loader of its own for each round, so that workers have its groups."""

    def __init__(self, module: RoundsDataModule, start: int) -> None:
        self._module = module
        self._start = start

    def __len__(self) -> int:
        return self._module.total_steps

    def __iter__(self) -> Iterator[StepBatch]:
        return self._module.batches(self._start)


class _StepsOfRound(Dataset[StepBatch]):
    """Item s is one rank's part of step s of the run: a function of the round's groups and s."""

    def __init__(self, plan: RoundPlan, groups: RoundGroups, *, share: dict[str, Any]) -> None:
        self._plan = plan
        self._groups = [*groups.drawn, *groups.given]
        self._drawn = len(groups.drawn)
        self._prompts = groups.prompts
        self._share = share

    def __getitem__(self, step: int) -> StepBatch:
        given = self._plan.given_rows(step, len(self._groups) - self._drawn)
        rows = self._plan.drawn_groups(step, self._drawn, self._prompts)
        batch = make_step_batch(
            self._groups, [*rows, *(self._drawn + row for row in given)], **self._share
        )
        empty = self._plan.batch_size - len(rows) - len(given)
        return replace(batch, total_weight=batch.total_weight + empty)
