"""A cache that holds another model's values: refused by name, and both remedies work."""

import re
import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.support.reference_caches import publish_unchecked
from tests.support.runs import TINY, Run, run_train

WORDS = (*TINY, "trainer.max_steps=4", "evaluation.partition_samples=0")


def run(folder: Path, cache: Path, *more: str) -> Run:
    return run_train(folder, *WORDS, f"reference.cache_dir={cache}", *more)


def spoil(cache: Path) -> None:
    """Values of another model under the right names; sound by every hash."""
    for path in cache.glob("reference/*/*.safetensors"):
        part = load_file(path)
        part["logps"] -= 0.02
        publish_unchecked(path, part)


def refused(folder: Path, cache: Path, capfd, *more: str) -> Path:
    """The folder that a refusal names."""
    capfd.readouterr()
    assert run(folder, cache, *more).code == 2
    [said] = [line for line in capfd.readouterr().err.splitlines() if "error:" in line]
    named = re.search(r"the cache (\S+) has .*delete that folder.*reference\.cache_dir=", said)
    assert named, said
    assert Path(named[1]).parent == cache / "reference"
    return Path(named[1])


@pytest.mark.slow
def test_a_cache_of_another_model_is_refused_and_the_remedies_work(tmp_path, capfd):
    cache = tmp_path / "cache"
    first = run(tmp_path / "first", cache, "checkpoint.every_n_steps=2", "checkpoint.keep=2")
    resume = f"resume={tmp_path / 'first/checkpoints/step-000002.ckpt'}"
    spoil(cache)
    named = refused(tmp_path / "refused", cache, capfd)
    assert refused(tmp_path / "resumed", cache, capfd, resume) == named

    elsewhere = run(tmp_path / "elsewhere", tmp_path / "other")
    shutil.rmtree(named)
    again = run(tmp_path / "again", cache)
    onwards = run(tmp_path / "onwards", cache, resume)
    assert again.result["reference"]["computed"] > 0
    assert onwards.result["reference"]["computed"] == 0
    # A run whose rows are read and checked has the numbers of one that computed them.
    losses = first.values("train/loss")
    assert elsewhere.values("train/loss") == again.values("train/loss") == losses
    assert onwards.values("train/loss")[-2:] == losses[-2:]


@pytest.mark.slow
def test_a_base_model_beside_its_adapter_is_checked_too(tmp_path, capfd):
    assert run(tmp_path / "first", tmp_path, "peft=lora").code == 0
    spoil(tmp_path)
    refused(tmp_path / "refused", tmp_path, capfd, "peft=lora")
