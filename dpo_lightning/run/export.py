"""The trained policy as a Hugging Face folder, or its adapter as one of PEFT, with a card."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from transformers import GenerationConfig

from dpo_lightning.models.adapters import Adapters


def export_model(
    policy: Any, tokenizer: Any, folder: Path, *, config: Any, card: ModelCard
) -> None:
    """Writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load.

    It is staged beside its place and renamed, so that a folder that is there is whole.

    Args:
        policy: The trained model.
        tokenizer: Its tokenizer; a chat template that was added is exported with it.
        folder: Where to.
        config: The model's config as it was loaded; dropout was off for training only.
        card: Its card.
    """
    trained_config = policy.config
    _check_generation_config(policy)
    with staged_folder(folder) as staged:
        try:
            policy.config = config
            policy.save_pretrained(staged)
        finally:
            policy.config = trained_config
        _save_tokenizer(tokenizer, staged)
        card.save(staged / "README.md")


def export_adapter(
    adapters: Adapters,
    tokenizer: Any,
    folder: Path,
    *,
    base: str | None,
    revision: str | None,
    card: ModelCard,
) -> None:
    """Writes a folder that ``PeftModel.from_pretrained`` loads onto the base model.

    Args:
        adapters: The trained adapter.
        tokenizer: The policy's tokenizer, as in :func:`export_model`.
        folder: Where to.
        base: Folder or hub id of the base model; None for random weights.
        revision: Its revision on the hub.
        card: Its card.
    """
    with staged_folder(folder) as staged:
        adapters.save(staged, base=base, revision=revision)
        _save_tokenizer(tokenizer, staged)
        card.save(staged / "README.md")


@contextlib.contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """A folder beside its place, which takes that when it is whole.

    Args:
        folder: The place; what is there gives way.
    """
    staged = folder.with_name(f".{folder.name}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    yield staged
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    staged.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    _portable_tokenizer_class(folder / "tokenizer_config.json")


def _check_generation_config(policy: Any) -> None:
    """Some hub models carry settings that transformers reads but refuses to write."""
    own = policy.generation_config
    try:
        own.validate(strict=True)
    except ValueError:
        policy.generation_config = GenerationConfig(
            bos_token_id=own.bos_token_id,
            eos_token_id=own.eos_token_id,
            pad_token_id=own.pad_token_id,
        )


def _portable_tokenizer_class(path: Path) -> None:
    """Version 5 of transformers writes a class of its own that others do not know."""
    values = json.loads(path.read_text())
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
