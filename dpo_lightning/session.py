"""One training session: trainer, header, fit, evaluation, export and what is said at the end."""

from __future__ import annotations

import logging
import pickle
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
from dpo_lightning.callbacks import MetricRows, SameConfig, Throughput
from dpo_lightning.checkpoints import CHECKPOINTS, changed_settings, read_manifest
from dpo_lightning.computation import Computation, make_computation
from dpo_lightning.conclusion import conclude
from dpo_lightning.config import Config, run_name
from dpo_lightning.data.controlled import MAX_TOKENS
from dpo_lightning.data.module import PreferenceDataModule, steps_per_epoch
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.errors import (
    CorruptArtifactError,
    DivergedError,
    DpoLightningError,
    OutOfMemoryError,
    UserError,
)
from dpo_lightning.evaluation import (
    COLUMNS,
    SHOWN,
    Answering,
    SampleAnswers,
    choose_prompts,
)
from dpo_lightning.exact_curve import ExactCurve
from dpo_lightning.header import header_facts
from dpo_lightning.loggers import (
    JsonlLogger,
    finish_logger,
    log_table,
    logger_run_id,
    make_logger,
)
from dpo_lightning.memory import keep_freed_memory, peak_bytes, reset_peak
from dpo_lightning.models.loading import max_positions
from dpo_lightning.models.sharding import shard_model
from dpo_lightning.module import DPOModule
from dpo_lightning.objective_settings import objective_settings
from dpo_lightning.out_of_memory import with_last_checkpoint
from dpo_lightning.plugins import make_callbacks
from dpo_lightning.preemption import Preemption, take_over
from dpo_lightning.preflight import check_fits
from dpo_lightning.prepared import Prepared
from dpo_lightning.processes import ChildRanks
from dpo_lightning.reference import CachedReference, LiveReference, with_reference_logps
from dpo_lightning.reference_cache import ReferenceCache
from dpo_lightning.results import DIVERGED_FILE, write_json
from dpo_lightning.resume import ExactResume
from dpo_lightning.signals import SignalWatch
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
        changed = _allowed_changes(config, saved["identity"], prepared.identity)
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
        prepared = _with_shards(prepared, computation)
        prepared = _with_reference(config, prepared, device, computation, budget)
        models, data = prepared.models, prepared.data
        assert models.reference is not None
        result["reference"] = _reference_counts(models.reference.rows, models.reference.computed)
        groups, answering = _answering(config, prepared, computation)
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


def _with_shards(prepared: Prepared, computation: Computation) -> Prepared:
    """Models of which each rank has its share, where the strategy wants that."""
    ranks, models = prepared.ranks, prepared.models
    if ranks is None:
        return prepared

    def shard(model: Any) -> Any:
        return shard_model(model, ranks.mesh, ranks.device, compute_dtype=computation.weights)

    def make_reference() -> Any:
        return shard(models.make_reference()).requires_grad_(False).eval()

    reference = models.reference
    policy = shard(models.policy)
    if models.live:
        reference = LiveReference(make_reference(), models.scorer)
    sharded = replace(models, policy=policy, reference=reference, make_reference=make_reference)
    return replace(prepared, models=sharded)


def reference_facts(
    *, weights: str, dtype: str, precision: str, device: str, kernel: str
) -> dict[str, str]:
    """What a reference's log-probabilities depend on beside the token ids.

    Args:
        weights: Hash of its weights.
        dtype: In which they are loaded.
        precision: In which it is computed.
        device: The kind of device.
        kernel: How a micro-batch is scored.
    """
    return {
        "weights": weights,
        "dtype": dtype,
        "precision": precision,
        "device": device,
        "kernel": kernel,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _with_reference(
    config: Config,
    prepared: Prepared,
    device: torch.device,
    computation: Computation,
    budget: Budget,
) -> Prepared:
    """Models and data with the reference in the type that is computed in, or out of the cache."""
    models, data, source = prepared.models, prepared.data, prepared.source
    make_reference = models.make_reference
    models = replace(models, make_reference=lambda: computation.cast(make_reference()))
    if models.reference is not None:
        if isinstance(models.reference, LiveReference):
            computation.cast(models.reference.model)
        return replace(prepared, models=models)
    facts = reference_facts(
        weights=models.reference_weights,
        dtype=str(source.dtype),
        precision=computation.name,
        device=device.type,
        kernel=models.scorer.kernel,
    )
    cache = ReferenceCache(prepared.cache_dir, facts)

    def load() -> Any:
        # Before its first step the policy is the reference, and its shards are in memory already.
        shared = prepared.ranks is not None and models.starts_from_reference
        return models.policy if shared else models.make_reference()

    parts, reference = with_reference_logps(
        [data.train, data.eval],
        cache,
        load=load,
        scorer=models.scorer,
        device=device,
        precision=lambda: computation.context(device),
        micro_batch_tokens=budget.tokens,
        per_token=objective_settings(config.loss).desensitises,
        ranks=prepared.ranks,
    )
    train, evaluation = parts
    return replace(
        prepared,
        models=replace(models, reference=reference),
        data=replace(data, train=train, eval=evaluation),
    )


# Training ---------------------------------------------------------------------------------------


def _allowed_changes(
    config: Config, saved: dict[str, Any], identity: dict[str, Any]
) -> dict[str, Any]:
    """What differs between a checkpoint's experiment and this one, where that is allowed.

    Raises:
        UserError: Where it is not, naming the first thing that differs.
    """
    changed = changed_settings(saved, identity)
    if changed and not config.resume_changed:
        key, values = next(iter(changed.items()))
        raise UserError(
            f"resume: the checkpoint was made with {key}={values['from']}, this run has "
            f"{key}={values['to']}; resume with the same, start a new run, or say "
            "resume_changed=true"
        )
    for key, values in changed.items():
        log.info("resume: %s was %s and is now %s", key, values["from"], values["to"])
    return changed


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
