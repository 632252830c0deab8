"""The stop of a trial at a rung of its sweep: saved first, then measured, then reported.

What is measured comes after the checkpoint and ends with the process, so that it touches nothing of
the training that goes on from there: no generator, no counter, no row of metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from dpo_lightning.data.controlled import ControlledTask
from dpo_lightning.data.packing import GroupBatch
from dpo_lightning.data.rows import prompt_of_key
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.answers import Answering
from dpo_lightning.evaluation.held_out import accuracies, fitted_log_losses
from dpo_lightning.evaluation.judges import Judge
from dpo_lightning.evaluation.win_rates import why_withheld
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.models.sharding import is_sharded
from dpo_lightning.objectives.by_example import desirable_of, label_gains
from dpo_lightning.processes.signals import SignalWatch, Stopped
from dpo_lightning.reference.pair import Models
from dpo_lightning.tracking.rungs import AtRung, Goal, RungReport, write_reports
from dpo_lightning.training.checkpoints.files import checkpoint_path
from dpo_lightning.training.checkpoints.writer import is_saved, save_now

log = logging.getLogger(__name__)

Measure = Callable[[pl.Trainer, Any], Sequence[float]]
"""Values of a metric, one for each held-out item; all ranks call it, and rank 0's count."""

# A step's backward pass takes twice its forward pass, which is all that a measure has.
_PASSES_OF_A_STEP = 3


class RungStop(Callback):
    """Saves, measures and ends the run at its rung; stands before the callback that stops it.

    Args:
        run_dir: The run's folder.
        checkpoints: Where its checkpoints are.
        goal: The rung.
        total_steps: Steps of the whole run.
        warmup_steps: Those of them that are warm-up.
        keep: Number of checkpoints that stay.
    """

    def __init__(
        self,
        run_dir: Path,
        checkpoints: Path,
        goal: Goal,
        *,
        total_steps: int,
        warmup_steps: int,
        keep: int,
    ) -> None:
        self._run_dir = run_dir
        self._checkpoints = checkpoints
        self._goal = goal
        self._total = total_steps
        self._keep = keep
        self._steps = goal.steps(total=total_steps, warmup=warmup_steps)
        self._measure: Measure | None = None
        self._work = 0.0

    @property
    def step(self) -> int | None:
        """The step at which the run ends for now; None where it is over before it."""
        step = self._steps[self._goal.rung]
        return step if step < self._total else None

    def ask(self, measure: Measure, *, work: float) -> None:
        """Says what is measured, before the training.

        Args:
            measure: Gives the values.
            work: Optimizer steps that take as long as it does.
        """
        self._measure = measure
        self._work = work

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measures at once where the run was ended between its checkpoint and its report.

        Raises:
            UserError: If the run is beyond its rung.
        """
        if self.step is None:
            return
        if trainer.global_step > self.step:
            raise UserError(
                f"sweep.prune=halving: {self._run_dir.name} was trained to step "
                f"{trainer.global_step} without a report at its rung, step {self.step}; finish the "
                "sweep with sweep.prune=none, or prune in another hydra.sweep.dir="
            )
        if trainer.global_step == self.step:
            self._report(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the run at its rung; a signal that came meanwhile is answered first."""
        if trainer.global_step != self.step or pl_module.stop_signal:
            return
        path = checkpoint_path(self._checkpoints, self.step)
        if not is_saved(trainer, path):
            save_now(trainer, path, keep=self._keep)
        self._report(trainer, pl_module)

    def _report(self, trainer: pl.Trainer, module: Any) -> None:
        """Writes a line for each rung at this step, and ends the run.

        Raises:
            AtRung: Always.
        """
        assert self._measure is not None
        module.eval()
        with torch.no_grad():
            values = tuple(self._measure(trainer, module))
        step = trainer.global_step
        if trainer.is_global_zero:
            value = sum(values) / len(values)
            same = [rung for rung, at in enumerate(self._steps) if at == step]
            write_reports(
                self._run_dir,
                [
                    RungReport(
                        rung, step, self._total, self._goal.metric, value, values, self._work
                    )
                    for rung in same
                    if rung >= self._goal.rung
                ],
            )
            log.info("rung at step %d: %s %.4f", step, self._goal.metric, value)
        raise AtRung(step)


# What is measured -------------------------------------------------------------------------------


def work_of(groups: int, *, batch_size: int) -> float:
    """The work of measuring held-out groups, in optimizer steps that take as long.

    Args:
        groups: Held-out groups.
        batch_size: Groups of a step.
    """
    return groups / (_PASSES_OF_A_STEP * batch_size)


def held_out(
    name: str, groups: Sequence[TokenGroup], signals: SignalWatch
) -> Callable[[pl.Trainer, Any], list[float]]:
    """The measure of margins of held-out groups: a value for each group.

    Args:
        name: ``eval/fitted_log_loss``, ``eval/rewards/accuracies`` or ``eval/label_gain``.
        groups: All held-out groups.
        signals: Those that stop the run.
    """
    if name == "eval/label_gain":
        return _label_gains(groups, signals)
    of_pairs = fitted_log_losses if name == "eval/fitted_log_loss" else accuracies

    def measure(trainer: pl.Trainer, module: Any) -> list[float]:
        margins, group, share = _margins(trainer, module, groups, signals)
        return [float(value) for value in of_pairs(margins, group, share)]

    return measure


def _label_gains(
    groups: Sequence[TokenGroup], signals: SignalWatch
) -> Callable[[pl.Trainer, Any], list[float]]:
    """The measure of what log-ratios tell about labels: a mean for each group."""

    def of_part(part: GroupBatch, ratios: Tensor) -> tuple[Tensor, ...]:
        return part.places[part.group], ratios, desirable_of(part)

    def measure(trainer: pl.Trainer, module: Any) -> list[float]:
        place, ratios, desirable = _measured(trainer, module, groups, signals, of_part)
        gains = label_gains(ratios, desirable == 1)
        own = place.long()
        ones = torch.ones_like(gains)
        sums, counts = (ones.new_zeros(len(groups)).index_add(0, own, x) for x in (gains, ones))
        return [float(value) for value in sums / counts]

    return measure


def _margins(
    trainer: pl.Trainer, module: Any, groups: Sequence[TokenGroup], signals: SignalWatch
) -> tuple[Tensor, Tensor, Tensor]:
    """Margin, group and share in it of each pair, in the order of the groups, over all ranks."""

    def of_part(part: GroupBatch, ratios: Tensor) -> tuple[Tensor, ...]:
        group = part.group[part.chosen]
        return part.places[group], ratios[part.chosen] - ratios[part.rejected], part.pair_share

    place, margins, share = _measured(trainer, module, groups, signals, of_part)
    return margins, place.long(), share


def _measured(
    trainer: pl.Trainer,
    module: Any,
    groups: Sequence[TokenGroup],
    signals: SignalWatch,
    of_part: Callable[[GroupBatch, Tensor], tuple[Tensor, ...]],
) -> Tensor:
    """Three numbers of each item, the first its group, in the order of the groups, over all ranks.

    Args:
        trainer: The trainer.
        module: Its module.
        groups: All held-out groups.
        signals: Those that stop the run.
        of_part: Gives them for a micro-batch and the log-ratios of its responses.

    Returns:
        Shape (3, items), float64.
    """
    found: list[Tensor] = []
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    for batch in datamodule.ranking_dataloader():
        if signals.received and trainer.world_size == 1:
            raise Stopped(signals.received)
        moved = trainer.strategy.batch_to_device(batch)
        with trainer.precision_plugin.val_step_context():
            for number, part in enumerate(moved.micro_batches):
                ratios = module.logratios(part)
                if number >= len(moved.counted):
                    continue
                found.append(torch.stack([x.double().cpu() for x in of_part(part, ratios)]))
    own = torch.cat(found, dim=1) if found else torch.zeros(3, 0, dtype=torch.float64)
    whole = _of_all_ranks(trainer, own)
    # A group is one rank's, and its items are in order; the sort keeps that.
    ordered = whole[:, whole[0].argsort(stable=True)]
    if int(ordered[0].unique().numel()) != len(groups):
        raise AssertionError("a held-out group was not measured")
    return ordered


def _of_all_ranks(trainer: pl.Trainer, own: Tensor) -> Tensor:
    if trainer.world_size == 1:
        return own
    everyone: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(everyone, own)
    return torch.cat(everyone, dim=1)


def exact_rewards(task: ControlledTask, scorer: Scorer) -> Measure:
    """The measure of exact expected rewards on the controlled task: one for each prompt."""

    def measure(trainer: pl.Trainer, module: Any) -> list[float]:
        if not (trainer.is_global_zero or is_sharded(module.policy)):
            return []
        with scorer.plain(module.policy) as plain:
            return task.expected_rewards(task.outcome_logps(plain))

    return measure


def judged(
    models: Models,
    groups: Sequence[TokenGroup],
    *,
    count: int,
    seed: int,
    answering: Answering,
    judge: Judge,
) -> Measure:
    """The measure of a judge's marks: one for each answer.

    An answer without a mark counts as the mean of the others, as long as it is one of few.

    Args:
        models: The policy answers.
        groups: Whose prompts are answered, in turn.
        count: Answers to draw.
        seed: Of the draws.
        answering: How they are drawn.
        judge: It marks each answer by itself.
    """

    def measure(trainer: pl.Trainer, module: Any) -> list[float]:
        if not (trainer.is_global_zero or is_sharded(module.policy)):
            return []
        asked = [groups[i % len(groups)] for i in range(count)]
        prompts = [group.prompt for group in asked]
        answers = answering.answers(models, module.policy, prompts, seed=seed)
        questions = [prompt_of_key(group.prompt_key) for group in asked]
        marks, _ = judge.mark(questions, [answering.text(ids) for ids in answers])
        withheld = why_withheld(marks)
        if withheld is not None:
            raise UserError(f"sweep.prune_metric=samples/judge: {withheld}; try it again")
        known = [mark for mark in marks if mark is not None]
        if len(known) < len(marks):
            log.warning("judge: %d answers got no mark", len(marks) - len(known))
        mean = sum(known) / len(known)
        return [mean if mark is None else mark for mark in marks]

    return measure
