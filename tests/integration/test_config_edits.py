"""Same weights, another config.json: another reference, another run; told by the losses."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig

from tests.support.models import byte_tokenizer, tiny_llama_config
from tests.support.runs import Run, run_train

LN_2 = math.log(2)

# A loss of ln 2 in every row: nothing moves, and the rows are longer than the window.
STILL = (
    "optimizer.lr=1e-12",
    "trainer.max_steps=2",
    "data.batch_size=4",
    "evaluation.samples=0",
    "evaluation.partition_samples=0",
)


def save(folder: Path, config) -> Path:
    """A model whose answers depend on every edge of its attention."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(12.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    values = tiny_llama_config(num_hidden_layers=2).to_dict()
    names = [*("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")]
    names += ["num_attention_heads", "num_key_value_heads", "max_position_embeddings"]
    config = MistralConfig(
        **{name: values[name] for name in names}, sliding_window=64, eos_token_id=1, pad_token_id=2
    )
    return save(tmp_path_factory.mktemp("base"), config)


def edited(base: Path, folder: Path, **changes) -> Path:
    """A copy of a model whose config.json says something else."""
    shutil.copytree(base, folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.fixture(scope="module")
def shared_cache(base, pairs_file, tmp_path_factory) -> Path:
    """A cache that holds what the base model gives the rows."""
    folder = tmp_path_factory.mktemp("first")
    run = train(folder, "run", pairs_file, base, cache=folder)
    assert run.values("train/loss") == pytest.approx([LN_2] * 2, abs=1e-5)
    return folder


def train(tmp_path: Path, name: str, rows: Path, model: Path, *more: str, cache: Path) -> Run:
    run = run_train(
        tmp_path / name,
        f"data.train={rows}",
        f"model.pretrained={model}",
        f"reference.cache_dir={cache}",
        *STILL,
        *more,
    )
    assert run.code == 0
    return run


EDITS = {
    "rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "window": {"sliding_window": 5},
    "eps": {"rms_norm_eps": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "edit",
    ["rope", *(pytest.param(edit, marks=pytest.mark.slow) for edit in EDITS if edit != "rope")],
)
def test_the_reference_of_an_edited_config_is_never_the_others(
    base, shared_cache, pairs_file, tmp_path, edit
):
    """Out of the cache of the first model the loss was ln 2, as if both were one."""
    other = edited(base, tmp_path / "other", **EDITS[edit])
    reference = f"reference.pretrained={other}"
    live = train(tmp_path, "live", pairs_file, base, reference, "reference=live", cache=tmp_path)
    cached = train(tmp_path, "cached", pairs_file, base, reference, cache=shared_cache)
    right = live.values("train/loss")
    assert abs(right[0] - LN_2) > 0.005
    assert cached.values("train/loss") == pytest.approx(right, abs=1e-5)
    # And the edited model beside its own start is at ln 2 in every row.
    alone = train(tmp_path, "alone", pairs_file, other, cache=shared_cache)
    assert alone.values("train/loss") == pytest.approx([LN_2] * 2, abs=1e-5)
    assert alone.result["reference"]["cached"] == alone.result["reference"]["rows"]


@pytest.mark.slow
def test_a_moved_folder_of_another_version_is_the_same_model(
    base, shared_cache, pairs_file, tmp_path
):
    saved_anew = {"transformers_version": "4.0.0", "_name_or_path": "elsewhere", "use_cache": False}
    other = edited(base, tmp_path / "other", **saved_anew, dtype="bfloat16", architectures=["X"])
    again = train(tmp_path, "two", pairs_file, other, cache=shared_cache)
    assert again.result["reference"]["computed"] == 0


@pytest.mark.slow
def test_random_models_of_one_size_and_several_shapes_share_a_cache(
    tiny_model, pairs_file, tmp_path
):
    """Heads of another width leave every weight as it is, and no number."""
    for heads in (2, 4):
        run = run_train(
            tmp_path / f"run-{heads}",
            f"data.train={pairs_file}",
            f"model.config={tiny_model / 'config.json'}",
            f"model.tokenizer={tiny_model}",
            f"model.config_overrides={{num_attention_heads: {heads}, num_key_value_heads: {heads}, "
            f"head_dim: {32 // heads}, hidden_size: 32}}",
            f"reference.cache_dir={tmp_path}",
            *STILL,
        )
        assert run.code == 0
        assert run.values("train/loss") == pytest.approx([LN_2] * 2, abs=1e-5)
        assert run.result["reference"]["cached"] == 0


def test_a_resume_names_the_entry_that_was_edited(base, pairs_file, tmp_path, capfd):
    folder = edited(base, tmp_path / "own")
    train(tmp_path, "run", pairs_file, folder, "checkpoint.every_n_steps=2", cache=tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sliding_window": 7}))
    words = (
        f"data.train={pairs_file}", f"model.pretrained={folder}", *STILL,
        f"reference.cache_dir={tmp_path}", "trainer.max_steps=3",
    )  # fmt: skip
    run = run_train(tmp_path / "more", *words, f"resume={tmp_path / 'run'}")
    assert run.code == 2
    error = capfd.readouterr().err
    assert "made with config.json.sliding_window=64 " in error
    assert "this run has config.json.sliding_window=7 " in error
