"""Throughput, metrics, and progress of a training."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, RichProgressBar
from rich import get_console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from dpo_lightning.processes.phases import Say
from dpo_lightning.tracking.loggers import JsonlLogger
from dpo_lightning.tracking.phases import bar_width

log = logging.getLogger(__name__)

_TRAINING = "training"
# Columns from which on a terminal has room for all numbers.
_WIDE = 100
# How often a log has a line of a long evaluation.
_SAY_SECONDS = 30.0


class Throughput(Callback):
    """Counts pairs, or examples, and real tokens over the wall time of the training loop.

    Data and logging are included; evaluation inside the loop is not, nor is the drawing of rounds.

    Attributes:
        pairs: Strictly ranked pairs trained on, over all ranks.
        examples: Responses trained on, over all ranks.
        by_example: True if the loss is one on single responses, so that those are the speed.
        tokens: Tokens computed by the policy, over all ranks.
        seconds: Wall time of the loop so far.
        drawing_seconds: Wall time in which rounds were drawn, marked and filled so far.
        drawn_tokens: Tokens of their answers, over all ranks,
        sampling_seconds: and the part of that time in which they were drawn.
    """

    def __init__(self) -> None:
        self.pairs = 0
        self.examples = 0
        self.by_example = False
        self.tokens = 0
        self._begin: float | None = None
        self._end: float | None = None
        self._evaluating = 0.0
        self._evaluation_begin = 0.0
        self.drawing_seconds = 0.0
        self.drawn_tokens = 0
        self.sampling_seconds = 0.0

    @property
    def seconds(self) -> float:
        """Wall time of the training loop so far, without evaluation and the drawing of rounds."""
        if self._begin is None:
            return 0.0
        end = time.perf_counter() if self._end is None else self._end
        return end - self._begin - self._evaluating - self.drawing_seconds

    @property
    def evaluating_seconds(self) -> float:
        """Wall time of the evaluations inside the loop so far."""
        return self._evaluating

    @property
    def pairs_per_second(self) -> float:
        """Pairs trained on per second of the loop."""
        return self.pairs / self.seconds if self.seconds else 0.0

    @property
    def examples_per_second(self) -> float:
        """Responses trained on per second of the loop."""
        return self.examples / self.seconds if self.seconds else 0.0

    @property
    def speed(self) -> str:
        """The speed in words: examples where the loss is one on single responses, else pairs."""
        if self.by_example:
            return f"{self.examples_per_second:.1f} examples/s"
        return f"{self.pairs_per_second:.1f} pairs/s"

    @property
    def tokens_per_second(self) -> float:
        """Real tokens per second of the loop."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def drawn_tokens_per_second(self) -> float:
        """Tokens of rounds' answers per second of their drawing."""
        return self.drawn_tokens / self.sampling_seconds if self.sampling_seconds else 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock of the loop."""
        self.by_example = bool(getattr(getattr(pl_module, "objective", None), "is_unpaired", False))
        self._begin = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Counts a step."""
        self.pairs += batch.pairs
        self.examples += batch.examples
        self.tokens += batch.tokens

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the start of an evaluation."""
        self._evaluation_begin = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Takes the evaluation's time off that of the loop."""
        if self._begin is not None and self._end is None:
            self._evaluating += time.perf_counter() - self._evaluation_begin

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stops the clock of the loop."""
        self._end = time.perf_counter()


class MetricRows(Callback):
    """Tells metrics.jsonl at which step the training begins; only then is that known."""

    def __init__(self, metrics: JsonlLogger) -> None:
        self._metrics = metrics
        self._saved: dict[str, Any] = {}
        self._started = False

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Saves the number of rows of the step so far, and the last value of every metric."""
        checkpoint["metrics"] = {
            "rows": self._metrics.rows_of(trainer.global_step),
            "last": dict(self._metrics.last),
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps the saved state for later: the checkpoint may yet be refused."""
        self._saved = checkpoint["metrics"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the metrics from the saved state: the checkpoint, if any, is loaded."""
        self._metrics.start(trainer.global_step, **self._saved)
        self._started = True

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the metrics before the evaluation of a run that had no step left."""
        if not self._started:
            self.on_train_start(trainer, pl_module)


class _Numbers(ProgressColumn):
    """Numbers of the training beside its bar, cut where the line ends.

    Attributes:
        text: The numbers.
    """

    def __init__(self) -> None:
        super().__init__(table_column=Column(no_wrap=True, overflow="crop"))
        self.text = ""

    def render(self, task: Task) -> Text:
        """The numbers of the training; of a phase beside it what is said of that."""
        text = self.text if task.description == _TRAINING else task.fields.get("note", "")
        return Text(text, style="italic")


class Progress(RichProgressBar):
    """Lightning's progress bar, which shows the run as one pass of steps, on one line.

    Args:
        throughput: Knows the speed.
    """

    def __init__(self, throughput: Throughput) -> None:
        super().__init__(leave=True)
        self._throughput = throughput
        self._numbers = _Numbers()
        self._is_wide = True

    def _get_train_description(self, current_epoch: int) -> str:
        return _TRAINING

    def configure_columns(self, trainer: pl.Trainer) -> list[Any]:
        """Columns that fit on the terminal's line: a narrow one has shorter words."""
        width = get_console().width
        self._is_wide = width >= _WIDE
        self._numbers = _Numbers()
        return [
            TextColumn("{task.description}"),
            BarColumn(bar_width(width, beside=70 if self._is_wide else 54)),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(compact=True),
            self._numbers,
        ]

    @contextlib.contextmanager
    def beside(self, name: str, *, total: int, unit: str, done: int = 0) -> Iterator[Say]:
        """Shows a phase inside the training on a line of its own.

        See :class:`~dpo_lightning.processes.phases.ShowPhase`.
        """
        bar = self.progress
        if bar is None:
            yield lambda now, note="": None
            return
        task = bar.add_task(name, total=total, completed=done)
        try:
            yield lambda now, note="": bar.update(task, completed=now, note=note, refresh=True)
        finally:
            # Lightning finds its own tasks by their places, so that none is taken out.
            bar.update(task, visible=False, refresh=True)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """Nothing for a column of Lightning's; loss, accuracy and speed stand in our own."""
        metrics = super().get_metrics(trainer, pl_module)
        names = {
            "loss": "loss",
            "accuracy": "accuracy" if self._is_wide else "acc",
            "separation": "separation" if self._is_wide else "sep",
        }
        parts = [f"{names[key]} {metrics[key]:.3f}" for key in names if key in metrics]
        if self._is_wide:
            parts.append(self._throughput.speed)
        self._numbers.text = " ".join(parts)
        return {}


class LogProgress(Callback):
    """Twenty lines of progress for a run whose output goes to a file."""

    def __init__(self, throughput: Throughput, *, total_steps: int) -> None:
        self._throughput = throughput
        self._total = total_steps
        self._every = max(1, total_steps // 20)
        self._first: int | None = None
        self._said = 0.0

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Logs a line every so often."""
        step = trainer.global_step
        if self._first is None:
            self._first = step - 1
        if step != 1 and step % self._every and step != self._total:
            return
        done = step - self._first
        left = self._throughput.seconds / done * (self._total - step)
        metrics = trainer.callback_metrics
        told = "separation" if self._throughput.by_example else "accuracy"
        log.info(
            "step %d/%d  loss %.4f  %s %.3f  %s  %ds left",
            step,
            self._total,
            metrics.get("loss", float("nan")),
            told,
            metrics.get(told, float("nan")),
            self._throughput.speed,
            left,
        )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Notes the start of an evaluation."""
        self._said = time.monotonic()

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Logs a line of an evaluation that takes long."""
        now = time.monotonic()
        if now - self._said >= _SAY_SECONDS:
            self._said = now
            batches = trainer.num_val_batches[dataloader_idx]
            log.info("evaluation: batch %d of %d", batch_idx + 1, batches)
