"""The best checkpoints by a metric of the evaluations, and the early end of a training.

Every evaluation measures the metric on the same sample, the last one too; what is not finite is
never the best, and of equal values the earlier one is. All that decides is part of checkpoints.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from dpo_lightning.errors import UserError
from dpo_lightning.settings.selection import Selection
from dpo_lightning.training.checkpoints.files import checkpoint_path, manifest_path
from dpo_lightning.training.checkpoints.writer import DurableCheckpointIO, is_saved, save_now

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Course:
    """Measurements so far.

    Attributes:
        leaders: The best values with their steps, best first; of equal values the earlier one.
        anchor: Value that the patience measures improvements from.
        waited: Evaluations since then.
        seen: Step of the last evaluation.
    """

    leaders: list[tuple[float, int]] = field(default_factory=list)
    anchor: float | None = None
    waited: int = 0
    seen: int = 0

    @property
    def best(self) -> float:
        """Best value; NaN until there is one."""
        return self.leaders[0][0] if self.leaders else math.nan

    @property
    def best_step(self) -> int | None:
        """Step of the best value; None until there is one."""
        return self.leaders[0][1] if self.leaders else None

    def take(self, value: float, step: int, selection: Selection, *, keep: int = 1) -> bool:
        """Takes the value of an evaluation; True if it is among the best so far.

        Args:
            value: Of the metric.
            step: Optimizer steps completed.
            selection: What is better, and by how much for the patience.
            keep: Number of the best that count.
        """
        self.seen = step
        self.waited += 1
        if not math.isfinite(value):
            return False
        sign = selection.sign
        if self.anchor is None or sign * (value - self.anchor) > selection.min_delta:
            self.anchor, self.waited = value, 0
        ranked = [*self.leaders, (value, step)]
        ranked.sort(key=lambda own: (-sign * own[0], own[1]))
        self.leaders = ranked[:keep]
        return (value, step) in self.leaders


# Entries of a course that are plain values.
_OTHERS = ("anchor", "waited", "seen")


class BestCheckpoint(Callback):
    """Saves the best steps beside the newest, and ends a training that improves no more.

    It stands behind the callbacks that log metrics at evaluations. The policy before the first step
    is no candidate: there is no checkpoint of it.

    Args:
        folder: The run's ``checkpoints`` folder.
        selection: The metric.
        sample: Digest of the rows that it is measured on.
        every: Steps between two evaluations; those at other steps are of a run that was ended from
            outside, and count for nothing.
        total_steps: Steps of the run.
        keep: Number of best checkpoints that stay beside the newest.
        resumed: The checkpoint that the run goes on from.
        logged: Gives the last metrics that were logged, on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        selection: Selection,
        *,
        sample: str,
        every: int,
        total_steps: int,
        keep: int,
        resumed: Path | None,
        logged: Callable[[], Mapping[str, float]],
    ) -> None:
        self._folder = folder
        self._selection = selection
        self._sample = sample
        self._every = every
        self._total = total_steps
        self._keep = keep
        self._resumed = resumed
        self._logged = logged
        self._course = _Course()
        # The step of the resumed checkpoint; until another is taken nothing may be written.
        self._start: int | None = None
        self._began = False

    # State ------------------------------------------------------------------------------------

    @property
    def step(self) -> int | None:
        """The best step; None until an evaluation gave a number."""
        return self._course.best_step

    @property
    def stops(self) -> bool:
        """True if the patience is over."""
        patience = self._selection.patience
        return patience is not None and self._course.waited >= patience

    @property
    def exports(self) -> bool:
        """True if the best weights are to be exported."""
        return self._selection.export == "best"

    @property
    def monitor(self) -> str:
        """Name of the metric."""
        return self._selection.monitor

    def entry(self) -> dict[str, Any]:
        """The entry ``selection`` of ``result.json``."""
        return {
            "monitor": self._selection.monitor,
            "best": self._course.best if self.step is not None else None,
            "best_step": self.step,
            "stopped_early": self.stops and self._course.seen < self._total,
        }

    def state_dict(self) -> dict[str, Any]:
        """All that decides what is the best and when the training ends; plain values."""
        course = self._course
        return {
            "monitor": self._selection.monitor,
            "sample": self._sample,
            "leaders": [list(own) for own in course.leaders],
            **{name: getattr(course, name) for name in _OTHERS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint, if it measured the same."""
        for name, own in (("monitor", self._selection.monitor), ("sample", self._sample)):
            if state_dict[name] != own:
                log.info(
                    "resume: the checkpoint's best was by another %s, so selection starts again",
                    "checkpoint.monitor" if name == "monitor" else "sample of held-out rows",
                )
                return
        leaders = [(value, step) for value, step in state_dict["leaders"]]
        self._course = _Course(leaders, **{name: state_dict[name] for name in _OTHERS})

    # Hooks ------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Keeps the best one from being removed; ends at once where the patience was over.

        Raises:
            UserError: If its file is needed and gone.
        """
        self._start = trainer.global_step
        if self.step is not None:
            self._protect(trainer)
            if self.path_of_best() is None and self.step != trainer.global_step:
                self._say_gone()
        if self.stops and not trainer.should_stop:
            log.info("%s; a larger checkpoint.patience= goes on", self._said())
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fetches the best ones from the folder that is resumed; has the last step evaluated."""
        if not self._began and trainer.is_global_zero:
            self._fetch()
        self._began = True
        if trainer.global_step >= self._total:
            # Lightning then evaluates, whatever the interval.
            trainer.should_stop = True

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Takes the value; saves a better step, and ends the training after too many others."""
        step, course = trainer.global_step, self._course
        planned = step > 0 and (step % self._every == 0 or step >= self._total)
        if not planned or step == course.seen or pl_module.exported_metrics is not None:
            return
        value = self._value(trainer, pl_module)
        better = course.take(value, step, self._selection, keep=self._keep)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if better:
            self._save(trainer, step)
        if self.stops and step < self._total:
            log.info("%s", self._said())
            trainer.should_stop = True

    # Files ------------------------------------------------------------------------------------

    def path_of_best(self) -> Path | None:
        """The whole checkpoint of the best step, here or beside the resumed one; None: gone."""
        return None if self.step is None else self._path_of(self.step)

    def _path_of(self, step: int) -> Path | None:
        found = [checkpoint_path(self._folder, step)]
        if self._resumed is not None:
            same = step == self._start
            found.append(self._resumed if same else checkpoint_path(self._resumed.parent, step))
        return next((path for path in found if manifest_path(path).exists()), None)

    def _value(self, trainer: pl.Trainer, module: Any) -> float:
        """The metric on the sample, which rank 0 knows."""
        value = math.nan
        if trainer.is_global_zero:
            value = ({**self._logged()} | module.sample_metrics)[self._selection.monitor]
        return float(trainer.strategy.broadcast(value))

    def _save(self, trainer: pl.Trainer, step: int) -> None:
        path = checkpoint_path(self._folder, step)
        self._protect(trainer)
        if not self._began:
            # Before the first step: the one that is resumed is of these weights, and is fetched.
            self._start = step
        elif not is_saved(trainer, path):
            save_now(trainer, path, keep=self._keep, waits=False)

    def _protect(self, trainer: pl.Trainer) -> None:
        io = trainer.strategy.checkpoint_io
        if isinstance(io, DurableCheckpointIO):
            io.best = frozenset(
                checkpoint_path(self._folder, step) for _, step in self._course.leaders
            )

    def _fetch(self) -> None:
        """Copies the best ones out of another run's folder, each before its manifest."""
        for _, step in self._course.leaders:
            source = self._path_of(step)
            if source is None or source.parent == self._folder:
                continue
            target = checkpoint_path(self._folder, step)
            self._folder.mkdir(parents=True, exist_ok=True)
            for own in (source, manifest_path(source)):
                staged = target.with_name(f".{target.stem}.fetched")
                shutil.copyfile(own, staged)
                staged.replace(target.with_suffix(own.suffix))

    def _say_gone(self) -> None:
        """Answers a best checkpoint of which the file is gone.

        Raises:
            UserError: If it is to be exported.
        """
        gone = f"the best checkpoint so far, of step {self.step}, is gone from {self._folder}"
        if self._selection.export == "best":
            raise UserError(
                f"checkpoint.export=best: {gone}; resume from an earlier checkpoint, or use "
                "checkpoint.export=last"
            )
        log.warning("%s: a later one has to be better than it to be kept", gone)

    def _said(self) -> str:
        course, selection = self._course, self._selection
        return (
            f"checkpoint.patience={selection.patience}: {course.waited} evaluations without "
            f"improvement of {selection.monitor}, so the training ends after step {course.seen}; "
            f"the best was {course.best:.5g} at step {course.best_step}"
        )
