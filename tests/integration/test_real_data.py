"""Real preferences and a real tiny model, where they lie beside the checkout."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from tests.support.runs import Run, run_train

pytestmark = pytest.mark.slow

LEARNING = ("optimizer.lr=5e-4", "trainer.max_steps=25", "data.batch_size=16")
QUIET = ("evaluation.samples=0",)


def politeness(shared, folder, *overrides: str) -> Run:
    return run_train(
        folder,
        f"model.pretrained={shared / 'models' / 'stories260k'}",
        f"data.train={shared / 'data' / 'politeness.jsonl'}",
        *LEARNING,
        *QUIET,
        *overrides,
    )


@pytest.fixture(scope="module")
def polite(shared, tmp_path_factory) -> Run:
    return politeness(shared, tmp_path_factory.mktemp("polite") / "run", "beta=0.1")


def held_out(shared):
    """Makes the split again: token groups of the two sides."""
    from dpo_lightning.data.records import read_rows
    from dpo_lightning.data.splits import prepare_rows

    rows = read_rows(
        str(shared / "data" / "politeness.jsonl"),
        format="auto",
        columns={},
        split=None,
        subset=None,
        revision=None,
    )
    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260k")
    return prepare_rows(
        rows,
        None,
        tokenizer,
        max_length=512,
        truncation="drop",
        eval_fraction=0.1,
        split_seed=0,
        max_dropped=0.05,
    )


def plain_logps(model, prompt: np.ndarray, response: np.ndarray) -> float:
    row = torch.tensor(np.concatenate([prompt, response])[None].astype(np.int64))
    with torch.no_grad():
        logps = model(input_ids=row).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, row[0, len(prompt) :, None]).sum().item()


def test_politeness_is_learnt(polite: Run, shared):
    result = polite.result
    assert (polite.code, result["status"]) == (0, "finished")
    assert polite.values("train/loss")[0] == pytest.approx(np.log(2), abs=1e-5)
    assert result["metrics"]["eval/rewards/accuracies"] >= 0.80
    data = held_out(shared)
    assert not {g.prompt_key for g in data.train} & {g.prompt_key for g in data.eval}
    counts = result["data"]
    assert counts["train_groups"] + counts["eval_groups"] + sum(counts["dropped"].values()) == 1100
    assert counts["dropped"] == {"identical_responses": 6}


def test_the_export_has_the_logps_that_were_reported(polite: Run, shared):
    model = AutoModelForCausalLM.from_pretrained(polite.folder / "model").eval()
    groups = held_out(shared).eval
    for name, which in (("chosen", 0), ("rejected", 1)):
        logps = [plain_logps(model, g.prompt, g.responses[which]) for g in groups]
        reported = polite.result["metrics"][f"eval/logps/{name}"]
        assert np.mean(logps) == pytest.approx(reported, rel=1e-5)


def test_an_adapter_learns_politeness_and_is_the_policy_in_peft(shared, tmp_path):
    from peft import PeftModel

    run = politeness(shared, tmp_path / "run", "peft=lora", "optimizer.lr=2e-3")
    assert run.code == 0
    assert run.values("train/loss")[0] == pytest.approx(np.log(2), abs=1e-5)
    assert run.result["metrics"]["eval/rewards/accuracies"] >= 0.75
    base = AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260k")
    model = PeftModel.from_pretrained(base, run.folder / "model").eval()
    groups = held_out(shared).eval
    for name, which in (("chosen", 0), ("rejected", 1)):
        logps = [plain_logps(model, g.prompt, g.responses[which]) for g in groups]
        reported = run.result["metrics"][f"eval/logps/{name}"]
        assert np.mean(logps) == pytest.approx(reported, rel=1e-5)


@pytest.mark.long
def test_swapped_labels_teach_the_opposite(shared, tmp_path):
    rows = [json.loads(line) for line in (shared / "data" / "politeness.jsonl").open()]
    swapped, original = tmp_path / "swapped.jsonl", tmp_path / "original.jsonl"
    train, evaluation = rows[:900], rows[900:]
    fields = ("prompt", "chosen", "rejected")
    with swapped.open("w") as file:
        for row in train:
            texts = dict(zip(fields, (row["prompt"], row["rejected"], row["chosen"]), strict=True))
            file.write(json.dumps(texts) + "\n")
    original.write_text("".join(json.dumps(row) + "\n" for row in evaluation))
    run = politeness(
        shared, tmp_path / "run", f"data.train={swapped}", f"data.eval={original}", "beta=0.1"
    )
    assert run.code == 0
    assert run.result["metrics"]["eval/rewards/accuracies"] < 0.3


@pytest.mark.long
def test_a_small_beta_moves_farther(shared, tmp_path):
    distances = []
    for beta in (0.05, 1):
        run = politeness(shared, tmp_path / str(beta), f"beta={beta}")
        metrics = run.result["metrics"]
        distances.append(abs(metrics["eval/logratios/chosen"] - metrics["eval/logratios/rejected"]))
    assert distances[0] > 1.2 * distances[1]


@pytest.mark.parametrize(
    ("file", "rows", "overrides"),
    [
        ("hh_harmless_raw.jsonl", 400, ["data.max_length=256"]),
        ("sharegpt_dpo.json", 300, ["data.format=sharegpt"]),
        ("openassistant_ranked.jsonl", 212, ["data.max_length=256"]),
    ],
)
def test_every_row_of_real_files_is_accounted_for(shared, tmp_path, file, rows, overrides):
    run = run_train(
        tmp_path / "run",
        f"model.pretrained={shared / 'models' / 'stories260k'}",
        f"data.train={shared / 'data' / file}",
        "data.truncation=response",
        "data.max_dropped=0.6",
        "trainer.max_steps=2",
        "data.batch_size=8",
        "data.eval_fraction=0.05",
        "evaluation.samples=0",
        *QUIET,
        *overrides,
    )
    result = run.result
    assert (run.code, result["status"]) == (0, "finished")
    counts = result["data"]
    kept = counts["train_groups"] + counts["eval_groups"]
    assert kept + sum(counts["dropped"].values()) == rows
    assert run.values("train/loss")[0] == pytest.approx(np.log(2), abs=1e-5)
    if file.startswith("openassistant"):
        assert counts["train_pairs"] > counts["train_groups"]


def test_a_random_llama_with_a_real_chat_template(shared, tmp_path):
    config = tmp_path / "config.json"
    values = LlamaConfig(
        vocab_size=6400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    ).to_dict()
    config.write_text(json.dumps(values))
    tokenizer = shared / "models" / "minimind-tokenizer"
    run = run_train(
        tmp_path / "run",
        f"model.config={config}",
        f"model.tokenizer={tokenizer}",
        f"data.train={shared / 'data' / 'openassistant_ranked.jsonl'}",
        "data.truncation=response",
        "data.max_dropped=0.6",
        "trainer.max_steps=2",
        "data.batch_size=8",
        *QUIET,
    )
    result = run.result
    assert (run.code, result["status"]) == (0, "finished")
    counts = result["data"]
    kept = counts["train_groups"] + counts["eval_groups"]
    assert kept + sum(counts["dropped"].values()) == 212
    exported = AutoTokenizer.from_pretrained(run.folder / "model")
    assert exported.chat_template == AutoTokenizer.from_pretrained(tokenizer).chat_template
