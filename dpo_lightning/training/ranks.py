"""Processes of a sharded run: their start, before anything is loaded, and their messages.

Lightning starts the others when training begins. A sharded model is loaded, scored and sampled from
by all ranks together, so here they are started first; the trainer then finds them running.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch.distributed.device_mesh import DeviceMesh

from dpo_lightning.errors import DpoLightningError, UserError
from dpo_lightning.processes.child_ranks import ChildRanks
from dpo_lightning.training.launching import take_over
from dpo_lightning.training.meetings import meet
from dpo_lightning.training.strategies import ShardedStrategy

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process as one of those that share a model.

    Attributes:
        rank: Its number.
        size: Number of ranks.
        device: Device that it computes on.
        mesh: All of them.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_first(self) -> bool:
        """True if this rank reads and writes for all."""
        return self.rank == 0

    def from_first(self, function: Callable[[], T]) -> T:
        """Returns rank 0's value of ``function`` on every rank; raises an error of ours on all.

        The others wait for as long as that takes.
        """
        answer: list[Any] = [None, None]
        if self.is_first:
            try:
                answer[0] = function()
            except (DpoLightningError, OSError) as error:
                answer[1] = error
        meet()
        torch.distributed.broadcast_object_list(answer, src=0, device=self._object_device)
        if answer[1] is not None:
            raise answer[1]
        value: T = answer[0]
        return value

    def meet(self) -> None:
        """Waits for all ranks, before what may not be waited for."""
        meet()

    def gather(self, value: T) -> list[T]:
        """The value of each rank, on every rank."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    @property
    def _object_device(self) -> torch.device:
        return self.device if self.device.type == "cuda" else torch.device("cpu")


def start_ranks(
    children: ChildRanks,
    *,
    accelerator: str,
    devices: Any,
    num_nodes: int,
    timeout: datetime.timedelta,
) -> Ranks:
    """Starts the processes of ``strategy=fsdp``.

    Args:
        children: Looks after what is started.
        accelerator: As the next two, what Lightning's trainer takes by that name.
        devices: A count, a list of numbers, or ``auto``.
        num_nodes: Machines.
        timeout: How long a rank waits for the others.

    Raises:
        UserError: If Lightning refuses the devices.
    """
    strategy = ShardedStrategy(timeout=timeout)
    with refuse_as_user_error():
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    take_over(trainer, children)
    mesh = strategy.start()
    return Ranks(strategy.global_rank, strategy.world_size, strategy.root_device, mesh)


@contextlib.contextmanager
def refuse_as_user_error() -> Iterator[None]:
    """Turns the settings that Lightning refuses into a user's error."""
    try:
        yield
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def leave_ranks() -> None:
    """Ends the connection between the ranks, all of which are done.

    Not after an error: what a rank still waits for would be waited for here.
    """
    torch.distributed.destroy_process_group()
