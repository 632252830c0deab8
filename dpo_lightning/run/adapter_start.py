"""Adapters that a run starts with: new ones, or those of files that its settings name."""

from __future__ import annotations

import logging
from pathlib import Path

from dpo_lightning.models.adapter_files import AdapterFile, read_adapter
from dpo_lightning.models.adapters import LoraSettings
from dpo_lightning.models.source import ModelSource
from dpo_lightning.reference.pair import AdapterSettings
from dpo_lightning.settings.schema import BASE, Config, PeftConfig

log = logging.getLogger(__name__)


def adapter_settings(config: Config, source: ModelSource) -> AdapterSettings | None:
    """Adapter settings with their files read; None where all weights are trained."""
    peft, reference = config.peft, config.reference
    if peft.kind == "none":
        return None

    def read(name: str, key: str, revision: str | None) -> AdapterFile:
        file = read_adapter(name, key=key, revision=revision)
        if file.base is not None and not _same_place(file.base, source.source):
            log.info("%s was trained on %s, here on %s", file.name, file.base, source.source)
        return file

    start: LoraSettings | AdapterFile
    frozen = None
    if peft.adapter is None:
        start = _new_adapter(peft)
    else:
        # Where nothing else is said, what the policy starts as is the reference, and not the base.
        start = frozen = read(peft.adapter, "peft.adapter", peft.revision)
        if start.dropout != peft.dropout:
            log.info(
                "%s was trained with dropout %g, here with peft.dropout=%g",
                *(start.name, start.dropout, peft.dropout),
            )
    if reference.adapter == BASE:
        frozen = None
    elif reference.adapter is not None:
        frozen = read(reference.adapter, "reference.adapter", reference.revision)
    return AdapterSettings(start=start, reference=frozen, dropout=peft.dropout)


def _new_adapter(peft: PeftConfig) -> LoraSettings:
    return LoraSettings(
        r=peft.r,
        alpha=peft.alpha,
        target_modules=peft.target_modules,
        rslora=peft.rslora,
        dora=peft.dora,
        gaussian=peft.init == "gaussian",
    )


def _same_place(one: str, other: str) -> bool:
    if one == other:
        return True
    paths = Path(one), Path(other)
    return all(path.exists() for path in paths) and paths[0].samefile(paths[1])
