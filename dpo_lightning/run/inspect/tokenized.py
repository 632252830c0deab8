"""Entries of ``inspect`` that need the tokenizer or the model's config: torch comes with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_lightning.data.packing import epoch_order
from dpo_lightning.data.refused import Refuse
from dpo_lightning.data.splits import PreparedData
from dpo_lightning.errors import UserError
from dpo_lightning.memory.estimate import check_fits
from dpo_lightning.memory.hardware import decide_hardware
from dpo_lightning.models.source import ModelSource
from dpo_lightning.run.chat import ChatTemplate
from dpo_lightning.run.inputs import SourceRows
from dpo_lightning.run.inspect.example import example_of
from dpo_lightning.run.inspect.lengths import length_bias, lengths_of, truncation
from dpo_lightning.run.inspect.planned import plan_run
from dpo_lightning.run.prepare import (
    controlled_groups,
    prepare_groups,
    resolve_source,
    set_threads,
)
from dpo_lightning.settings.folders import cache_folder
from dpo_lightning.settings.schema import Config
from dpo_lightning.tracking.quiet import quiet_libraries


def tokenized(
    config: Config,
    rows: SourceRows | None,
    refuse: Refuse,
    *,
    number: int | None,
    outputs: Path,
) -> dict[str, Any]:
    """Entries about tokens, the plan and the example.

    Args:
        config: The settings.
        rows: The rows that were read; None for the controlled task.
        refuse: Takes each reason for which the run would stop.
        number: Training group to show, from 1; None takes the first of the first step.
        outputs: Parent of the folders of runs and sweeps.

    Returns:
        Entries of the JSON object; and ``data``, the groups, and ``eos``, an id, for the others.
    """
    quiet_libraries()
    hardware = decide_hardware(config.trainer, half_weights=config.model.dtype == "bfloat16")
    source = resolve_source(config, hardware)
    set_threads(config, source)
    chat: ChatTemplate | None = None
    if rows is None:
        data = controlled_groups(config, source)
    else:
        data, chat = prepare_groups(
            config,
            rows,
            source,
            cache_folder(config.reference.cache_dir) / "tokens",
            refuse=refuse,
            keep_tokens=False,
        )
    data.choose_evaluated(config.evaluation.max_prompts)
    entries: dict[str, Any] = {"plan": None, "memory": None, "time": None}
    if data.train:
        planned = plan_run(config, source, hardware, data, outputs=outputs, refuse=refuse)
        entries = {"plan": planned.plan, "memory": planned.memory, "time": planned.time}
        try:
            check_fits(planned.estimate, config.trainer.memory_check)
        except UserError as error:
            refuse(error)
    return {
        "data": data,
        "eos": source.tokenizer.eos_token_id,
        "model": {"name": source.name, "max_length": source.max_length},
        "lengths": {"train": lengths_of(data.train), "eval": lengths_of(data.eval)},
        "length_bias": length_bias(data.train),
        "truncation": _truncation(config, rows, source, data, chat),
        "template": _template(chat, data),
        **entries,
        "example": _example(config, source, data, number),
    }


def _truncation(
    config: Config,
    rows: SourceRows | None,
    source: ModelSource,
    data: PreparedData,
    chat: ChatTemplate | None,
) -> dict[str, Any]:
    parts = [] if rows is None else rows.all
    return truncation(
        [group for part in parts for group in part.groups],
        [*data.train, *data.eval],
        source.tokenizer,
        max_length=source.max_length,
        how=config.data.truncation,
        options=None if chat is None else chat.options,
    )


def _template(chat: ChatTemplate | None, data: PreparedData) -> dict[str, Any] | None:
    if chat is None:
        return None
    used = bool(data.leads)
    return {
        "used": used,
        "says": chat.line(data.leads) if used else None,
        "options": dict(chat.options.kwargs),
        "notes": list(chat.notes),
    }


def _example(
    config: Config, source: ModelSource, data: PreparedData, number: int | None
) -> dict[str, Any] | None:
    count = len(data.train)
    if number is not None and number > count:
        raise UserError(f"--group {number}: there are {count} training groups; name one of these")
    if not count:
        return None
    place = epoch_order(count, seed=config.seed, epoch=0)[0] if number is None else number - 1
    return example_of(data.train[place], source.tokenizer, number=place + 1)
