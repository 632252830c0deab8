"""Sharing: what a card says, what goes to the hub, how an adapter becomes a whole model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.__main__ import main
from dpo_lightning.models.adapters import Adapters, LoraSettings
from dpo_lightning.models.loading import load_config, load_model, load_tokenizer
from dpo_lightning.run.card import CardFacts, model_card
from dpo_lightning.run.export import export_adapter, export_model
from dpo_lightning.run.share.contents import contents_of, in_words

TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123456789"
PEFT = {"kind": "lora", "r": 2, "alpha": 4, "dora": False, "adapter": None, "quantization": "none"}


def facts(pretrained: str | None, **peft: Any) -> CardFacts:
    """A run whose numbers are all different."""
    result = {
        **{"beta": 0.25, "loss": "ipo", "seed": 7, "step": 12, "command": "train beta=0.25"},
        "metrics": {"train/loss": 0.5, "eval/loss": float("nan"), "samples/kl": None},
        "data": {
            **{"train_groups": 1100, "eval_groups": 90, "hash": "c0ffee"},
            "dropped": {"identical_responses": 6, "too_long": 0},
        },
        "model": {"name": "tiny", "parameters": 2000, "trainable": 300},
    }
    settings = {
        "model": {"pretrained": pretrained, "config": None, "revision": None, "dtype": "float32"},
        "data": {"train": ["/home/me/secret/rows.jsonl", "owner/rows"], "batch_size": 16},
        "peft": {**PEFT, **peft},
        "reference": {"kind": "auto", "pretrained": None, "adapter": None},
        "optimizer": {"name": "adamw", "lr": 5e-6, "schedule": "cosine"},
    }
    return CardFacts("my-run", result, settings)


def write_run(folder: Path, about: CardFacts) -> Path:
    (folder / "result.json").write_text(json.dumps({"status": "finished", **about.result}))
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(about.settings)))
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory, tiny_model: Path) -> SimpleNamespace:
    """A run's folder with an adapter of drawn weights, and the policy that it was exported from."""
    run = tmp_path_factory.mktemp("share") / "my-run"
    run.mkdir()
    config = load_config(str(tiny_model), key="model")
    policy = load_model(str(tiny_model), config, key="model", dtype=torch.float32)
    tokenizer = load_tokenizer(str(tiny_model), key="model")
    tokenizer.chat_template = "{{ messages }}"
    settings = LoraSettings(
        r=2, alpha=4, target_modules=None, rslora=False, dora=False, gaussian=True
    )
    adapters = Adapters(policy, settings, reference=None, dropout=0.0, seed=1, load_base=dict)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) / 4
    policy.eval()
    about = facts(str(tiny_model))
    card = model_card(about, adapter=True)
    base = str(tiny_model)
    export_adapter(adapters, tokenizer, run / "model", base=base, revision=None, card=card)
    write_run(run, about)
    ids = torch.tensor([[5, 9, 33, 120, 7, 1]])
    with torch.no_grad():
        logps = policy(input_ids=ids).logits.log_softmax(-1)
    return SimpleNamespace(run=run, ids=ids, logps=logps, base=tiny_model)


@torch.no_grad()
def logps_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model.eval()(input_ids=ids).logits.log_softmax(-1)


def test_a_merged_export_is_the_trained_policy(lora, tmp_path, capsys):
    """By transformers alone, equal to float32's rounding; the base answers otherwise."""
    output = tmp_path / "merged"
    assert main(["export", str(lora.run), "--output", str(output), "--merge", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["merged"]
    assert {file["name"] for file in said["files"]} == {p.name for p in output.iterdir()}
    merged = AutoModelForCausalLM.from_pretrained(output)
    torch.testing.assert_close(logps_of(merged, lora.ids), lora.logps, rtol=1e-5, atol=1e-5)
    base = AutoModelForCausalLM.from_pretrained(lora.base)
    assert (logps_of(base, lora.ids) - lora.logps).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(output).chat_template == "{{ messages }}"
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "transformers"
    assert "PeftModel" not in card.text


def test_an_exported_adapter_is_the_trained_policy_on_its_base(lora, tmp_path):
    output = tmp_path / "deep" / "adapter"
    assert main(["export", str(lora.run), "--output", str(output)]) == 0
    base = AutoModelForCausalLM.from_pretrained(lora.base)
    loaded = PeftModel.from_pretrained(base, str(output))
    assert torch.equal(logps_of(loaded, lora.ids), lora.logps)
    card = ModelCard.load(output / "README.md")
    assert card.data.library_name == "peft"
    # What vLLM reads of an adapter.
    about = json.loads((output / "adapter_config.json").read_text())
    assert (about["peft_type"], about["r"], about["lora_alpha"]) == ("LORA", 2, 4)
    assert {"adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in output.iterdir()}


def test_an_export_alone_is_merged_by_its_own_config(lora, tmp_path):
    """Without the run beside it, the adapter's file says what its base model is."""
    alone = tmp_path / "alone"
    shutil.copytree(lora.run / "model", alone)
    assert main(["export", str(alone), "--output", str(tmp_path / "out"), "--merge"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logps_of(merged, lora.ids), lora.logps, rtol=1e-5, atol=1e-5)


def test_a_whole_model_is_copied(lora, tmp_path, capsys):
    run = tmp_path / "whole"
    run.mkdir()
    config = load_config(str(lora.base), key="model")
    policy = load_model(str(lora.base), config, key="model", dtype=torch.float32)
    tokenizer = load_tokenizer(str(lora.base), key="model")
    about = facts(None, kind="none")
    card = model_card(about, adapter=False)
    export_model(policy, tokenizer, run / "model", config=config, card=card)
    write_run(run, about)
    (run / "model" / "training_args.bin").write_bytes(b"pickle")
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 0
    out = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "training_args.bin" not in out
    assert all(out[name] == (run / "model" / name).read_bytes() for name in {*out} - {"README.md"})
    assert main(["export", str(run), "--output", str(tmp_path / "o"), "--merge"]) == 2
    assert "is a whole model, with no adapter to merge" in capsys.readouterr().err


def test_a_card_says_what_was_trained_on_and_shows_no_folder_of_this_machine():
    card = model_card(facts("/home/me/models/tiny"), adapter=True)
    for row in (
        *("| loss | `ipo` |", "| β | 0.25 |", "| learning rate | 5e-06, cosine |"),
        *("| steps | 12 x 16 prompts |", "| seed | 7 |", "| reference | the initial policy |"),
        *("| trained | LoRA of rank 2, alpha 4 |", "| rows | `rows.jsonl`, `owner/rows` |"),
        *("| hash of the rows' tokens | `c0ffee` |", "| training groups | 1,100 |"),
        *("| held-out groups | 90 |", "| dropped | 6 `identical_responses` |"),
        *("| `train/loss` | 0.5 |", "| `eval/loss` | – |", "| `samples/kl` | – |"),
        "train beta=0.25",
    ):
        assert row in card.text, row
    assert "/home/me" not in str(card)
    assert card.data.base_model is None
    assert model_card(facts("owner/tiny"), adapter=False).data.base_model == "owner/tiny"
    assert "vLLM takes no DoRA" in model_card(facts("o/t", dora=True), adapter=True).text


def test_a_card_counts_the_labels_of_single_responses():
    about = facts(None)
    data = {**about.result["data"], "labels": {"train": {"desirable": 7, "undesirable": 2}}}
    card = model_card(replace(about, result={**about.result, "data": data}), adapter=True)
    assert "| labels of training groups | 7 desirable, 2 undesirable |" in card.text
    assert "labels of" not in model_card(about, adapter=True).text


# The hub ------------------------------------------------------------------------------------------


class Hub:
    """A stand-in for the hub's client: one repository, which may be there and public."""

    def __init__(self, *, there: bool | None = None):
        self.private = there
        self.uploaded: dict[str, Any] = {}

    def __call__(self, **named: Any) -> "Hub":
        assert named == {}, "a token is the library's own business"
        return self

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        self.private = private if self.private is None else self.private
        return f"https://hub/{repo}"

    def repo_info(self, repo: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **named: Any) -> None:
        self.uploaded = named


def push(monkeypatch, hub: Any, *words: Any) -> int:
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return main(["push", *map(str, words)])


def nobody(**named: Any) -> Any:
    raise AssertionError("the hub was asked")


def test_a_dry_run_lists_files_sizes_and_the_card_and_asks_nobody(lora, monkeypatch, capsys):
    assert push(monkeypatch, nobody, lora.run, "--repo", "me/x", "--dry-run", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    sizes = {file["name"]: file["bytes"] for file in found["files"]}
    assert sizes == {p.name: p.stat().st_size for p in (lora.run / "model").iterdir()}
    assert found["bytes"] == sum(sizes.values())
    assert (found["repo"], found["private"], found["url"]) == ("me/x", True, None)
    assert "| β | 0.25 |" in found["card"]
    assert push(monkeypatch, nobody, lora.run, "--repo", "me/x", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "would go to me/x, private" in out
    assert "adapter_model.safetensors" in out


@pytest.mark.parametrize(
    ("there", "flags", "private"),
    [(None, [], True), (None, ["--public"], False), (True, [], True), (False, ["--public"], False)],
)
def test_a_repository_is_private_unless_said(lora, monkeypatch, capsys, there, flags, private):
    hub = Hub(there=there)
    assert push(monkeypatch, hub, lora.run, "--repo", "me/x", *flags) == 0
    assert hub.private is private
    assert hub.uploaded["repo_id"] == "me/x"
    assert Path(hub.uploaded["folder_path"]) == lora.run / "model"
    names = {path.name for path in (lora.run / "model").iterdir()}
    assert {*hub.uploaded["allow_patterns"]} == names
    assert "https://hub/me/x" in capsys.readouterr().out


def test_nothing_goes_where_everybody_sees_it_unsaid(lora, monkeypatch, capsys):
    hub = Hub(there=False)
    assert push(monkeypatch, hub, lora.run, "--repo", "me/x") == 2
    assert hub.uploaded == {}
    assert "that repository is public already" in capsys.readouterr().err


def test_a_refusal_of_the_hub_is_one_line_without_the_token(lora, monkeypatch, capsys):
    def refuse(**named: Any) -> Any:
        raise OSError(f"401\nfor {TOKEN}")

    assert push(monkeypatch, refuse, lora.run, "--repo", "me/x") == 2
    [said] = capsys.readouterr().err.splitlines()
    assert said.startswith("error: --repo me/x: the hub did not take it (401 for [hidden])")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--repo", "x"], "--repo x: a repository is named owner/name"),
        (["--repo", "me/x", "--token", TOKEN], "--token: a token is never typed"),
        (["--repo", TOKEN], "credentials are no settings"),
        ([], "--repo: no repository is named; add --repo <owner>/<name>"),
        (["--repo", "me/x", "--sure"], "--sure: `"),
        (["--repo", "me/x", "beta=1"], "it has no settings"),
        (["--repo", "me/x", "other"], "name one run, `"),
    ],
)
def test_wrong_words_are_one_line(lora, monkeypatch, capsys, words, said):
    assert push(monkeypatch, nobody, lora.run, *words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert TOKEN not in line


def test_what_is_code_or_a_link_does_not_go_and_a_secret_stops_all(lora, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(lora.run / "model", folder)
    (folder / "optimizer.pt").write_bytes(b"pickle")
    (folder / "code.py").write_text("import os")
    (folder / "vocab.txt").symlink_to(lora.run / "config.yaml")
    assert contents_of(folder).left_out == ["code.py", "optimizer.pt", "vocab.txt"]
    (folder / "README.md").write_text(f"token: {TOKEN}")
    assert main(["push", str(folder), "--repo", "me/x", "--dry-run"]) == 2
    captured = capsys.readouterr()
    assert "it holds what looks like a credential" in captured.err
    assert TOKEN not in captured.out + captured.err


def test_a_folder_that_is_there_stays_as_it_is(lora, tmp_path, capsys):
    (tmp_path / "mine").write_text("x")
    before = sorted(lora.run.rglob("*"))
    assert main(["export", str(lora.run), "--output", str(tmp_path)]) == 2
    assert "it is there already; name another folder" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--output", str(tmp_path / "o")]) == 2
    assert sorted(lora.run.rglob("*")) == before
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_adapter_on_random_weights_cannot_be_merged(lora, tmp_path, capsys):
    alone = tmp_path / "alone"
    shutil.copytree(lora.run / "model", alone)
    path = alone / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    assert main(["export", str(alone), "--output", str(tmp_path / "o"), "--merge"]) == 2
    assert "was made of random weights, which no file holds" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_sizes_in_words():
    assert [in_words(n) for n in (0, 1023, 1024, 1536, 5 << 20, 7 << 40)] == [
        *("0 bytes", "1023 bytes", "1.0 KiB", "1.5 KiB", "5.0 MiB", "7168.0 GiB")
    ]
