"""State of one session, from its loggers to its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType

import lightning.pytorch as pl
from rich.console import Console

from dpo_lightning.data.datamodule import steps_per_epoch
from dpo_lightning.errors import (
    DpoLightningError,
)
from dpo_lightning.processes.child_ranks import ChildRanks
from dpo_lightning.processes.phases import ShowPhase
from dpo_lightning.processes.signals import SignalWatch
from dpo_lightning.run.folder import RunFolder
from dpo_lightning.run.plan import (
    RunPlan,
)
from dpo_lightning.run.prepare import Prepared
from dpo_lightning.run.record import RunRecord
from dpo_lightning.tracking.destinations import RunLoggers
from dpo_lightning.tracking.loggers import JsonlLogger
from dpo_lightning.tracking.progress import Throughput
from dpo_lightning.tracking.tracked import summary_of


@dataclass(frozen=True, slots=True)
class Supervision:
    """Signals, ranks and the folder of a run: whatever may end it from outside.

    Attributes:
        signals: Those that stop it.
        children: The other ranks, once they are started.
        folder: The run's folder, which it holds.
    """

    signals: SignalWatch
    children: ChildRanks
    folder: RunFolder


@dataclass(slots=True)
class Session:
    """A session from its loggers to its end, which is left in the record however it comes.

    Attributes:
        plan: The run's.
        prepared: Models and data before they were placed.
        record: What is known of the run.
        supervision: Signals, ranks and the folder.
        metrics: Logger of ``metrics.jsonl``.
        loggers: Those beside it.
        show: Shows how far long phases are.
        throughput: Counts pairs and tokens.
        console: Where a person reads.
        trainer: The trainer, once it is made.
        where: How to find the run in each logger, once it has ended.
    """

    plan: RunPlan
    prepared: Prepared
    record: RunRecord
    supervision: Supervision
    metrics: JsonlLogger
    loggers: RunLoggers
    show: ShowPhase
    throughput: Throughput = field(default_factory=Throughput)
    console: Console = field(default_factory=Console)
    trainer: pl.Trainer | None = None
    where: dict[str, str] = field(default_factory=dict)

    @property
    def is_first(self) -> bool:
        """True in the process that writes and speaks for all, once there is a trainer."""
        return self.trainer is not None and self.trainer.is_global_zero

    def __enter__(self) -> None:
        """Nothing: its loggers are open."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Fills the record and ends the run in its loggers."""
        self.supervision.signals.notice()
        record, trainer = self.record, self.trainer
        if trainer is not None:
            record.step = trainer.global_step
            epoch = self.plan.schedule.round_steps or steps_per_epoch(
                len(self.prepared.data.train), self.plan.batches.size
            )
            record.epoch = trainer.global_step / epoch
        # What the conclusion measured is of the weights that are exported.
        record.metrics = self.metrics.last | record.metrics
        if self.plan.learning.objective.is_unpaired:
            record.throughput["examples_per_second"] = self.throughput.examples_per_second
        record.throughput |= {
            "pairs_per_second": self.throughput.pairs_per_second,
            "tokens_per_second": self.throughput.tokens_per_second,
            "seconds": self.throughput.seconds,
            "evaluating_seconds": self.throughput.evaluating_seconds,
        }
        if self.plan.batches.rounds is not None:
            record.throughput |= {
                "drawing_seconds": self.throughput.drawing_seconds,
                "drawn_tokens_per_second": self.throughput.drawn_tokens_per_second,
            }
        if trainer is None or trainer.is_global_zero:
            summary = summary_of(self.plan.facts, record.metrics)
            self.where = self.loggers.finish(summary, exit_code=_exit_code(error))


def _exit_code(error: BaseException | None) -> int:
    """The code that a session ends with, as wandb is told it."""
    if isinstance(error, DpoLightningError):
        return error.exit_code
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 0 if error is None else 1
