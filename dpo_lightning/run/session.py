"""One training session: trainer, header, fit, evaluation, export and what is said at the end."""

from __future__ import annotations

import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from dpo_lightning.data.datamodule import PreferenceDataModule, steps_per_epoch
from dpo_lightning.errors import (
    CorruptArtifactError,
    DivergedError,
    DpoLightningError,
    OutOfMemoryError,
    UserError,
)
from dpo_lightning.evaluation.answers import (
    COLUMNS,
    SHOWN,
    SampleAnswers,
)
from dpo_lightning.evaluation.exact import ExactCurve
from dpo_lightning.files import DIVERGED_FILE, write_json
from dpo_lightning.memory.budget import say_if_over
from dpo_lightning.memory.estimate import check_fits
from dpo_lightning.memory.peaks import keep_freed_memory, peak_bytes, reset_peak
from dpo_lightning.plugins import make_callbacks
from dpo_lightning.processes.child_ranks import ChildRanks
from dpo_lightning.processes.signals import SignalWatch
from dpo_lightning.reference.kinds import CachedReference
from dpo_lightning.run.build import make_budget, make_data_module, make_module, make_trainer
from dpo_lightning.run.conclude import conclude
from dpo_lightning.run.header import header_facts
from dpo_lightning.run.identity import allowed_changes
from dpo_lightning.run.inputs import SourceRows
from dpo_lightning.run.placement import choose_answering, with_reference, with_shards
from dpo_lightning.run.prepare import Prepared, prepare
from dpo_lightning.settings.names import run_name
from dpo_lightning.settings.schema import Config
from dpo_lightning.tracking import display
from dpo_lightning.tracking.loggers import (
    JsonlLogger,
    finish_logger,
    log_table,
    logger_run_id,
    make_logger,
)
from dpo_lightning.tracking.progress import MetricRows, Throughput
from dpo_lightning.tracking.wandb_runs import logger_settings
from dpo_lightning.training.checkpoints.exact_resume import ExactResume
from dpo_lightning.training.checkpoints.files import (
    CHECKPOINTS,
    find_checkpoint,
    read_manifest,
    saved_checkpoints,
)
from dpo_lightning.training.launching import take_over
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.precision import make_computation
from dpo_lightning.training.preemption import Preemption
from dpo_lightning.training.ranks import leave_ranks, start_ranks
from dpo_lightning.training.same_config import SameConfig

log = logging.getLogger(__name__)


def run_experiment(
    config: Config,
    rows: SourceRows | None,
    *,
    run_dir: Path,
    resolved: dict[str, Any],
    result: dict[str, Any],
    signals: SignalWatch,
    children: ChildRanks,
) -> None:
    """Trains, evaluates and exports; fills ``result`` as facts become known.

    Args:
        config: The validated settings.
        rows: The rows that were read, or None for the controlled task.
        run_dir: The run's folder.
        resolved: The settings as plain values.
        result: The content of result.json.
        signals: Those that stop the run.
        children: The other ranks, once they are started.
    """
    _quiet_libraries()
    pl.seed_everything(config.seed, workers=True, verbose=False)
    ranks = start_ranks(config, children)
    checkpoint = find_checkpoint(config.resume, run_dir)
    prepared, resolved = prepare(config, rows, ranks=ranks, resolved=resolved, result=result)
    run_session(
        config,
        prepared,
        run_dir=run_dir,
        resolved=resolved,
        result=result,
        checkpoint=checkpoint,
        signals=signals,
        children=children,
    )
    if ranks is not None:
        leave_ranks()


def _quiet_libraries() -> None:
    """What third parties say on every run and nobody can act on."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*you have resumed from a checkpoint.*",
        ".*You're resuming from a checkpoint.*",
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*isinstance.treespec, LeafSpec.*",
    ):
        warnings.filterwarnings("ignore", message=message)


def run_session(
    config: Config,
    prepared: Prepared,
    *,
    run_dir: Path,
    resolved: dict[str, Any],
    result: dict[str, Any],
    checkpoint: Path | None,
    signals: SignalWatch,
    children: ChildRanks,
) -> None:
    """Trains, evaluates, exports and says so; a wandb run is finished in every ending.

    Args:
        config: The settings.
        prepared: Models, data and steps.
        run_dir: The run's folder.
        resolved: The settings as plain values, with what was open filled in.
        result: The content of result.json, filled as facts become known.
        checkpoint: What to resume from.
        signals: Those that stop the run.
        children: The other ranks, once they are started.
    """
    saved = {} if checkpoint is None else read_manifest(checkpoint)
    if checkpoint is not None:
        changed = allowed_changes(config, saved["identity"], prepared.identity)
        result["resumed"] = {"from": str(checkpoint), "step": saved["step"], "changed": changed}
    # What another experiment logs does not belong to the run in wandb of the first one.
    goes_on = checkpoint is not None and not result["resumed"]["changed"]
    throughput = Throughput()
    metrics = JsonlLogger(run_dir)
    logger = make_logger(
        logger_settings(config.logger),
        run_name=run_name(config.name, config.model.name, config.loss.name, config.beta),
        folder=run_dir,
        config=resolved,
        continued=goes_on,
        run_id=saved.get("wandb_run_id"),
    )
    console = Console()
    exit_code, where = 1, None
    trainer = None
    try:
        same = SameConfig(result["config_hash"])
        trainer = make_trainer(
            config,
            prepared.schedule,
            loggers=[metrics] if logger is None else [metrics, logger],
            callbacks=[
                *(same, MetricRows(metrics), throughput, ExactResume()),
                *make_callbacks(config.trainer.callbacks),
            ],
            throughput=throughput,
            run_dir=run_dir,
            manifest={"identity": prepared.identity, "wandb_run_id": logger_run_id(logger)},
        )
        take_over(trainer, children)
        computation = make_computation(config, trainer)
        device = trainer.strategy.root_device
        # Beside an adapter most weights are frozen: half of their memory, before they are moved.
        computation.cast(prepared.models.policy)
        budget, estimate = make_budget(
            config, prepared, computation, device, world_size=trainer.world_size
        )
        check_fits(estimate, config.trainer.memory_check)
        result["memory"] = {"estimated_bytes": estimate.footprint.parts()}
        if trainer.is_global_zero:
            (run_dir / "config.yaml").write_text(yaml.safe_dump(resolved))
            facts = header_facts(
                config,
                prepared.source,
                prepared.models,
                prepared.data,
                prepared.schedule,
                trainer=trainer,
                precision=computation.precision,
                estimate=estimate,
                budget=budget,
                folder=run_dir,
            )
            display.show_header(console, facts)
        if device.type == "cpu":
            keep_freed_memory()
        if budget.checkpointing:
            prepared.models.policy.activation_checkpointing_enable({"use_reentrant": False})
        fault = prepared.models.scorer.choose_kernel(prepared.source.config, device)
        if fault is not None:
            log.info("attention takes the slower of two ways: %s", fault)
        prepared = with_shards(prepared, computation)
        prepared = with_reference(config, prepared, device, computation, budget)
        models, data = prepared.models, prepared.data
        assert models.reference is not None
        result["reference"] = _reference_counts(models.reference.rows, models.reference.computed)
        groups, answering = choose_answering(config, prepared, computation)
        samples = SampleAnswers(groups[:SHOWN], models=models, answering=answering)
        # Before all others: its answers are no part of the training loop's time.
        trainer.callbacks.insert(0, samples)  # type: ignore[attr-defined]
        curve = None
        if prepared.task is not None and prepared.reference_outcome_logps is not None:
            curve = ExactCurve(
                prepared.task, prepared.reference_outcome_logps, models.scorer, beta=config.beta
            )
            trainer.callbacks.append(curve)  # type: ignore[attr-defined]
        module = make_module(
            config,
            models,
            models.reference,
            prepared.schedule,
            computation,
            pending_signal=lambda: signals.received,
        )
        datamodule = make_data_module(
            config,
            data,
            total_steps=prepared.schedule.total_steps,
            shared=models.scorer.shared,
            budget=budget,
        )
        if trainer.is_global_zero:
            say_if_over(data.train, budget, shared=models.scorer.shared)
        preemption = Preemption(signals, run_dir / CHECKPOINTS, keep=config.checkpoint.keep)
        trainer.callbacks.append(preemption)  # type: ignore[attr-defined]
        reset_peak(device)
        _fit(trainer, module, datamodule, checkpoint)
        module.require_finite()
        result["memory"]["training_peak_bytes"] = peak_bytes(device)
        reset_peak(device)
        signals.release()
        if data.eval and module.last_evaluation != trainer.global_step:
            trainer.validate(module, datamodule=datamodule, verbose=False)
        result["reference"] = _count_reference_rows(trainer, module)
        if prepared.ranks is None:
            children.release()  # what is left is rank 0's alone
        if trainer.is_global_zero or prepared.ranks is not None:
            report = conclude(
                config,
                prepared,
                module,
                groups=groups,
                answering=answering,
                curve=curve,
                answers=[dict(zip(COLUMNS, row, strict=True)) for row in samples.rows],
                device=device,
                run_dir=run_dir,
                result=result,
                metrics=metrics.last,
            )
        if trainer.is_global_zero:
            display.show_metrics(console, metrics.last)
            if report:
                display.show_measured(console, report)
            if samples.rows:
                display.show_samples(console, COLUMNS, samples.rows)
                log_table(logger, "samples", COLUMNS, samples.rows)
        result["memory"]["evaluation_peak_bytes"] = peak_bytes(device)
        exit_code = 0
    except DpoLightningError as error:
        exit_code = error.exit_code
        first = trainer is not None and trainer.is_global_zero
        if isinstance(error, DivergedError) and error.report and first:
            write_json(run_dir / DIVERGED_FILE, error.report)
        if isinstance(error, OutOfMemoryError):
            raise with_last_checkpoint(error, run_dir) from error
        raise
    except KeyboardInterrupt:
        exit_code = 130
        raise
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else 1
        raise
    finally:
        signals.notice()
        if trainer is not None:
            result["step"] = trainer.global_step
            epoch = steps_per_epoch(len(prepared.data.train), config.data.batch_size)
            result["epoch"] = trainer.global_step / epoch
        # What the conclusion measured is of the weights that are exported.
        result["metrics"] = metrics.last | result["metrics"]
        result["throughput"] |= {
            "pairs_per_second": throughput.pairs_per_second,
            "tokens_per_second": throughput.tokens_per_second,
            "seconds": throughput.seconds,
        }
        if trainer is None or trainer.is_global_zero:
            where = finish_logger(
                logger, summary=result["metrics"] | {"beta": config.beta}, exit_code=exit_code
            )
    if trainer.is_global_zero:
        for name in ("model", "result.json", "metrics.jsonl"):
            log.info("%-10s%s", name.partition(".")[0], run_dir / name)
        if config.peft.merge:
            log.info("%-10s%s", "merged", run_dir / "model-merged")
        if where is not None:
            log.info("%-10s%s", "wandb", where)


# Parts of it ------------------------------------------------------------------------------------


def _fit(
    trainer: pl.Trainer, module: DPOModule, data: PreferenceDataModule, checkpoint: Path | None
) -> None:
    """Trains; what ended the training early comes out as what it was."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:
        # Lightning exits so where a plugin raised what Ctrl-C does; any other exit means itself.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except MisconfigurationException as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    except pickle.UnpicklingError as error:
        raise CorruptArtifactError(
            f"resume={checkpoint}: it holds more than numbers, texts and their containers, which "
            "is never loaded, as it could run code; name a checkpoint that a run of this project "
            "wrote"
        ) from error


def _count_reference_rows(trainer: pl.Trainer, module: DPOModule) -> dict[str, int]:
    """What all ranks asked for and computed; of cached rows each rank has asked for all."""
    reference = module.reference
    counts = torch.tensor([reference.rows, reference.computed], device=module.device)
    rows, computed = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    if isinstance(reference, CachedReference):
        rows = reference.rows
    return _reference_counts(rows, min(rows, computed))


def _reference_counts(rows: int, computed: int) -> dict[str, int]:
    """The ``reference`` entry of ``result.json``."""
    return {"rows": rows, "computed": computed, "cached": rows - computed}


def with_last_checkpoint(error: OutOfMemoryError, run_dir: Path) -> OutOfMemoryError:
    """The error with what the run can go on from."""
    saved = saved_checkpoints(run_dir)
    where = f"the last checkpoint is {saved[0]}" if saved else "no checkpoint was saved yet"
    return OutOfMemoryError(f"{error}; {where}")
