"""One training session: trainer, header, fit, evaluation, export and what is said at the end."""

from __future__ import annotations

import datetime
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy
from rich.console import Console
from torch import Tensor

from dpo_lightning import display
from dpo_lightning.callbacks import (
    LogProgress,
    MetricRows,
    Progress,
    RunIdentity,
    Throughput,
    checkpoint_callbacks,
)
from dpo_lightning.config import Config, run_name
from dpo_lightning.data.controlled import MAX_TOKENS, ControlledTask
from dpo_lightning.data.module import PreferenceDataModule, steps_per_epoch
from dpo_lightning.data.prepare import PreparedData
from dpo_lightning.errors import DpoLightningError, UserError
from dpo_lightning.evaluation import COLUMNS, SampleAnswers, choose_prompts
from dpo_lightning.export import export_model
from dpo_lightning.header import header_facts
from dpo_lightning.loggers import (
    JsonlLogger,
    LoggerSettings,
    finish_logger,
    log_table,
    make_logger,
)
from dpo_lightning.models.loading import max_positions
from dpo_lightning.models.setup import Models, ModelSource
from dpo_lightning.module import DPOModule
from dpo_lightning.objectives.pairwise import PAIRWISE_LOSSES
from dpo_lightning.schedule import Schedule

log = logging.getLogger(__name__)

# Tokens of a micro-batch, by device, where the settings leave it open.
_MICRO_BATCH_TOKENS = {"cpu": 8192, "mps": 8192, "cuda": 16384}


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a session works on.

    Attributes:
        source: The model, its tokenizer and limits.
        models: Policy, reference and scorer.
        data: The groups.
        schedule: The steps.
        identity: What a checkpoint to resume from must agree with.
        task: The controlled task, if that is trained on.
        reference_outcome_logps: Log-probabilities of its outcomes under the reference, (8, 4681).
    """

    source: ModelSource
    models: Models
    data: PreparedData
    schedule: Schedule
    identity: dict[str, Any]
    task: ControlledTask | None
    reference_outcome_logps: Tensor | None


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
        LoggerSettings(
            name=config.logger.name,
            project=config.logger.project,
            entity=config.logger.entity,
            mode=config.logger.mode,
            tags=tuple(config.logger.tags),
            group=config.logger.group,
        ),
        run_name=run_name(config.name, config.model.name, config.loss.name, config.beta),
        folder=run_dir,
        config=resolved,
    )
    console = Console()
    exit_code, where = 1, None
    trainer = None
    try:
        samples = _make_samples(config, prepared)
        module = _make_module(config, prepared)
        callbacks = [MetricRows(metrics), throughput, samples, RunIdentity(prepared.identity)]
        trainer = _make_trainer(
            config,
            prepared.schedule,
            loggers=[metrics] if logger is None else [metrics, logger],
            callbacks=callbacks,
            throughput=throughput,
            run_dir=run_dir,
        )
        data = _make_data_module(config, prepared, device=trainer.strategy.root_device.type)
        if trainer.is_global_zero:
            (run_dir / "config.yaml").write_text(yaml.safe_dump(resolved))
            facts = header_facts(
                config,
                prepared.source,
                prepared.models,
                prepared.data,
                prepared.schedule,
                trainer=trainer,
                folder=run_dir,
            )
            display.show_header(console, facts)
        _fit(trainer, module, data, checkpoint)
        if config.checkpoint.last:
            _save_last(trainer, run_dir / "checkpoints")
        if data.eval_groups and module.last_evaluation != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
        result["reference"] = _count_reference_rows(trainer, module)
        if trainer.is_global_zero:
            report = _controlled_report(prepared, beta=config.beta)
            result["metrics"] |= {f"controlled/{name}": v for name, v in report.items()}
            # What takes long comes before what can fail, such as a terminal that went away.
            _export(config, prepared, run_dir=run_dir, result=result, metrics=metrics.last)
            display.show_metrics(console, metrics.last)
            if report:
                display.show_controlled(console, report)
            if samples.rows:
                display.show_samples(console, COLUMNS, samples.rows)
                log_table(logger, "samples", COLUMNS, samples.rows)
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
        result["metrics"] |= metrics.last
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


def _make_samples(config: Config, prepared: Prepared) -> SampleAnswers:
    source, data = prepared.source, prepared.data
    positions = max_positions(source.config)
    groups = choose_prompts(
        data.eval or data.train,
        count=config.evaluation.samples,
        max_tokens=min(source.max_length, positions or source.max_length),
    )
    longest = config.evaluation.max_new_tokens
    return SampleAnswers(
        groups,
        source.tokenizer,
        max_new_tokens=longest if prepared.task is None else min(longest, MAX_TOKENS),
        max_positions=positions,
    )


def _make_module(config: Config, prepared: Prepared) -> DPOModule:
    models, schedule = prepared.models, prepared.schedule
    # The schema has the options of all losses; each takes those that are its own.
    own_options = PAIRWISE_LOSSES[config.loss.name].options
    loss_options = {name: getattr(config.loss, name) for name in own_options}
    first, second = config.optimizer.betas
    return DPOModule(
        policy=models.policy,
        reference=models.reference,
        scorer=models.scorer,
        beta=config.beta,
        loss=config.loss.name,
        loss_options=loss_options,
        lr=schedule.learning_rate,
        betas=(first, second),
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        schedule=config.optimizer.schedule,
        warmup_steps=schedule.warmup_steps,
        total_steps=schedule.total_steps,
        log_every_n_steps=schedule.log_every_n_steps,
        starts_from_reference=models.starts_from_reference,
    )


def _make_data_module(config: Config, prepared: Prepared, *, device: str) -> PreferenceDataModule:
    budget = config.data.micro_batch_tokens
    if budget is None:
        budget = _MICRO_BATCH_TOKENS[device]
    return PreferenceDataModule(
        train_groups=prepared.data.train,
        eval_groups=prepared.data.eval,
        batch_size=config.data.batch_size,
        micro_batch_tokens=budget,
        total_steps=prepared.schedule.total_steps,
        seed=config.seed,
        shared=prepared.models.scorer.shared,
        num_workers=config.data.num_workers,
    )


def _make_trainer(
    config: Config,
    schedule: Schedule,
    *,
    loggers: list[Logger],
    callbacks: list[Callback],
    throughput: Throughput,
    run_dir: Path,
) -> pl.Trainer:
    checkpoints = checkpoint_callbacks(
        run_dir / "checkpoints",
        every_n_steps=config.checkpoint.every_n_steps,
        keep=config.checkpoint.keep,
    )
    callbacks = [*callbacks, *checkpoints]
    # Rich draws a bar on a terminal; in a file its control characters would be noise.
    show_bar = config.trainer.enable_progress_bar and sys.stdout.isatty()
    if show_bar:
        callbacks.append(Progress(throughput))
    elif config.trainer.enable_progress_bar:
        callbacks.append(LogProgress(throughput, total_steps=schedule.total_steps))
    strategy: Any = config.strategy.name
    if strategy == "ddp":
        strategy = DDPStrategy(
            find_unused_parameters=config.strategy.find_unused_parameters,
            timeout=datetime.timedelta(minutes=config.strategy.timeout_minutes),
        )
    try:
        return pl.Trainer(
            accelerator=config.trainer.accelerator,
            devices=config.trainer.devices,
            num_nodes=config.trainer.num_nodes,
            strategy=strategy,
            precision=_precision(config),
            max_steps=schedule.total_steps,
            max_epochs=-1,
            max_time=config.trainer.max_time,
            logger=loggers,
            callbacks=callbacks,
            # The module decides when to log, so that an interval's mean is logged.
            log_every_n_steps=1,
            val_check_interval=schedule.eval_every_n_steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            enable_checkpointing=bool(checkpoints),
            enable_progress_bar=show_bar,
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=False,
            deterministic=config.trainer.deterministic,
            detect_anomaly=config.trainer.detect_anomaly,
            profiler=config.trainer.profiler,
            default_root_dir=run_dir,
        )
    except (MisconfigurationException, ValueError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error


def _precision(config: Config) -> Any:
    wanted = config.trainer.precision
    if wanted is not None:
        return wanted
    on_gpu = config.trainer.accelerator in ("auto", "gpu", "cuda")
    if on_gpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        return "bf16-mixed"
    return "32-true"


# Training ---------------------------------------------------------------------------------------


def _fit(
    trainer: pl.Trainer, module: DPOModule, data: PreferenceDataModule, checkpoint: Path | None
) -> None:
    """Trains; what ended the training early comes out as what it was."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:
        if trainer.received_sigterm:
            raise SystemExit(143) from None
        if trainer.interrupted:
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
    """Every rank has asked for its own groups."""
    rows = torch.tensor(float(module.reference.rows), device=module.device)
    total = int(trainer.strategy.reduce(rows, reduce_op="sum"))
    return {"rows": total, "computed": total, "cached": 0}


def _export(
    config: Config,
    prepared: Prepared,
    *,
    run_dir: Path,
    result: dict[str, Any],
    metrics: dict[str, float],
) -> None:
    source = prepared.source
    export_model(
        prepared.models.policy,
        source.tokenizer,
        run_dir / "model",
        config=source.config,
        facts={
            "name": run_dir.name,
            "base_model": source.name,
            "beta": config.beta,
            "loss": config.loss.name,
            "command": result["command"],
            "metrics": metrics | result["metrics"],
        },
    )


def _controlled_report(prepared: Prepared, *, beta: float) -> dict[str, float]:
    """What is exactly true of the policy on the controlled task; nothing on other data."""
    task, models = prepared.task, prepared.models
    if task is None or prepared.reference_outcome_logps is None:
        return {}
    with models.scorer.plain(models.policy) as policy:
        policy_logps = task.outcome_logps(policy)
    report = task.report(policy_logps, prepared.reference_outcome_logps, beta=beta)
    return report | {"bayes_accuracy": task.bayes_accuracy(prepared.data.eval)}
