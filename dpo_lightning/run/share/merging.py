"""A whole model of an adapter and its base model, both read from their files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from huggingface_hub import ModelCard

from dpo_lightning.errors import UserError
from dpo_lightning.models.adapter_files import AdapterFile, read_adapter
from dpo_lightning.models.adapters import Adapters
from dpo_lightning.models.kinds import check_kind
from dpo_lightning.models.loading import load_config, load_model, load_tokenizer
from dpo_lightning.run.card import model_card
from dpo_lightning.run.export import export_model
from dpo_lightning.run.share.facts import card_facts
from dpo_lightning.run.share.words import Exported
from dpo_lightning.settings.recorded import SETTINGS_FILE, read_recorded

log = logging.getLogger(__name__)


def merge_adapter(exported: Exported, output: Path, *, weights: Path) -> None:
    """Writes the base model with the adapter added into its weights.

    Args:
        exported: The adapter's export.
        output: Folder to write.
        weights: Folder of the adapter's weights, which may be a changed copy of the export.

    Raises:
        UserError: If the base model is gone, random, or another one.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    file = read_adapter(str(weights), key="RUN")
    values = _recorded(exported)
    base, revision = _base(exported, file, values)
    if values.get("peft.quantization", "none") != "none":
        log.warning(
            "the adapter was trained beside weights in 4 bits; it is merged into the whole ones, "
            "which answer a little otherwise"
        )
    config = load_config(base, key="base model", revision=revision)
    check_kind(config, name=f"base model={base}", weights=True)
    dtype = getattr(torch, str(values.get("model.dtype", "float32")))
    policy = load_model(base, config, key="base model", dtype=dtype, revision=revision)
    # The export's own tokenizer has the chat template that the training used.
    tokenizer = load_tokenizer(str(exported.folder), key="RUN")
    adapters = Adapters(policy, file, reference=None, dropout=0.0, seed=0, load_base=_never)
    merged = adapters.merge()
    facts = card_facts(exported)
    card = _plain_card(base) if facts is None else model_card(facts, adapter=False)
    export_model(merged, tokenizer, output, config=config, card=card)


def _recorded(exported: Exported) -> dict[str, Any]:
    """The run's settings by dotted key, its paths as seen from here; empty without a run."""
    path = None if exported.run is None else exported.run / SETTINGS_FILE
    return {} if path is None or not path.is_file() else read_recorded(path).values


def _base(exported: Exported, file: AdapterFile, values: dict[str, Any]) -> tuple[str, str | None]:
    """Folder or hub id of the base model, and its revision."""
    source = values.get("model.pretrained") or file.base
    if values.get("model.config") is not None or source is None:
        raise UserError(
            f"{exported.folder}: the adapter's base model was made of random weights, which no "
            "file holds; peft.merge=true has a run write the merged model itself"
        )
    return str(source), values.get("model.revision")


def _never() -> NoReturn:
    raise AssertionError("the base model is loaded as it is stored")


def _plain_card(base: str) -> ModelCard:
    """The card of an adapter that no run is known of."""
    name = Path(base).name
    return ModelCard(
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [dpo-lightning]\n"
        f"---\n\n# {name} with an adapter\n\nA LoRA adapter merged into the weights of `{name}`.\n"
    )
