"""Fixtures that tests of several folders share."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from omegaconf import OmegaConf

from tests.support.models import byte_tokenizer, tiny_llama_config
from tests.support.plugin import pytest_collection_modifyitems as pytest_collection_modifyitems
from tests.support.plugin import pytest_terminal_summary as pytest_terminal_summary
from tests.support.properties import register_profiles
from tests.support.runs import SHARED

# Before any test says how many examples it takes.
register_profiles()


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Reference log-probabilities of the tests, apart from those of whoever runs them."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["DPO_LIGHTNING_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def parsed_once() -> Iterator[None]:
    """Files of settings are parsed once for all runs in this process: a third of composing."""
    load, parsed = OmegaConf.load, {}

    def load_once(file: Any) -> Any:
        text = file.read()
        file.seek(0)
        if text not in parsed:
            parsed[text] = load(file)
        return copy.deepcopy(parsed[text])

    def load_any(file: Any) -> Any:
        return load_once(file) if hasattr(file, "read") else load(file)

    with mock.patch.object(OmegaConf, "load", load_any):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real preference data and a real tiny model; absent on most machines."""
    if not (SHARED / "data").is_dir():
        pytest.skip("no real data beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random one-layer Llama that reads bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_llama_config()).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pairs on thirty prompts."""
    path = tmp_path_factory.mktemp("rows") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Add {i // 2} and {i % 7}.",
            "chosen": f" It is {i // 2 + i % 7}.",
            "rejected": f" No idea{'!' * (i % 4)}",
        }
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
