"""Models that people bring: each trained rightly, or one line whose remedy works; no traceback."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_lightning.preflight import main as preflight
from tests.support.models import _LLAMA_LIKE, byte_tokenizer, tiny_llama_config
from tests.support.runs import Run, run_train

LN_2 = math.log(2)
SHORT = ("trainer.max_steps=2", "evaluation.samples=0", "evaluation.partition_samples=0")
IDS = {"vocab_size": 259, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


@pytest.fixture
def folder(tiny_model, tmp_path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    return copy


def train(tmp_path: Path, rows: Path, model: Path | str, *more: str) -> Run:
    where = tmp_path / f"run-{len([*tmp_path.glob('run-*')])}"
    return run_train(where, f"model.pretrained={model}", f"data.train={rows}", *SHORT, *more)


def refusal(capfd, run: Run) -> str:
    said = capfd.readouterr()
    lines = [line for line in (said.out + said.err).splitlines() if "error:" in line]
    assert run.code == 2, said
    assert "Traceback" not in said.out + said.err
    assert len(lines) == 1, lines
    return lines[0]


def trained(run: Run) -> None:
    assert run.code == 0
    assert run.values("train/loss")[0] == pytest.approx(LN_2, abs=1e-5)


def save(folder: Path, config, kind=AutoModelForCausalLM) -> Path:
    torch.manual_seed(0)
    model = kind.from_config(config) if kind is AutoModelForCausalLM else kind(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def edit(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# Folders that are something else ------------------------------------------------------------------


@pytest.fixture(scope="module")
def lora_run(tiny_model, pairs_file, tmp_path_factory) -> Run:
    run = train(tmp_path_factory.mktemp("lora"), pairs_file, tiny_model, "peft=lora")
    assert run.code == 0
    return run


@pytest.mark.slow
@pytest.mark.parametrize("inside", ["model", "."])
def test_an_adapter_and_the_run_that_made_it(lora_run, pairs_file, tmp_path, capfd, inside):
    said = refusal(capfd, train(tmp_path, pairs_file, lora_run.folder / inside))
    found = re.search(r"(peft=lora) (peft\.adapter=\S+) (model\.pretrained=\S+)$", said)
    assert found, said
    words = (f"data.train={pairs_file}", *SHORT, *found.groups())
    trained(run_train(tmp_path / "followed", *words))


@pytest.mark.slow
def test_a_runs_folder_names_the_model_in_it(tiny_model, pairs_file, tmp_path, capfd):
    run = train(tmp_path, pairs_file, tiny_model)
    said = refusal(capfd, train(tmp_path, pairs_file, run.folder))
    found = re.search(r"a run's folder; .* model\.pretrained=(\S+)$", said)
    assert found, said
    trained(train(tmp_path, pairs_file, found[1]))


def test_a_folder_around_the_model_names_it(folder, pairs_file, tmp_path, capfd):
    outer = tmp_path / "outer"
    shutil.copytree(folder, outer / "snapshots" / "abc")
    said = refusal(capfd, train(tmp_path, pairs_file, outer))
    assert f"model.pretrained={outer / 'snapshots' / 'abc'}" in said


def test_pickled_weights_are_converted_by_the_line_that_is_said(
    folder, pairs_file, tmp_path, capfd
):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    torch.save({}, folder / "training_args.bin")
    said = refusal(capfd, train(tmp_path, pairs_file, folder))
    assert "no weights in safetensors: pytorch_model.bin is a pickle" in said
    code = re.search(r'`python -c "(.*)"`', said)
    assert code, said
    exec(code[1], {})
    trained(train(tmp_path, pairs_file, folder))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_is_told_from_a_file(folder, pairs_file, tmp_path, capfd, name):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (folder / name).write_text(text)
    said = refusal(capfd, train(tmp_path, pairs_file, folder))
    assert f"{name} is a Git LFS pointer" in said
    assert f"`git lfs pull` in {folder}" in said


@pytest.mark.slow
def test_a_gguf_file_and_a_folder_of_one(tmp_path, pairs_file, capfd):
    (tmp_path / "gguf").mkdir()
    path = tmp_path / "gguf" / "m.gguf"
    path.write_bytes(b"GGUF")
    for source in (path, path.parent):
        assert "a GGUF file" in refusal(capfd, train(tmp_path, pairs_file, source))


# Weights ------------------------------------------------------------------------------------------


def test_a_weight_that_is_no_number_is_named(folder, pairs_file, tmp_path, capfd):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    for value in (float("nan"), float("inf")):
        weights[name][0, 0] = value
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        said = refusal(capfd, train(tmp_path, pairs_file, folder))
        assert f"{name} has values that are no numbers" in said


def test_a_weight_of_another_shape_or_missing_is_named(folder, pairs_file, tmp_path, capfd):
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = refusal(capfd, train(tmp_path, pairs_file, folder))
    assert "model.layers.0.mlp.up_proj.weight" in said
    weights["model.layers.0.mlp.up_proj.weight"] = lost[:-1].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    said = refusal(capfd, train(tmp_path, pairs_file, folder))
    assert "up_proj.weight ((31, 16) in the files, (32, 16) by the config)" in said


def test_weights_without_a_place_are_said(pairs_file, tmp_path, capfd):
    folder = save(tmp_path / "two", tiny_llama_config(num_hidden_layers=2))
    edit(folder, num_hidden_layers=1)
    trained(train(tmp_path, pairs_file, folder))
    said = capfd.readouterr()
    assert re.search(
        r"weights of the files have no place .* model\.layers\.1\.", said.out + said.err
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "in 4 bits by bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "in 8 bits by bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "in 4 bits by gptq"),
        ({"quant_method": "fp8"}, "quantized by fp8"),
        ({"quant_method": "mxfp4"}, "quantized by mxfp4"),
    ],
)
@pytest.mark.parametrize("key", ["model", "reference"])
def test_weights_in_few_bits(folder, tiny_model, pairs_file, tmp_path, capfd, stored, words, key):
    edit(folder, quantization_config=stored)
    first, *more = (folder,) if key == "model" else (tiny_model, f"reference.pretrained={folder}")
    said = refusal(capfd, train(tmp_path, pairs_file, first, *more))
    assert words in said
    assert f"{key}.pretrained={folder}" in said
    assert "name the unquantized model" in said


# Kinds --------------------------------------------------------------------------------------------


def test_an_encoder_is_refused_and_not_trained_on_what_it_sees_ahead(pairs_file, tmp_path, capfd):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**IDS, **small, intermediate_size=16)
    folder = save(tmp_path / "bert", config)
    said = refusal(capfd, train(tmp_path, pairs_file, folder))
    assert "it is an encoder" in said
    # The same family as a decoder is trained.
    edit(folder, is_decoder=True)
    trained(train(tmp_path, pairs_file, folder))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("T5Config", "is an encoder-decoder model"),
        ("Qwen2_5_VLConfig", "is a model of text and vision"),
        ("Qwen3VLConfig", "is a model of text and vision"),
        ("Mistral3Config", "is a model of text and vision"),
        ("Qwen2AudioConfig", "is a model of text and audio"),
        ("ViTConfig", "is no causal language model"),
    ],
)
def test_models_of_other_kinds(folder, pairs_file, tmp_path, capfd, kind, words):
    config = getattr(transformers, kind)()
    (folder / "config.json").unlink()
    config.save_pretrained(folder)
    said = refusal(capfd, train(tmp_path, pairs_file, folder))
    assert words in said
    assert "name a causal language model" in said
    assert len(said) < 600


def test_an_unknown_rope_is_named(folder, pairs_file, tmp_path, capfd):
    edit(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0})
    said = refusal(capfd, train(tmp_path, pairs_file, folder))
    assert "rope_type spiral" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        *({"hidden_act": "nonesuch"}, {"num_attention_heads": 0}, {"hidden_size": "wide"}),
        *({"num_hidden_layers": -1}, {"vocab_size": 0}),
    ],
)
def test_an_entry_that_no_model_is_made_of(folder, pairs_file, tmp_path, capfd, changes):
    edit(folder, **changes)
    said = refusal(capfd, train(tmp_path, pairs_file, folder))
    assert "model" in said


# Shapes -------------------------------------------------------------------------------------------


def test_heads_of_several_sizes_are_trained(pairs_file, tmp_path):
    values = _LLAMA_LIKE | IDS | {"num_hidden_layers": 2, "head_dim": 8}
    layers = ["sliding_attention", "full_attention"]
    config = transformers.Gemma4TextConfig(
        **values, layer_types=layers, per_layer_config={1: {"head_dim": 16}}, sliding_window=16,
        hidden_size_per_layer_input=0, max_position_embeddings=128,
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="per-layer"):
        _ = config.head_dim
    trained(train(tmp_path, pairs_file, save(tmp_path / "gemma4", config)))


@pytest.mark.parametrize(
    ("kind", "values", "code", "words"),
    [
        pytest.param(
            *("Gemma4TextConfig", {"per_layer_config": {1: {"head_dim": 512}}}, 0, "total"),
            marks=pytest.mark.slow,
        ),
        ("T5Config", {}, 2, "is an encoder-decoder model"),
        ("LlamaConfig", {"hidden_act": "nonesuch"}, 2, "can be made by its config.json"),
    ],
)
def test_the_memory_of_odd_models_is_estimated_or_they_are_refused(
    pairs_file, tmp_path, capsys, kind, values, code, words
):
    small = {"num_hidden_layers": 2} if code == 0 else {}
    config = getattr(transformers, kind)(**small, **values)
    config.save_pretrained(tmp_path)
    where = f"model.config={tmp_path / 'config.json'}"
    assert preflight([where, f"data.train={pairs_file}"]) == code
    said = capsys.readouterr()
    assert words in said.out + said.err
    assert said.err.count("error:") == (code != 0)


@pytest.mark.slow
def test_rows_on_both_sides_of_a_longrope_limit_are_at_ln_2(pairs_file, tmp_path):
    """Each row's loss is that of its own factors; the cache and the first step agree on them."""
    rope = {
        "rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
        "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 7.0, 11.0],
        "original_max_position_embeddings": 26,
    }  # fmt: skip
    config = transformers.Phi3Config(
        **_LLAMA_LIKE | IDS, rope_parameters=rope, max_position_embeddings=128,
        original_max_position_embeddings=26,
    )  # fmt: skip
    folder = save(tmp_path / "phi3", config)
    still = ("optimizer.lr=1e-12", "trainer.max_steps=6", "data.batch_size=7")
    for _ in range(2):
        run = train(tmp_path, pairs_file, folder, *still, f"reference.cache_dir={tmp_path}")
        assert run.code == 0
        assert run.values("train/loss") == pytest.approx([LN_2] * 6, abs=2e-6)


@pytest.mark.slow
def test_a_model_that_cannot_write_answers_is_trained_without_them(pairs_file, tmp_path, capfd):
    """Of a hybrid with no attention layer transformers makes no cache."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:4]))
    values = _LLAMA_LIKE | IDS | {"attn_layer_period": 9, "attn_layer_offset": 8}
    config = transformers.JambaConfig(
        **values, num_experts=2, mamba_d_state=4, use_mamba_kernels=False
    )
    folder = save(tmp_path / "jamba", config)
    said = refusal(capfd, train(tmp_path, few, folder, "evaluation.samples=2"))
    assert "this jamba model cannot write answers" in said
    found = re.search(r"(evaluation\.samples=0) (evaluation\.partition_samples=0)", said)
    assert found
    trained(train(tmp_path, few, folder, *found.groups()))


def test_a_tokenizer_without_a_file_or_without_words(folder, pairs_file, tmp_path, capfd):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    said = refusal(capfd, train(tmp_path, pairs_file, folder))
    assert "no tokenizer: its vocabulary is empty" in said
    (folder / "tokenizer_config.json").unlink()
    said = refusal(capfd, train(tmp_path, pairs_file, folder))
    assert "no tokenizer: the folder has no tokenizer.json" in said
    assert "model.tokenizer=" in said


# Tokenizers ---------------------------------------------------------------------------------------


def test_a_token_that_no_row_has_may_be_more_than_the_model_knows(
    folder, pairs_file, tmp_path, capfd
):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    trained(train(tmp_path, pairs_file, folder, "evaluation.samples=2"))
    said = capfd.readouterr()
    assert "260 tokens, the model's vocabulary 259: [PAD] cannot be in a row" in said.out + said.err


def test_a_row_with_such_a_token_is_named_and_the_remedy_works(folder, tmp_path, capfd):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<think>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "a", "chosen": "<think>b", "rejected": "c"}
    rows.write_text("".join(json.dumps(row | {"prompt": f"a{i}"}) + "\n" for i in range(8)))
    said = refusal(capfd, train(tmp_path, rows, folder))
    assert "rows.jsonl:" in said
    assert "has the token <think>" in said
    assert "model.tokenizer=" in said
    code, after = re.search(r'`python -c "(.*)"`, then model\.pretrained=(\S+)', said).groups()
    exec(code, {})
    trained(train(tmp_path, rows, after))


def test_overrides_beside_weights_are_to_be_left_out(folder, pairs_file, tmp_path, capfd):
    said = refusal(
        capfd, train(tmp_path, pairs_file, folder, "model.config_overrides.vocab_size=300")
    )
    assert "leave model.config_overrides out" in said


def test_a_random_model_takes_the_vocabulary_that_is_said(tmp_path, pairs_file, capfd):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_llama_config(vocab_size=100).to_dict()))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    words = (
        f"model.config={config}", f"model.tokenizer={tmp_path / 'tokenizer'}",
        f"data.train={pairs_file}", *SHORT,
    )  # fmt: skip
    said = refusal(capfd, run_train(tmp_path / "run", *words))
    remedy = re.search(r"model\.config_overrides\.vocab_size=\d+", said)
    assert remedy, said
    trained(run_train(tmp_path / "followed", *words, remedy[0]))
