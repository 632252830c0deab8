"""An adapter at another beta: its scaled update, and the measured cost of it."""

import json

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_lightning.__main__ import main
from dpo_lightning.evaluation.interpolated import Pair
from dpo_lightning.evaluation.path_cost import path_divergences, scaled_update
from dpo_lightning.models.adapters import Adapters, LoraSettings
from dpo_lightning.models.loading import load_config, load_model
from dpo_lightning.models.probe import choose_path
from tests.support.runs import Run, run_train


@pytest.fixture(scope="module")
def lora(tmp_path_factory, tiny_model, pairs_file) -> Run:
    """A short run with a learning rate that moves its adapter."""
    run = run_train(
        tmp_path_factory.mktemp("at_beta") / "run", f"model.pretrained={tiny_model}",
        f"data.train={pairs_file}", "peft=lora", "peft.r=2", "optimizer.lr=0.05", "beta=0.2",
        "trainer.max_steps=4", "data.batch_size=8", "trainer.threads=1", "logger=none",
        "evaluation.samples=0", "evaluation.partition_samples=0", "trainer.accelerator=cpu",
    )  # fmt: skip
    assert run.code == 0
    return run


def export(run: Run, output, *words: str) -> int:
    return main(["export", str(run.folder), "--output", str(output), *words])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=torch.tensor([[5, 9, 33, 120, 7, 1]])).logits


# Trains a model, and loads it several times.
@pytest.mark.slow
def test_an_export_at_another_beta_is_the_scaled_adapter(lora, tmp_path, tiny_model, capsys):
    """Trained at 0.2, asked for 0.1: twice the update. B of LoRA is doubled, A is as it was."""
    assert export(lora, tmp_path / "half", "at_beta=0.1", "--json") == 0
    cost = json.loads(capsys.readouterr().out)["at_beta"]
    assert (cost["trained_beta"], cost["beta"], cost["lambda"]) == (0.2, 0.1, 2.0)
    assert json.loads((tmp_path / "half" / "at_beta.json").read_text()) == cost
    assert 0 < cost["kl_path_scaled"] < cost["kl_path_reference"]
    text = (tmp_path / "half" / "README.md").read_text()
    assert "counts 2 times, which stands for β = 0.1" in text
    own = load_file(lora.folder / "model" / "adapter_model.safetensors")
    found = load_file(tmp_path / "half" / "adapter_model.safetensors")
    times = {name: 2 if "lora_B" in name else 1 for name in own}
    assert {*times.values()} == {1, 2}
    assert all(torch.equal(found[name], own[name] * times[name]) for name in own)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    scaled = PeftModel.from_pretrained(base, str(tmp_path / "half"))
    assert export(lora, tmp_path / "merged", "--at-beta", "0.1", "--merge") == 0
    assert "KL is" in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(scaled), rtol=1e-5, atol=1e-5)
    # At its own beta it is what it was, and costs nothing.
    assert export(lora, tmp_path / "same", "--at-beta=0.2", "--json") == 0
    cost = json.loads(capsys.readouterr().out)["at_beta"]
    assert cost["kl_path_scaled"] == pytest.approx(0, abs=1e-6)
    same = load_file(tmp_path / "same" / "adapter_model.safetensors")
    assert all(torch.equal(same[name], own[name]) for name in own)


def test_the_cost_is_that_of_a_plain_loop(tiny_model):
    """KL of next tokens summed over an answer, from log-softmaxes of three forward passes."""
    config = load_config(str(tiny_model), key="model")
    policy = load_model(str(tiny_model), config, key="model", dtype=torch.float32)
    plain = load_model(str(tiny_model), config, key="model", dtype=torch.float32).eval()
    scorer = choose_path(plain, max_length=16)[0]
    settings = LoraSettings(
        r=2, alpha=4, target_modules=None, rslora=False, dora=False, gaussian=True
    )
    Adapters(policy, settings, reference=None, dropout=0.0, seed=1, load_base=dict)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) / 8
    scorer.prepare(policy.eval())
    prompts = [np.array([5, 9], dtype=np.int32), np.array([7], dtype=np.int32)]
    answers = [np.array([33, 120, 2], dtype=np.int32), np.array([44], dtype=np.int32)]
    lam = 1.7
    found = path_divergences(Pair(policy, plain, scorer), prompts, answers, lam=lam, pad=0)

    def logps(model, ids):
        with torch.no_grad():
            return model(input_ids=ids).logits.log_softmax(-1).double()[0]

    for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
        with scorer.plain(policy), scorer.plain(plain):
            p, q = logps(policy, ids), logps(plain, ids)
            with scaled_update(policy, lam):
                s = logps(policy, ids)
            again = logps(policy, ids)
        assert torch.equal(again, p)
        place = (q + lam * (p - q)).log_softmax(-1)
        first = len(prompt) - 1
        for row, other in ((found.scaled, s), (found.reference, q)):
            kl = (place.exp() * (place - other)).sum(-1)[first:-1].sum()
            assert row[n] == pytest.approx(float(kl), rel=1e-4, abs=1e-6)
    assert found.scaled.min() > 0


# It trains a model.
@pytest.mark.slow
def test_what_cannot_be_scaled_is_one_line(lora, tmp_path, capsys):
    for words, said in (
        (("--at-beta=0",), "must be a finite number above 0"),
        (("--at-beta=nan",), "must be a finite number above 0"),
        (("--at-beta=1e-9",), "give at least"),
    ):
        assert export(lora, tmp_path / "out", *words) == 2
        assert said in capsys.readouterr().err
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in (lora.folder / "model").iterdir():
        (alone / path.name).write_bytes(path.read_bytes())
    assert main(["export", str(alone), "--output", str(tmp_path / "out"), "--at-beta=0.1"]) == 2
    assert "name its run" in capsys.readouterr().err
    config = lora.folder / "model" / "adapter_config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"use_dora": True}))
    assert export(lora, tmp_path / "out", "--at-beta=0.1") == 2
    assert "use_dora=True" in capsys.readouterr().err
    config.write_text(before)
    assert not (tmp_path / "out").exists()
