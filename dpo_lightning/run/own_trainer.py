"""Module and data module of a run, for a trainer of somebody else's.

They are the ones that a run has, made by the same functions from the same settings. Loggers,
checkpoints, callbacks and the loop itself are the trainer's.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from dpo_lightning.data.datamodule import PreferenceDataModule
from dpo_lightning.errors import UserError
from dpo_lightning.memory.estimate import check_fits
from dpo_lightning.memory.hardware import decide_hardware
from dpo_lightning.models.devices import settle_attention
from dpo_lightning.reference.fill import Watch
from dpo_lightning.run.build import make_data_module, make_trainer, module_arguments
from dpo_lightning.run.inputs import SourceRows, check_labels, check_named, read_named
from dpo_lightning.run.opened import key_of
from dpo_lightning.run.placement import Placed, place, with_reference
from dpo_lightning.run.plan import RunPlan, choose_folders, trainer_plan
from dpo_lightning.run.prepare import Prepared, prepare
from dpo_lightning.run.record import RunRecord
from dpo_lightning.run.session import plan_session
from dpo_lightning.settings.blocks import quoted
from dpo_lightning.settings.compose import compose_one, ready_hydra
from dpo_lightning.settings.schema import Config
from dpo_lightning.tracking.phases import Phases
from dpo_lightning.training.module import DPOModule
from dpo_lightning.training.precision import make_computation

log = logging.getLogger(__name__)

_SECTIONS = ("model", "peft", "data", "loss", "reference", "optimizer")
_KEYS = (
    *("beta", "seed", "plugins", "evaluation.max_prompts", "trainer.accelerator"),
    *("trainer.precision", "trainer.max_steps", "trainer.max_epochs", "trainer.memory_check"),
    *("trainer.log_every_n_steps", "trainer.max_skipped_steps"),
)
_MODEL, _TRAIN, _EVAL = "model", "rows.jsonl", "eval_rows.jsonl"


class TrainerFit(Callback):
    """Checks that a trainer trains as the module was made for; it sets the precision.

    Args:
        plan: The run's.
        kind: Kind of the device that the module was made for.
    """

    def __init__(self, plan: RunPlan, kind: str) -> None:
        self._plan = plan
        self._kind = kind

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Looks at the trainer before it moves the model.

        Raises:
            UserError: If it would train something else than the settings say.
        """
        total, precision = self._plan.schedule.total_steps, self._plan.hardware.precision
        if trainer.world_size > 1:
            raise UserError(
                f"Trainer(devices={trainer.num_devices}): these modules train on one device; give "
                "devices=1, or run `train` for several"
            )
        kind = trainer.strategy.root_device.type
        if kind != self._kind:
            raise UserError(
                f"Trainer(accelerator=…): it trains on {kind}, and the modules were made for "
                f"{self._kind}; make them with trainer.accelerator={kind.replace('cuda', 'gpu')}"
            )
        if trainer.precision not in ("32-true", precision):
            raise UserError(
                f"Trainer(precision={trainer.precision!r}): the modules compute in {precision}; "
                "make them with trainer.precision=, and leave the trainer's out"
            )
        if stage == "fit" and not 0 <= trainer.max_steps <= total:
            raise UserError(
                f"Trainer(max_steps={trainer.max_steps}): the learning rate's schedule ends after "
                f"{total} steps; give max_steps=data.total_steps, and trainer.max_steps= in the "
                "settings for another number"
            )
        memory = self._plan.memory
        make_computation(
            precision,
            trainer,
            sharded=False,
            half_weights=memory.half_weights,
            adapters=memory.adapters is not None,
        )


class OwnTrainerModule(DPOModule):
    """A module that looks at the trainer which it is given to.

    Args:
        check: Looks at it.
        **arguments: Those of :class:`~dpo_lightning.training.module.DPOModule`.
    """

    def __init__(self, check: TrainerFit, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._check = check

    def configure_callbacks(self) -> list[Callback]:
        """The check, which every trainer calls."""
        return [self._check]


def make_modules(
    overrides: Sequence[str],
    *,
    model: Any = None,
    tokenizer: Any = None,
    rows: Sequence[Mapping[str, Any]] | None = None,
    eval_rows: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[DPOModule, PreferenceDataModule]:
    """Makes them; see :func:`dpo_lightning.api.lightning_modules`.

    Args:
        overrides: Settings.
        model: A transformers model; None: the settings name one.
        tokenizer: Its tokenizer.
        rows: Training rows; None: the settings name them.
        eval_rows: Held-out rows; None: the settings name them.

    Raises:
        UserError: If a setting, the model or a row is wrong.
    """
    _check(overrides, model=model, tokenizer=tokenizer, rows=rows, eval_rows=eval_rows)
    with _in_files(model, tokenizer, rows, eval_rows) as words, _nothing_left():
        with ready_hydra():
            config = compose_one([*overrides, *words])
        return _make(config)


def _check(overrides: Sequence[str], **given: Any) -> None:
    """Refuses settings that are the trainer's, and what is given twice.

    Raises:
        UserError: If there are such.
    """
    keys = [key_of(word) for word in overrides]
    for key in keys:
        if key not in _KEYS and key.partition(".")[0] not in _SECTIONS:
            raise UserError(
                f"{key}: with a trainer of your own it is that trainer's; leave it out. Here there "
                f"are beta, seed, plugins, {', '.join(_SECTIONS)} and {', '.join(_KEYS[3:])}"
            )
    if (given["model"] is None) != (given["tokenizer"] is None):
        raise UserError("model=, tokenizer=: give both, or name a folder with model.pretrained=")
    if given["eval_rows"] is not None and given["rows"] is None:
        raise UserError(
            "eval_rows=: give rows= too, or name both files with data.train= and data.eval="
        )
    said = {"model": "model.pretrained", "rows": "data.train", "eval_rows": "data.eval"}
    for name, key in said.items():
        if given[name] is not None and key in keys:
            raise UserError(f"{name}= and {key}= both name one: give one of them")


@contextmanager
def _in_files(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]] | None,
    eval_rows: Sequence[Mapping[str, Any]] | None,
) -> Iterator[list[str]]:
    """Context with what is in memory in files, as settings; errors name no such file's folder."""
    with tempfile.TemporaryDirectory(prefix="dpo_lightning_") as name:
        folder, words = Path(name), list[str]()
        if model is not None:
            model.save_pretrained(folder / _MODEL)
            tokenizer.save_pretrained(folder / _MODEL)
            words.append(f"model.pretrained={quoted(str(folder / _MODEL))}")
        for key, file, own in (("data.train", _TRAIN, rows), ("data.eval", _EVAL, eval_rows)):
            if own is None:
                continue
            try:
                text = "".join(f"{json.dumps(dict(row))}\n" for row in own)
            except (TypeError, ValueError) as error:
                raise UserError(f"{file}: {error}; give rows of texts and numbers") from error
            (folder / file).write_text(text)
            words.append(f"{key}={quoted(str(folder / file))}")
        try:
            yield words
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}/", "")) from error


@contextmanager
def _nothing_left() -> Iterator[None]:
    """Context after which random generators and threads are as they were."""
    threads = torch.get_num_threads()
    try:
        with isolate_rng():
            yield
    finally:
        torch.set_num_threads(threads)


def _make(config: Config) -> tuple[DPOModule, PreferenceDataModule]:
    config = replace(
        config,
        trainer=replace(config.trainer, devices=1, enable_progress_bar=False),
        strategy=replace(config.strategy, name="auto"),
    )
    rows = _rows(config)
    hardware = decide_hardware(config.trainer, half_weights=config.model.dtype == "bfloat16")
    settle_attention(hardware.beside)
    # Nothing is written below it.
    folders = choose_folders(config, Path.cwd())
    show, resolved = Phases.on_stderr(), asdict(config)
    prepared = prepare(
        config,
        rows,
        hardware=hardware,
        ranks=None,
        threads=torch.get_num_threads(),
        tokens=folders.tokens,
        resolved=resolved,
        record=_unread(config),
        folder=None,
        show=show,
    )
    plan = plan_session(config, folders, hardware, trainer_plan(config), prepared, resolved)
    placed = _placed(plan, prepared)
    prepared = with_reference(plan, prepared, placed, watch=Watch(lambda: None, show))
    check = TrainerFit(plan, placed.device.type)
    module = OwnTrainerModule(check, **module_arguments(plan, prepared, placed))
    return module, make_data_module(plan, prepared, placed)


def _rows(config: Config) -> SourceRows | None:
    """The rows that the settings name; bad ones are left out where the settings allow it."""
    rows = read_named(config)
    if rows is not None:
        bad = check_named(rows, config)
        check_labels(rows, config.loss)
        if bad:
            log.info("bad rows: %d, they are left out", len(bad))
    return rows


def _unread(config: Config) -> RunRecord:
    """A record that nobody reads: no result is written."""
    return RunRecord(
        beta=config.beta,
        loss=config.loss.name,
        seed=config.seed,
        settings_hash="",
        versions={},
        command="",
    )


def _placed(plan: RunPlan, prepared: Prepared) -> Placed:
    """Precision and budget on the device that a trainer will have."""
    placed = place(plan, prepared, make_trainer(plan, loggers=[], callbacks=[], manifest={}))
    check_fits(placed.estimate, plan.memory.check)
    prepared.models.scorer.choose_kernel(
        placed.device, placed.computation.dtype(prepared.source.dtype)
    )
    if placed.budget.checkpointing:
        prepared.models.policy.activation_checkpointing_enable({"use_reentrant": False})
    return placed
