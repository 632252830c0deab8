"""Fixtures that tests of several folders share."""

import json
import os
from pathlib import Path

import pytest

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
