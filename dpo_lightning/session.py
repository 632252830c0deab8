"""One training session: trainer, header, fit, evaluation, export and what is said at the end."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import transformers
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from rich.console import Console

from dpo_lightning import display
from dpo_lightning.assembly import (
    make_budget,
    make_data_module,
    make_module,
    make_trainer,
)
from dpo_lightning.budget import Budget, say_if_over
from dpo_lightning.callbacks import MetricRows, RunIdentity, SameConfig, Throughput
from dpo_lightning.checkpoints import CHECKPOINTS
from dpo_lightning.computation import Computation, make_computation
from dpo_lightning.conclusion import conclude
from dpo_lightning.config import Config, run_name
from dpo_lightning.data.controlled import MAX_TOKENS
from dpo_lightning.data.module import PreferenceDataModule, steps_per_epoch
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import DpoLightningError, UserError
from dpo_lightning.evaluation import (
    COLUMNS,
    SHOWN,
    Answering,
    SampleAnswers,
    choose_prompts,
)
from dpo_lightning.exact_curve import ExactCurve
from dpo_lightning.header import header_facts
from dpo_lightning.loggers import JsonlLogger, finish_logger, log_table, make_logger
from dpo_lightning.memory import keep_freed_memory, peak_bytes, reset_peak
from dpo_lightning.models.loading import max_positions
from dpo_lightning.module import DPOModule
from dpo_lightning.objective_settings import objective_settings
from dpo_lightning.plugins import make_callbacks
from dpo_lightning.preflight import check_fits
from dpo_lightning.prepared import Prepared
from dpo_lightning.reference import CachedReference, LiveReference, with_reference_logps
from dpo_lightning.reference_cache import ReferenceCache
from dpo_lightning.wandb_runs import logger_settings

log = logging.getLogger(__name__)


def run_session(
    config: Config,
    prepared: Prepared,
    *,
    run_dir: Path,
    resolved: dict[str, Any],
    result: dict[str, Any],
    checkpoint: Path | None,
) -> None:
    """Trains, evaluates, exports and says so; a wandb run is finished in every ending.

    Args:
        config: The settings.
        prepared: Models, data and steps.
        run_dir: The run's folder.
        resolved: The settings as plain values, with what was open filled in.
        result: The content of result.json, filled as facts become known.
        checkpoint: What to resume from.
    """
    throughput = Throughput()
    metrics = JsonlLogger(run_dir)
    logger = make_logger(
        logger_settings(config.logger),
        run_name=run_name(config.name, config.model.name, config.loss.name, config.beta),
        folder=run_dir,
        config=resolved,
        continued=checkpoint is not None,
    )
    console = Console()
    exit_code, where = 1, None
    trainer = None
    try:
        same = SameConfig(result["config_hash"])
        identity = RunIdentity(prepared.identity)
        trainer = make_trainer(
            config,
            prepared.schedule,
            loggers=[metrics] if logger is None else [metrics, logger],
            callbacks=[
                *(same, MetricRows(metrics), throughput, identity),
                *make_callbacks(config.trainer.callbacks),
            ],
            throughput=throughput,
            run_dir=run_dir,
        )
        computation = make_computation(config, trainer)
        device = trainer.strategy.root_device
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
        prepared = _with_reference(config, prepared, device, computation, budget)
        models, data = prepared.models, prepared.data
        assert models.reference is not None
        result["reference"] = _reference_counts(models.reference.rows, models.reference.computed)
        groups, answering = _answering(config, prepared, computation)
        samples = SampleAnswers(groups[:SHOWN], models=models, answering=answering)
        # Before all others: its answers are no part of the training loop's time.
        trainer.callbacks.insert(0, samples)  # type: ignore[attr-defined]
        if prepared.task is not None and prepared.reference_outcome_logps is not None:
            curve = ExactCurve(
                prepared.task, prepared.reference_outcome_logps, models.scorer, beta=config.beta
            )
            trainer.callbacks.append(curve)  # type: ignore[attr-defined]
        module = make_module(config, models, models.reference, prepared.schedule, computation)
        datamodule = make_data_module(
            config,
            data,
            total_steps=prepared.schedule.total_steps,
            shared=models.scorer.shared,
            budget=budget,
        )
        if trainer.is_global_zero:
            say_if_over(data.train, budget, shared=models.scorer.shared)
        reset_peak(device)
        _fit(trainer, module, datamodule, checkpoint)
        result["memory"]["training_peak_bytes"] = peak_bytes(device)
        reset_peak(device)
        if config.checkpoint.last:
            _save_last(trainer, run_dir / CHECKPOINTS)
        if data.eval and module.last_evaluation != trainer.global_step:
            trainer.validate(module, datamodule=datamodule, verbose=False)
        result["reference"] = _count_reference_rows(trainer, module)
        if trainer.is_global_zero:
            report = conclude(
                config,
                prepared,
                module,
                groups=groups,
                answering=answering,
                answers=[dict(zip(COLUMNS, row, strict=True)) for row in samples.rows],
                device=device,
                run_dir=run_dir,
                result=result,
                metrics=metrics.last,
            )
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
        raise
    except KeyboardInterrupt:
        exit_code = 130
        raise
    except SystemExit as error:
        exit_code = error.code if isinstance(error.code, int) else 1
        raise
    finally:
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
        if where is not None:
            log.info("%-10s%s", "wandb", where)


# Building ---------------------------------------------------------------------------------------


def _answering(
    config: Config, prepared: Prepared, computation: Computation
) -> tuple[list[TokenGroup], Answering]:
    """Whose prompts are answered, and how."""
    source, data, policy = prepared.source, prepared.data, prepared.models.policy
    positions = max_positions(source.config)
    groups = choose_prompts(
        data.eval or data.train,
        count=max(config.evaluation.samples, config.evaluation.partition_samples),
        max_tokens=min(source.max_length, positions or source.max_length),
    )
    longest = config.evaluation.max_new_tokens
    if prepared.task is not None:
        longest = min(longest, MAX_TOKENS)
    if positions is not None:
        longest = min(longest, positions - max((len(g.prompt) for g in groups), default=0))
    answering = Answering(
        tokenizer=source.tokenizer,
        max_new_tokens=longest,
        batch_size=config.evaluation.batch_size,
        precision=lambda: computation.context(policy.device),
    )
    return groups, answering


def _with_reference(
    config: Config,
    prepared: Prepared,
    device: torch.device,
    computation: Computation,
    budget: Budget,
) -> Prepared:
    """Models and data with the reference in the type that is computed in, or out of the cache."""
    models, data, source = prepared.models, prepared.data, prepared.source
    load = models.make_reference
    models = replace(models, make_reference=lambda: computation.cast(load()))
    if models.reference is not None:
        if isinstance(models.reference, LiveReference):
            computation.cast(models.reference.model)
        return replace(prepared, models=models)
    cache = ReferenceCache(
        prepared.cache_dir,
        {
            "weights": models.reference_weights,
            "dtype": str(source.dtype),
            "precision": computation.name,
            "device": device.type,
            "kernel": models.scorer.kernel,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )
    parts, reference = with_reference_logps(
        [data.train, data.eval],
        cache,
        load=models.make_reference,
        scorer=models.scorer,
        device=device,
        precision=lambda: computation.context(device),
        micro_batch_tokens=budget.tokens,
        per_token=objective_settings(config.loss).desensitises,
    )
    train, evaluation = parts
    return replace(
        prepared,
        models=replace(models, reference=reference),
        data=replace(data, train=train, eval=evaluation),
    )


# Training ---------------------------------------------------------------------------------------


def _fit(
    trainer: pl.Trainer, module: DPOModule, data: PreferenceDataModule, checkpoint: Path | None
) -> None:
    """Trains; what ended the training early comes out as what it was."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as error:
        if trainer.received_sigterm:
            raise SystemExit(143) from None
        # Lightning exits so after Ctrl-C; any other exit is somebody else's.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    except MisconfigurationException as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    if trainer.received_sigterm:
        raise SystemExit(143)


def _save_last(trainer: pl.Trainer, folder: Path) -> None:
    """Saves the end of the training, unless its last step was saved on the way."""
    path = folder / f"step-{trainer.global_step:06d}.ckpt"
    on_the_way = {
        getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks
    }
    if str(path) not in on_the_way:
        trainer.save_checkpoint(path)


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
