"""Models, tokenizers and files that cannot be used: exit 2, one line, the key, the remedy."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaForSequenceClassification

from tests.support.models import byte_tokenizer, tiny_llama_config
from tests.support.runs import run_train


@pytest.fixture
def folder(tiny_model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    return copy


def refused(tmp_path, capfd, *overrides: str, code: int = 2) -> str:
    run = run_train(tmp_path / "run", *overrides)
    captured = capfd.readouterr()
    said = [line for line in (captured.out + captured.err).splitlines() if "error:" in line]
    assert run.code == code
    assert "Traceback" not in captured.out + captured.err
    assert len(said) == 1, captured
    if (run.folder / "result.json").exists():
        assert run.result["status"] == "failed"
        assert run.result["error"] in said[0]
    assert not (run.folder / "model").exists()
    return said[0]


def remove_weights(folder):
    (folder / "model.safetensors").unlink()


def pickle_weights(folder):
    remove_weights(folder)
    model = AutoModelForCausalLM.from_config(tiny_llama_config())
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def drop_a_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))


def change_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def classifier(folder):
    LlamaForSequenceClassification(tiny_llama_config()).save_pretrained(folder)


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def no_eos(folder):
    byte_tokenizer(eos=False).save_pretrained(folder)


def torn_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def broken_config(folder):
    (folder / "config.json").write_text("{")


def unknown_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))


def code_from_outside(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    canary = folder / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w')")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (remove_weights, ["no weights"]),
        (pickle_weights, ["no weights"]),
        (drop_a_layer, ["missing", "layers.1"]),
        (change_width, ["weights"]),
        (classifier, ["missing", "lm_head"]),
        (no_tokenizer, ["tokenizer", "model.tokenizer="]),
        (no_eos, ["EOS", "model.tokenizer="]),
        (torn_weights, ["no weights"]),
        (broken_config, ["config"]),
        (unknown_type, ["config"]),
        (code_from_outside, ["config"]),
    ],
)
def test_a_folder_that_is_no_model(folder, pairs_file, tmp_path, capfd, damage, words):
    damage(folder)
    said = refused(tmp_path, capfd, f"model.pretrained={folder}", f"data.train={pairs_file}")
    for word in ["model.pretrained", str(folder), *words]:
        assert word in said
    assert not (folder / "canary").exists()


def test_a_tokenizer_larger_than_the_vocabulary(pairs_file, tmp_path, capfd):
    folder = tmp_path / "small"
    AutoModelForCausalLM.from_config(tiny_llama_config(vocab_size=100)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    said = refused(tmp_path, capfd, f"model.pretrained={folder}", f"data.train={pairs_file}")
    assert "259 tokens" in said
    assert "100" in said
    assert "model.tokenizer=" in said


def test_more_than_the_models_positions(tiny_model, pairs_file, tmp_path, capfd):
    said = refused(
        tmp_path,
        capfd,
        f"model.pretrained={tiny_model}",
        f"data.train={pairs_file}",
        "data.max_length=129",
    )
    assert "data.max_length=129" in said
    assert "128" in said


def test_a_reference_with_another_vocabulary(tiny_model, pairs_file, tmp_path, capfd):
    other = tmp_path / "other"
    AutoModelForCausalLM.from_config(tiny_llama_config(vocab_size=300)).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    arguments = [f"model.pretrained={tiny_model}", f"data.train={pairs_file}"]
    said = refused(tmp_path, capfd, *arguments, f"reference.pretrained={other}")
    assert "reference.pretrained" in said
    assert "300" in said

    AutoModelForCausalLM.from_config(tiny_llama_config()).save_pretrained(other)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([])
    values = json.loads((other / "tokenizer.json").read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["!"], vocabulary["a"] = vocabulary["a"], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(values))
    said = refused(tmp_path, capfd, *arguments, f"reference.pretrained={other}")
    assert "another vocabulary" in said


@pytest.mark.slow
@pytest.mark.parametrize("key", ["model.pretrained", "reference.pretrained", "model.tokenizer"])
def test_the_hub_out_of_reach(tiny_model, pairs_file, tmp_path, capfd, key):
    arguments = {"model.pretrained": str(tiny_model)} | {key: "nobody/nothing"}
    said = refused(
        tmp_path,
        capfd,
        f"data.train={pairs_file}",
        *(f"{name}={value}" for name, value in arguments.items()),
    )
    assert f"{key}=nobody/nothing" in said
    assert "local cache" in said


def test_overrides_of_a_config(tiny_model, pairs_file, tmp_path, capfd):
    said = refused(
        tmp_path,
        capfd,
        f"model.config={tiny_model}",
        "model.config_overrides.hidden_sizes=32",
        f"data.train={pairs_file}",
    )
    assert "hidden_sizes" in said
    assert "hidden_size" in said


@pytest.mark.slow
def test_a_random_model_takes_overrides(tiny_model, pairs_file, tmp_path):
    run = run_train(
        tmp_path / "run",
        f"model.config={tiny_model / 'config.json'}",
        "model.config_overrides={num_hidden_layers: 2, hidden_size: 32}",
        f"data.train={pairs_file}",
        "trainer.max_steps=1",
        "evaluation.samples=0",
    )
    assert run.code == 0
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert model.config.num_hidden_layers == 2
    assert model.config.hidden_size == 32


def test_no_rows_left(tiny_model, tmp_path, capfd):
    path = tmp_path / "long.jsonl"
    row = {"prompt": "a" * 200, "chosen": "b", "rejected": "c"}
    path.write_text(json.dumps(row) + "\n")
    said = refused(tmp_path, capfd, f"model.pretrained={tiny_model}", f"data.train={path}")
    assert "too_long" in said
    assert "data.max_dropped" in said
    said = refused(
        tmp_path,
        capfd,
        f"model.pretrained={tiny_model}",
        f"data.train={path}",
        "data.max_dropped=1",
    )
    assert "no group is left" in said


def test_bad_rows_stop_or_are_set_aside(tiny_model, pairs_file, tmp_path, capfd):
    path = tmp_path / "rows.jsonl"
    path.write_text(pairs_file.read_text() + '{"prompt": "a", "chosen": 3, "rejected": "b"}\n{\n')
    arguments = [f"model.pretrained={tiny_model}", f"data.train={path}", "trainer.max_steps=1"]
    said = refused(tmp_path, capfd, *arguments)
    for words in ("rows.jsonl:61", "chosen", "rows.jsonl:62", "data.on_bad_row=skip"):
        assert words in said
    run = run_train(tmp_path / "skip", *arguments, "data.on_bad_row=skip", "evaluation.samples=0")
    assert run.code == 0
    counts = run.result["data"]
    assert counts["dropped"] == {"bad_row": 2}
    assert counts["train_groups"] + counts["eval_groups"] + 2 == 62
    quarantined = (run.folder / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"].rpartition(":")[2] for line in quarantined] == ["61", "62"]


def test_a_model_without_pad_trains(pairs_file, tmp_path):
    folder = tmp_path / "gpt2"
    config = GPT2Config(
        vocab_size=259,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer(pad=False).save_pretrained(folder)
    run = run_train(
        tmp_path / "run",
        f"model.pretrained={folder}",
        f"data.train={pairs_file}",
        "trainer.max_steps=2",
        "evaluation.samples=2",
        "evaluation.max_new_tokens=4",
    )
    assert run.code == 0
    assert run.values("train/loss")[0] == pytest.approx(0.6931472, abs=1e-5)
    # Dropout was off for the training alone: the exported model is the model that came in.
    exported = AutoModelForCausalLM.from_pretrained(run.folder / "model").config
    assert exported.resid_pdrop == config.resid_pdrop == 0.1


def test_a_chat_template_that_is_not_there(tiny_model, pairs_file, tmp_path, capfd):
    said = refused(
        tmp_path,
        capfd,
        f"model.pretrained={tiny_model}",
        f"data.train={pairs_file}",
        "data.chat_template=nowhere.jinja",
    )
    assert "data.chat_template=nowhere.jinja" in said


def test_a_policy_that_is_not_its_reference_is_noticed(
    tiny_model, pairs_file, tmp_path, capfd, monkeypatch
):
    """A copy that differs stands for other kernels, another dtype or dropout."""
    from dpo_lightning.reference import pair
    from dpo_lightning.reference.kinds import LiveReference

    def damaged(model, scorer):
        with torch.no_grad():
            model.lm_head.weight.add_(0.05 * torch.randn_like(model.lm_head.weight))
        return LiveReference(model, scorer)

    monkeypatch.setattr(pair, "LiveReference", damaged)
    said = refused(
        tmp_path,
        capfd,
        f"model.pretrained={tiny_model}",
        f"data.train={pairs_file}",
        "evaluation.samples=0",
        "reference=live",
    )
    assert "nats per token" in said
    assert "reference.pretrained=" in said
