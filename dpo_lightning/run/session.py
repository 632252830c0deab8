"""One experiment: devices, checkpoint, models and data, plan, and the session of these."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console

from dpo_lightning.memory.hardware import Hardware, decide_hardware
from dpo_lightning.memory.peaks import (
    bound_product_caches,
)
from dpo_lightning.models.devices import settle_attention
from dpo_lightning.processes.child_ranks import ChildRanks, is_child
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.processes.signals import SignalWatch
from dpo_lightning.run.build import (
    shows_bar,
)
from dpo_lightning.run.evaluations import plan_evaluations
from dpo_lightning.run.folder import RunFolder, is_rank_zero
from dpo_lightning.run.inputs import SourceRows
from dpo_lightning.run.plan import (
    Folders,
    RunPlan,
    TrainerPlan,
    choose_folders,
    make_plan,
    trainer_plan,
)
from dpo_lightning.run.prepare import Prepared, prepare
from dpo_lightning.run.record import RunRecord
from dpo_lightning.run.session_state import Supervision
from dpo_lightning.run.session_steps import run_session
from dpo_lightning.settings.schema import Config
from dpo_lightning.tracking.phases import Phases
from dpo_lightning.tracking.quiet import quiet_libraries
from dpo_lightning.tracking.rungs import AtRung
from dpo_lightning.training.checkpoints.files import (
    find_checkpoint,
)
from dpo_lightning.training.devices import check_there, take_device
from dpo_lightning.training.ranks import Ranks, leave_ranks, start_ranks
from dpo_lightning.training.schedule import make_schedule

log = logging.getLogger(__name__)


def run_experiment(
    config: Config,
    rows: SourceRows | None,
    *,
    folder: RunFolder,
    resolved: dict[str, Any],
    record: RunRecord,
    signals: SignalWatch,
    children: ChildRanks,
) -> None:
    """Trains, evaluates and exports; fills ``record`` as facts become known.

    Args:
        config: The validated settings.
        rows: The rows that were read, or None for the controlled task.
        folder: The run's folder, which this process holds.
        resolved: The settings as plain values.
        record: What is known of the run.
        signals: Those that stop the run.
        children: The other ranks, once they are started.
    """
    quiet_libraries()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    folders = choose_folders(config, folder.path)
    check_there(config.trainer.accelerator, config.trainer.devices)
    take_device(config.trainer.accelerator, config.trainer.devices)
    hardware = decide_hardware(config.trainer, half_weights=config.model.dtype == "bfloat16")
    _settle_libraries(hardware)
    trainer = trainer_plan(config)
    # Lightning shares the cores out over the ranks that it starts; one pass serves any number.
    threads = torch.get_num_threads()
    ranks = _start_ranks(trainer, children)
    checkpoint = _find_checkpoint(config.resume, folder.path, ranks)
    show = _shows(trainer)
    prepared = prepare(
        config,
        rows,
        hardware=hardware,
        ranks=ranks,
        threads=threads,
        tokens=folders.tokens,
        resolved=resolved,
        record=record,
        folder=folder,
        show=show,
    )
    plan = plan_session(config, folders, hardware, trainer, prepared, resolved)
    try:
        supervision = Supervision(signals, children, folder)
        run_session(plan, prepared, checkpoint, record, supervision, show)
    except AtRung:
        if ranks is not None:
            leave_ranks()
        raise
    if ranks is not None:
        leave_ranks()


def plan_session(
    config: Config,
    folders: Folders,
    hardware: Hardware,
    trainer: TrainerPlan,
    prepared: Prepared,
    resolved: dict[str, Any],
) -> RunPlan:
    """The run's plan, with its evaluations.

    Args:
        config: The validated settings.
        folders: Places to write to.
        hardware: Devices and precision.
        trainer: Arguments of the trainer.
        prepared: Models and data.
        resolved: The settings as plain values.
    """
    groups, source = len(prepared.data.train), prepared.source
    schedule = make_schedule(config, groups=groups, bundled=source.bundled)
    course = plan_evaluations(
        config.evaluation,
        config.checkpoint,
        prepared.data,
        total_steps=schedule.total_steps,
        round_steps=schedule.round_steps,
        batch_size=config.data.batch_size,
        shared=prepared.models.scorer.shared,
    )
    return make_plan(
        config,
        folders=folders,
        hardware=hardware,
        trainer=trainer,
        source=source,
        groups=groups,
        resolved=resolved,
        course=course,
    )


def _shows(trainer: TrainerPlan) -> ShowPhase:
    """Shows long phases, on the first rank alone."""
    if is_child() or not is_rank_zero():
        return unshown
    return Phases(Console() if shows_bar(trainer) else None)


def _settle_libraries(hardware: Hardware) -> None:
    """Settings of torch's kernels, ahead of the first product."""
    settle_attention(hardware.beside)
    if hardware.kind == "cpu":
        bound_product_caches()


def _start_ranks(trainer: TrainerPlan, children: ChildRanks) -> Ranks | None:
    """The processes that share the models' weights; None where each has its own."""
    if not trainer.sharded:
        return None
    return start_ranks(
        children,
        accelerator=trainer.accelerator,
        devices=trainer.devices,
        num_nodes=trainer.num_nodes,
        timeout=trainer.timeout,
    )


def _find_checkpoint(resume: str | None, run_dir: Path, ranks: Ranks | None) -> Path | None:
    """The checkpoint to resume from; where ranks share a model the first checks it for all."""
    if ranks is None:
        return find_checkpoint(resume, run_dir)
    return ranks.from_first(lambda: find_checkpoint(resume, run_dir))
