"""One training session: trainer, header, fit, evaluation, export and what is said at the end."""

from __future__ import annotations

import datetime
import logging
import shutil
import sys
from dataclasses import dataclass, field
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
from dpo_lightning.data.module import PreferenceDataModule
from dpo_lightning.data.prepare import PreparedData
from dpo_lightning.errors import DpoLightningError, UserError
from dpo_lightning.evaluation import COLUMNS, SampleAnswers, choose_prompts
from dpo_lightning.export import export_model
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

log = logging.getLogger(__name__)

# Tokens of a micro-batch, by device, where the settings leave it open.
_MICRO_BATCH_TOKENS = {"cpu": 8192, "mps": 8192, "cuda": 16384}


@dataclass(frozen=True, slots=True)
class Schedule:
    """How many steps, how they are logged, warmed up and evaluated."""

    total_steps: int
    warmup_steps: int
    log_every_n_steps: int
    eval_every_n_steps: int
    learning_rate: float


@dataclass(slots=True)
class Session:
    """Everything that is needed to train, in one place, and the steps of a training in order.

    Attributes:
        config: The settings.
        source: The model, its tokenizer and limits.
        models: Policy, reference and scorer.
        data: The groups.
        schedule: The steps.
        run_dir: The run's folder.
        resolved: The settings as plain values, with what was open filled in.
        identity: What a checkpoint of this run must agree with.
        result: The content of result.json, filled as facts become known.
    """

    config: Config
    source: ModelSource
    models: Models
    data: PreparedData
    schedule: Schedule
    run_dir: Path
    resolved: dict[str, Any]
    identity: dict[str, Any]
    result: dict[str, Any]
    task: ControlledTask | None
    reference_outcome_logps: Tensor | None
    console: Console = field(default_factory=Console)

    def run(self, checkpoint: Path | None) -> None:
        """Trains, evaluates, exports and says so; a wandb run is finished in every ending."""
        config = self.config
        name = run_name(config.name, config.model.name, config.loss.name, config.beta)
        throughput = Throughput()
        metrics = JsonlLogger(self.run_dir)
        logger = make_logger(
            LoggerSettings(
                name=config.logger.name,
                project=config.logger.project,
                entity=config.logger.entity,
                mode=config.logger.mode,
                tags=tuple(config.logger.tags),
                group=config.logger.group,
            ),
            run_name=name,
            folder=self.run_dir,
            config=self.resolved,
        )
        samples = self._samples()
        module = self._module()
        exit_code, where = 1, None
        trainer = None
        try:
            trainer = self._trainer(metrics, logger, throughput, samples)
            data = self._data_module(trainer)
            if trainer.is_global_zero:
                (self.run_dir / "config.yaml").write_text(yaml.safe_dump(self.resolved))
                display.show_header(self.console, self._header(trainer))
            self._fit(trainer, module, data, checkpoint)
            if trainer.is_global_zero:
                self._finish(module, metrics, logger, samples)
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
                self.result["step"] = trainer.global_step
                epoch = -(-len(self.data.train) // config.data.batch_size)
                self.result["epoch"] = trainer.global_step / epoch
            self.result["metrics"] |= metrics.last
            self.result["throughput"] |= {
                "pairs_per_second": throughput.pairs_per_second,
                "tokens_per_second": throughput.tokens_per_second,
                "seconds": throughput.seconds,
            }
            if trainer is None or trainer.is_global_zero:
                where = finish_logger(
                    logger,
                    summary=self.result["metrics"] | {"beta": config.beta},
                    exit_code=exit_code,
                )
        if trainer.is_global_zero:
            self._say_where(where)

    # Building ---------------------------------------------------------------------------------

    def _samples(self) -> SampleAnswers:
        evaluation = self.config.evaluation
        positions = max_positions(self.source.config)
        groups = choose_prompts(
            self.data.eval or self.data.train,
            count=evaluation.samples,
            max_tokens=min(self.source.max_length, positions or self.source.max_length),
        )
        longest = evaluation.max_new_tokens
        return SampleAnswers(
            groups,
            self.source.tokenizer,
            max_new_tokens=longest if self.task is None else min(longest, MAX_TOKENS),
            max_positions=positions,
        )

    def _module(self) -> DPOModule:
        config, models = self.config, self.models
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
            lr=self.schedule.learning_rate,
            betas=(first, second),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            max_grad_norm=config.optimizer.max_grad_norm,
            schedule=config.optimizer.schedule,
            warmup_steps=self.schedule.warmup_steps,
            total_steps=self.schedule.total_steps,
            log_every_n_steps=self.schedule.log_every_n_steps,
            starts_from_reference=models.starts_from_reference,
        )

    def _data_module(self, trainer: pl.Trainer) -> PreferenceDataModule:
        data = self.config.data
        budget = data.micro_batch_tokens
        if budget is None:
            budget = _MICRO_BATCH_TOKENS.get(trainer.strategy.root_device.type, 8192)
        return PreferenceDataModule(
            train_groups=self.data.train,
            eval_groups=self.data.eval,
            batch_size=data.batch_size,
            micro_batch_tokens=budget,
            total_steps=self.schedule.total_steps,
            seed=self.config.seed,
            shared=self.models.scorer.shared,
            num_workers=data.num_workers,
        )

    def _trainer(
        self,
        metrics: JsonlLogger,
        logger: Logger | None,
        throughput: Throughput,
        samples: SampleAnswers,
    ) -> pl.Trainer:
        config = self.config
        checkpoints = checkpoint_callbacks(
            self.run_dir / "checkpoints",
            every_n_steps=config.checkpoint.every_n_steps,
            keep=config.checkpoint.keep,
        )
        # Rich draws a bar on a terminal; in a file its control characters would be noise.
        show_bar = config.trainer.enable_progress_bar and sys.stdout.isatty()
        callbacks: list[Callback] = [
            MetricRows(metrics),
            throughput,
            samples,
            RunIdentity(self.identity),
            *checkpoints,
        ]
        if show_bar:
            callbacks.append(Progress(throughput))
        elif config.trainer.enable_progress_bar:
            callbacks.append(LogProgress(throughput, total_steps=self.schedule.total_steps))
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
                precision=self._precision(),
                max_steps=self.schedule.total_steps,
                max_epochs=-1,
                max_time=config.trainer.max_time,
                logger=[metrics] if logger is None else [metrics, logger],
                callbacks=callbacks,
                # The module decides when to log, so that an interval's mean is logged.
                log_every_n_steps=1,
                val_check_interval=self.schedule.eval_every_n_steps,
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
                default_root_dir=self.run_dir,
            )
        except (MisconfigurationException, ValueError) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error

    def _precision(self) -> Any:
        wanted = self.config.trainer.precision
        if wanted is not None:
            return wanted
        on_gpu = self.config.trainer.accelerator in ("auto", "gpu", "cuda")
        if on_gpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported():
            return "bf16-mixed"
        return "32-true"

    # Training ---------------------------------------------------------------------------------

    def _fit(
        self,
        trainer: pl.Trainer,
        module: DPOModule,
        data: PreferenceDataModule,
        checkpoint: Path | None,
    ) -> None:
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
        if self.config.checkpoint.last:
            path = self.run_dir / "checkpoints" / f"step-{trainer.global_step:06d}.ckpt"
            if not path.exists():
                trainer.save_checkpoint(path)
        if self.data.eval and module.last_evaluation != trainer.global_step:
            trainer.validate(module, datamodule=data, verbose=False)
        # Every rank has asked for its own groups.
        rows = torch.tensor(float(self.models.reference.rows), device=module.device)
        total = int(trainer.strategy.reduce(rows, reduce_op="sum"))
        self.result["reference"] = {"rows": total, "computed": total, "cached": 0}

    def _finish(
        self,
        module: DPOModule,
        metrics: JsonlLogger,
        logger: Logger | None,
        samples: SampleAnswers,
    ) -> None:
        """What rank 0 does with a trained policy."""
        report = {} if self.task is None else self._controlled_report()
        self.result["metrics"] |= {f"controlled/{name}": v for name, v in report.items()}
        # What takes long to make comes before what can fail, such as a terminal that went away.
        export_model(
            self.models.policy,
            self.source.tokenizer,
            self.run_dir / "model",
            config=self.source.config,
            facts={
                "name": self.run_dir.name,
                "base_model": self.source.name,
                "beta": self.config.beta,
                "loss": self.config.loss.name,
                "command": self.result["command"],
                "metrics": metrics.last | self.result["metrics"],
            },
        )
        display.show_metrics(self.console, metrics.last)
        if report:
            display.show_controlled(self.console, report)
        if samples.rows:
            display.show_samples(self.console, COLUMNS, samples.rows)
            log_table(logger, "samples", COLUMNS, samples.rows)

    def _controlled_report(self) -> dict[str, float]:
        assert self.task is not None
        assert self.reference_outcome_logps is not None
        with self.models.scorer.plain(self.models.policy) as policy:
            policy_logps = self.task.outcome_logps(policy)
        return self.task.report(
            policy_logps, self.reference_outcome_logps, beta=self.config.beta
        ) | {"bayes_accuracy": self.task.bayes_accuracy(self.data.eval)}

    # Words ------------------------------------------------------------------------------------

    def _header(self, trainer: pl.Trainer) -> dict[str, str]:
        config, data, model = self.config, self.data, self.result["model"]
        device = trainer.strategy.root_device.type
        if device == "cuda":
            device = torch.cuda.get_device_name()
        counts = f"{len(data.train):,} training and {len(data.eval):,} evaluation groups"
        for what in ("dropped", "changed"):
            reasons = getattr(data, what)
            if reasons:
                listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items())
                counts += f"; {what}: {listed}"
        trainable = model["trainable"]
        parameters = f"{model['parameters']:,} parameters"
        if trainable != model["parameters"]:
            parameters += f", {trainable:,} of them trained"
        warmup = self.schedule.warmup_steps
        facts = {
            "model": f"{self.source.name}: {parameters}",
            "data": f"{config.data.train or 'controlled task'}: {counts}",
            "loss": f"{config.loss.name}, beta {config.beta:g}, reference {self._reference_name()}",
            "steps": f"{self.schedule.total_steps:,} of {config.data.batch_size} groups, learning "
            f"rate {self.schedule.learning_rate:g}, {warmup:,} of warm-up",
            "device": f"{trainer.world_size} x {device}, {trainer.precision}, "
            f"torch {torch.__version__}",
            "folder": str(self.run_dir),
        }
        if device == "cpu" and _has_nvidia_gpu():
            facts["note"] = "this machine has an NVIDIA GPU that torch cannot use: " + (
                "this torch is a CPU build" if torch.version.cuda is None else "see nvidia-smi"
            )
        return facts

    def _reference_name(self) -> str:
        if type(self.models.reference).__name__ == "NoReference":
            return "none"
        return self.config.reference.pretrained or "the policy's start, frozen"

    def _say_where(self, wandb_run: str | None) -> None:
        folder = self.run_dir
        log.info("model     %s", folder / "model")
        log.info("result    %s", folder / "result.json")
        log.info("metrics   %s", folder / "metrics.jsonl")
        if wandb_run is not None:
            log.info("wandb     %s", wandb_run)


def _has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
