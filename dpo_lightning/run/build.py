"""Makes the module, the data module and the trainer of a session out of its settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.data.splits import PreparedData
from dpo_lightning.errors import UserError
from dpo_lightning.memory.budget import Budget, choose_budget, longest_share, mean_keys, memory_of
from dpo_lightning.memory.estimate import MemoryEstimate, plan_training, with_budget
from dpo_lightning.objectives.betas import BetaPlan
from dpo_lightning.reference.kinds import Reference
from dpo_lightning.reference.pair import Models
from dpo_lightning.run.prepare import Prepared
from dpo_lightning.settings.loss_group import objective_settings
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.settings.schema import CONF, Config
from dpo_lightning.tracking.progress import LogProgress, Progress, Throughput
from dpo_lightning.training.checkpoints.files import CHECKPOINTS
from dpo_lightning.training.checkpoints.writer import Checkpoints, DurableCheckpointIO
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.optimizers import OptimizerName
from dpo_lightning.training.precision import Computation, decide_precision
from dpo_lightning.training.ranks import refuse_as_user_error, timeout_of
from dpo_lightning.training.schedule import Schedule
from dpo_lightning.training.strategies import ShardedStrategy


def make_module(
    config: Config,
    models: Models,
    reference: Reference,
    schedule: Schedule,
    computation: Computation,
    *,
    pending_signal: Callable[[], int],
) -> DPOModule:
    """The module; its reference is ready."""
    first, second = config.optimizer.betas
    return DPOModule(
        policy=models.policy,
        reference=reference,
        scorer=models.scorer,
        objective=objective_settings(config.loss),
        beta_plan=BetaPlan(
            start=config.beta,
            end=config.loss.beta_end,
            schedule=config.loss.beta_schedule,
            total_steps=schedule.total_steps,
            adaptive=config.loss.adaptive_beta,
            momentum=config.loss.adaptive_momentum,
        ),
        lr=schedule.learning_rate,
        betas=(first, second),
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        schedule=config.optimizer.schedule,
        warmup_steps=schedule.warmup_steps,
        total_steps=schedule.total_steps,
        log_every_n_steps=schedule.log_every_n_steps,
        max_skipped_steps=config.trainer.max_skipped_steps,
        starts_from_reference=models.starts_from_reference,
        compute_dtype=computation.master_dtype,
        sync_every_micro_batch=config.strategy.sync_gradients == "micro_batch",
        smaller=memory_settings(config),
        pending_signal=pending_signal,
        optimizer=cast(OptimizerName, config.optimizer.name),
        stochastic_rounding=config.optimizer.stochastic_rounding,
        seed=config.seed,
    )


def memory_settings(config: Config) -> list[str]:
    """Settings by which a step takes less memory, but for the size of its micro-batches."""
    others = ("peft=lora", "optimizer=adamw_8bit", "strategy=fsdp")
    files = {other: CONF.joinpath(*other.split("=")).with_suffix(".yaml") for other in others}
    found = [other for other in others if files[other].exists()]
    if not config.model.gradient_checkpointing:
        found.insert(0, "model.gradient_checkpointing=true")
    return found


def make_budget(
    config: Config,
    prepared: Prepared,
    computation: Computation,
    device: torch.device,
    *,
    world_size: int,
) -> tuple[Budget, MemoryEstimate]:
    """What the device holds at once, chosen by its memory where the settings leave it open.

    Returns:
        That, and what the run takes with it.

    Raises:
        UserError: If the loss needs a whole step at once and the settings allow less.
    """
    groups = [*prepared.data.train, *prepared.data.eval]
    shared = prepared.models.scorer.shared
    costs = [group.tokens if shared else group.padded_tokens for group in groups]

    shape = prepared.shape
    mixed = computation.precision == "bf16-mixed"
    training = plan_training(config, shape, device, devices=world_size, mixed=mixed)
    keys = mean_keys(groups) if device.type == "cpu" else 0
    training = replace(training, keys=keys)

    def choose(tokens: int | None) -> tuple[Budget, MemoryEstimate]:
        budget = choose_budget(
            shape,
            training,
            kind=device.type,
            device_bytes=memory_of(device),
            longest=max(costs),
            tokens=tokens,
            checkpointing=config.model.gradient_checkpointing,
        )
        estimate = MemoryEstimate(
            shape=shape,
            training=with_budget(training, budget, longest=max(costs), keys=keys),
            kind=cast(DeviceKind, device.type),
            device_bytes=memory_of(device),
            devices=world_size,
        )
        return budget, estimate

    budget, estimate = choose(config.data.micro_batch_tokens)
    coupling = [*objective_settings(config.loss).couples]
    coupling += ["adaptive_beta"] if config.loss.adaptive_beta else []
    if not coupling:
        return budget, estimate
    needed = longest_share(
        costs[: len(prepared.data.train)],
        batch_size=config.data.batch_size,
        world_size=world_size,
    )
    if budget.tokens >= needed:
        return budget, estimate
    if config.data.micro_batch_tokens is None:
        return choose(needed)
    raise UserError(
        f"data.micro_batch_tokens={config.data.micro_batch_tokens}: {', '.join(coupling)} compares "
        f"all pairs of a step at once, and a step has up to {needed} tokens on a device: raise "
        "data.micro_batch_tokens to that, or lower data.batch_size"
    )


def make_data_module(
    config: Config,
    data: PreparedData,
    *,
    total_steps: int,
    shared: bool,
    budget: Budget,
) -> PreferenceDataModule:
    """The data module of prepared groups."""
    return PreferenceDataModule(
        train_groups=data.train,
        eval_groups=data.eval,
        batch_size=config.data.batch_size,
        micro_batch_tokens=budget.tokens,
        total_steps=total_steps,
        seed=config.seed,
        shared=shared,
        num_workers=config.data.num_workers,
        equal_counts=config.strategy.name == "fsdp",
    )


def make_trainer(
    config: Config,
    schedule: Schedule,
    *,
    loggers: list[Logger],
    callbacks: list[Callback],
    throughput: Throughput,
    run_dir: Path,
    manifest: dict[str, Any],
) -> pl.Trainer:
    """The trainer.

    Args:
        config: The settings.
        schedule: The steps.
        loggers: Where metrics go.
        callbacks: In this order, before those that save and show progress.
        throughput: Counts what progress shows.
        run_dir: The run's folder.
        manifest: What the manifest of each checkpoint says of the run.

    Raises:
        UserError: If Lightning refuses the settings.
    """
    checkpoints = Checkpoints(
        run_dir / CHECKPOINTS,
        every_n_steps=config.checkpoint.every_n_steps,
        keep=config.checkpoint.keep,
        last=config.checkpoint.last,
    )
    callbacks = [*callbacks, checkpoints]
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
            timeout=timeout_of(config),
        )
    elif strategy == "fsdp":
        strategy = ShardedStrategy(timeout=timeout_of(config))
    with refuse_as_user_error():
        return pl.Trainer(
            accelerator=config.trainer.accelerator,
            devices=config.trainer.devices,
            num_nodes=config.trainer.num_nodes,
            strategy=strategy,
            precision=decide_precision(config),
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
            enable_checkpointing=False,  # Lightning's own
            plugins=[DurableCheckpointIO(manifest)],
            enable_progress_bar=show_bar,
            enable_model_summary=False,
            use_distributed_sampler=False,
            inference_mode=False,
            deterministic=config.trainer.deterministic,
            detect_anomaly=config.trainer.detect_anomaly,
            profiler=config.trainer.profiler,
            default_root_dir=run_dir,
        )
