"""Ranks that each have a whole model: what one of them makes for all, outside of a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl

from dpo_lightning.errors import DpoLightningError
from dpo_lightning.training.meetings import meet
from dpo_lightning.training.outcome import of_all_ranks

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Replicas:
    """The ranks of a trainer that does not share a model's weights out.

    Attributes:
        trainer: The trainer.
    """

    trainer: pl.Trainer

    @property
    def rank(self) -> int:
        """Number of this one."""
        return int(self.trainer.global_rank)

    @property
    def size(self) -> int:
        """Number of ranks."""
        return int(self.trainer.world_size)

    def from_first(self, function: Callable[[], T]) -> T:
        """Returns rank 0's value of ``function`` on every rank; raises an error of ours on all.

        The others wait for as long as that takes.
        """
        if self.size == 1:
            return function()
        answer: tuple[Any, Exception | None] = (None, None)
        if self.trainer.is_global_zero:
            try:
                answer = (function(), None)
            except (DpoLightningError, OSError) as error:
                answer = (None, error)
        meet()
        value, failure = self.trainer.strategy.broadcast(answer)
        if failure is not None:
            raise failure
        found: T = value
        return found

    def gather(self, value: T) -> list[T]:
        """The value of each rank, on every rank."""
        if self.size > 1:
            meet()
        return of_all_ranks(value, world_size=self.size)
