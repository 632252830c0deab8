"""The hash of the inputs that decide a run's numbers, by which a sweep finds finished trials."""

import functools
import os
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.settings.fingerprint import settings_hash
from dpo_lightning.settings.schema import Config


def hash_of(**changes: Any) -> str:
    """The hash of the defaults with some settings changed (``__`` for the dot)."""
    config = Config()
    for key, value in changes.items():
        *sections, leaf = key.split("__")
        section = functools.reduce(getattr, sections, config)
        assert hasattr(section, leaf), key
        setattr(section, leaf, value)
    return settings_hash(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("beta", 0.2),
        ("seed", 2),
        ("loss__name", "ipo"),
        ("loss__label_smoothing", 0.1),
        ("loss__terms", {"ipo": 1.0}),
        ("data__batch_size", 8),
        ("data__controlled__train_groups", 8),
        ("model__dtype", "bfloat16"),
        ("optimizer__lr", 1e-5),
        ("peft__kind", "lora"),
        ("reference__pretrained", "org/model"),
        ("reference__sync_every", 64),
        ("trainer__max_steps", 3),
        ("evaluation__samples", 3),
        ("plugins", ["mine"]),
    ],
)
def test_what_changes_the_numbers_changes_the_hash(key: str, value: Any) -> None:
    assert hash_of(**{key: value}) != hash_of()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "mine"),
        ("logger__name", "csv"),
        ("resume", "auto"),
        ("resume_changed", True),
        ("debug__traceback", True),
        ("sweep__metric", "samples/judge"),
        ("sweep__prune", "halving"),
        ("reference__cache_dir", "/elsewhere"),
        ("trainer__memory_check", "off"),
        # The share of an update that there is none of.
        ("reference__sync_alpha", 0.3),
        # An option of losses that are not used.
        ("loss__gamma", 2.0),
        # An endpoint that nobody asks.
        ("evaluation__judge_model", "m"),
        *(("evaluation__judge_timeout", 5.0), ("evaluation__judge_price", [1.0, 2.0])),
        *(("evaluation__judge_retries", 0), ("evaluation__judge_key_variable", "KEY")),
    ],
)
def test_what_is_only_about_where_and_how_does_not(key: str, value: Any) -> None:
    assert hash_of(**{key: value}) == hash_of()


@pytest.mark.parametrize(
    "key", ["data__train", "data__eval", "data__chat_template", "evaluation__judge_prompt"]
)
def test_a_file_of_rows_counts_by_its_content(key: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("one")
    before = hash_of(**{key: str(path)})
    os.utime(path, (1, 1))
    assert hash_of(**{key: str(path)}) == before
    path.write_text("two")
    assert hash_of(**{key: str(path)}) != before


@pytest.mark.parametrize(
    "key",
    [
        *("model__pretrained", "model__tokenizer", "model__config", "peft__adapter"),
        *("reference__pretrained", "reference__adapter", "evaluation__judge"),
    ],
)
def test_a_folder_of_weights_counts_by_names_sizes_and_times(key: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_text("one")
    os.utime(path, (1, 1))
    before = hash_of(**{key: str(tmp_path)})
    path.write_text("two")
    os.utime(path, (1, 1))
    assert hash_of(**{key: str(tmp_path)}) == before
    os.utime(path, (2, 2))
    assert hash_of(**{key: str(tmp_path)}) != before
    path.write_text("more")
    os.utime(path, (1, 1))
    assert hash_of(**{key: str(tmp_path)}) != before


def test_a_plugin_counts_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine" / "judges.py"
    path.parent.mkdir()
    (path.parent / "__init__.py").touch()
    path.write_text("one = 1\n")
    before = hash_of(plugins=["mine.judges"])
    path.write_text("one = 2\n")
    assert hash_of(plugins=["mine.judges"]) != before
