"""The LightningDataModule: serves the steps of a run, and every evaluation group once."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import numpy.typing as npt
from lightning.pytorch.trainer.states import TrainerFn
from torch import Generator
from torch.utils.data import DataLoader, Dataset, Sampler

from dpo_lightning.data.evaluations import EvalBatch, HeldOut
from dpo_lightning.data.gathers import Gathers
from dpo_lightning.data.packing import StepBatch, epoch_order, make_step_batch
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.processes.lifeline import end_with
from dpo_lightning.processes.signals import leave_signals_to_parent


def steps_per_epoch(groups: int, batch_size: int) -> int:
    """Steps that see every group once; the last may be short."""
    return -(-groups // batch_size)


def rows_of_steps(groups: int, *, batch_size: int, steps: int, seed: int) -> npt.NDArray[np.bool_]:
    """True for the groups that the first steps of a run see, shape (groups,).

    Args:
        groups: Training groups.
        batch_size: Groups per step, over all ranks.
        steps: Steps of the run.
        seed: With the epoch, decides the order of the groups.
    """
    if not groups:
        return np.zeros(0, dtype=bool)
    epochs, rest = divmod(steps, steps_per_epoch(groups, batch_size))
    if epochs:
        return np.ones(groups, dtype=bool)
    seen = np.zeros(groups, dtype=bool)
    seen[epoch_order(groups, seed=seed, epoch=0)[: rest * batch_size]] = True
    return seen


def groups_in_order(
    groups: int, *, batch_size: int, steps: int, seed: int, first: int = 0
) -> Iterator[list[int]]:
    """Numbers of the groups of each step of a run, step by step.

    Args:
        groups: Training groups.
        batch_size: Groups per step, over all ranks.
        steps: Steps of the run.
        seed: With the epoch, decides the order of the groups.
        first: The first step that is wanted, from 0.
    """
    per_epoch = steps_per_epoch(groups, batch_size)
    current, order = -1, list[int]()
    for step in range(first, steps):
        epoch, offset = divmod(step, per_epoch)
        if epoch != current:
            current, order = epoch, epoch_order(groups, seed=seed, epoch=epoch)
        yield order[offset * batch_size : (offset + 1) * batch_size]


def begin_worker(worker: int, *, parent: int) -> None:
    """Makes a process that builds batches one that only its trainer stops, and ends with.

    Args:
        worker: Its number.
        parent: Process id of the trainer.
    """
    end_with(parent)
    leave_signals_to_parent(worker)


class _TrainSteps(Dataset[StepBatch]):
    """Item s is one rank's part of step s of the run: a function of (seed, s) alone."""

    def __init__(
        self, groups: Sequence[TokenGroup], *, batch_size: int, seed: int, **share: Any
    ) -> None:
        self._groups = groups
        self._batch_size = batch_size
        self._seed = seed
        self._share = share
        self._epoch = -1
        self._order: list[int] = []

    def __getitem__(self, step: int) -> StepBatch:
        per_epoch = steps_per_epoch(len(self._groups), self._batch_size)
        epoch, offset = divmod(step, per_epoch)
        if epoch != self._epoch:
            self._order = epoch_order(len(self._groups), seed=self._seed, epoch=epoch)
            self._epoch = epoch
        rows = self._order[offset * self._batch_size : (offset + 1) * self._batch_size]
        return make_step_batch(self._groups, rows, **self._share)


class EvalSteps(Dataset[StepBatch]):
    """The batches of an evaluation; every rank has the same number of them, some perhaps empty.

    Args:
        groups: The groups to evaluate on.
        batches: Those of an evaluation.
        **share: Further arguments of :func:`make_step_batch`.
    """

    def __init__(
        self, groups: Sequence[TokenGroup], batches: Sequence[EvalBatch], **share: Any
    ) -> None:
        self._groups = groups
        self._batches = batches
        self._share = share

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> StepBatch:
        return make_step_batch(self._groups, self._batches[number].rows, **self._share)


class _EvalSampler(Sampler[int]):
    """Numbers of the batches of the next evaluation: those of the sample, or all of them.

    Args:
        batches: All batches, those of the sample first.
        whole: Says if the next evaluation is of all.
    """

    def __init__(self, batches: Sequence[EvalBatch], whole: Callable[[], bool]) -> None:
        self._all = len(batches)
        self._sampled = sum(batch.sampled for batch in batches)
        self._whole = whole

    def __len__(self) -> int:
        return self._all

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._all if self._whole() else self._sampled))


class _StepSampler(Sampler[int]):
    """Steps ``start`` to ``total``; its length is the whole run's, as Lightning counts it."""

    def __init__(self, start: int, total: int) -> None:
        self._start = start
        self._total = total

    def __len__(self) -> int:
        return self._total

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._start, self._total))


class PreferenceDataModule(pl.LightningDataModule):
    """Serves optimizer steps.

    The whole run is one Lightning epoch of ``total_steps`` batches, whatever the number of passes
    over the data: a resumed run starts at any step, and no boundary is special.

    Args:
        train_groups: Groups to train on.
        eval_groups: Groups to evaluate on; may be empty.
        batch_size: Groups per step, over all ranks.
        micro_batch_tokens: Most tokens of a micro-batch on one device.
        total_steps: Steps of the run.
        seed: With the epoch, decides the order of the groups.
        shared: True if the scorer computes a prompt once for all its responses.
        num_workers: Processes that build batches ahead; 0 builds them in the training process.
        equal_counts: True if all ranks take as many micro-batches, as a sharded model needs.
        gathers: What batches bring along for attention.
        pinned: True if batches are put into pinned memory, out of which a GPU copies by itself.
        held_out: Sets of ``eval_groups`` and the sample of them; None: they are one set, and every
            evaluation sees all.

    Attributes:
        eval_batches: Batches of an evaluation, in their order.
    """

    def __init__(
        self,
        *,
        train_groups: Sequence[TokenGroup],
        eval_groups: Sequence[TokenGroup],
        batch_size: int,
        micro_batch_tokens: int,
        total_steps: int,
        seed: int,
        shared: bool,
        num_workers: int,
        equal_counts: bool = False,
        gathers: Gathers = "buckets",
        pinned: bool = False,
        held_out: HeldOut | None = None,
    ) -> None:
        super().__init__()
        self.train_groups = train_groups
        self.eval_groups = eval_groups
        self.held_out = held_out or HeldOut((len(eval_groups),))
        self.eval_batches = self.held_out.batches(4 * batch_size)
        self.batch_size = batch_size
        self.total_steps = total_steps
        self._seed = seed
        self._num_workers = num_workers
        self._pinned = pinned
        self._share = {
            "micro_batch_tokens": micro_batch_tokens,
            "shared": shared,
            "equal_counts": equal_counts,
            "gathers": gathers,
        }

    @property
    def steps_per_epoch(self) -> int:
        """Steps that see every training group once."""
        return steps_per_epoch(len(self.train_groups), self.batch_size)

    def train_dataloader(self) -> Any:
        """The remaining steps; on resume the trainer already knows how many were taken."""
        assert self.trainer is not None
        steps = _TrainSteps(
            self.train_groups, batch_size=self.batch_size, seed=self._seed, **self._my_share()
        )
        sampler = _StepSampler(self.trainer.global_step, self.total_steps)
        return self._loader(steps, sampler)

    def val_dataloader(self) -> Any:
        """Every evaluation group once, over all ranks; before the last step those of the sample."""
        if not self.eval_groups:
            return []
        steps = EvalSteps(self.eval_groups, self.eval_batches, **self._my_share())
        return self._loader(steps, _EvalSampler(self.eval_batches, self._evaluates_all))

    def ranking_dataloader(self) -> Any:
        """Every group of the first evaluation set once, over all ranks."""
        batches = [batch for batch in self.eval_batches if batch.set == 0]
        return self._loader(EvalSteps(self.eval_groups, batches, **self._my_share()), None)

    def _evaluates_all(self) -> bool:
        """True for an evaluation at the end of a training, or after it."""
        trainer = self.trainer
        assert trainer is not None
        fits = trainer.state.fn == TrainerFn.FITTING
        return not fits or trainer.should_stop or trainer.global_step >= self.total_steps

    def _loader(
        self,
        steps: Dataset[StepBatch],
        sampler: Sampler[int] | Iterable[int] | None,
        generator: Generator | None = None,
    ) -> Any:
        return DataLoader(
            steps,
            sampler=sampler,
            generator=generator,
            batch_size=None,  # an item is a batch already
            num_workers=self._num_workers,
            pin_memory=self._pinned,
            worker_init_fn=functools.partial(begin_worker, parent=os.getpid()),
            persistent_workers=False,
        )

    def _my_share(self) -> dict[str, Any]:
        assert self.trainer is not None
        return {
            "rank": self.trainer.global_rank,
            "world_size": self.trainer.world_size,
            **self._share,
        }
