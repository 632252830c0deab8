"""Reference rows that a run computes or finds in the cache: `result.json.reference`."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_lightning.data.held_out import choose_evaluated
from dpo_lightning.data.tokens import TokenGroup
from dpo_lightning.reference.cache import response_key
from dpo_lightning.run import placement
from tests.support.runs import TINY, Run, run_train


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Rows of messages, so that the chat template matters, some too long for 60 tokens."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [
        json.dumps(
            {
                "prompt": [{"role": "user", "content": f"Add {i}."}],
                "chosen": [{"role": "assistant", "content": f"{i + 1} " * (1 + i % 9)}],
                "rejected": [{"role": "assistant", "content": "no" + "!" * (i % 5)}],
            }
        )
        for i in range(24)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """200 rows with prompts of their own, some 40 tokens each."""
    path = tmp_path_factory.mktemp("many") / "many.jsonl"
    lines = [
        json.dumps({"prompt": f"Add {i} to", "chosen": f" {i + 1}", "rejected": f" no {i % 7}"})
        for i in range(200)
    ]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


BASE = (
    *("data.truncation=response", "data.max_length=100", "data.batch_size=8"),
    *("evaluation.samples=0", "data.eval_fraction=0.2", "trainer.accelerator=cpu"),
)


@pytest.fixture
def train(tmp_path, tiny_model, rows):
    """Runs on the rows with a cache of the test's own."""
    runs = iter(range(100))

    def run(*overrides: str) -> Run:
        own = [f"reference.cache_dir={tmp_path / 'cache'}", f"model.pretrained={tiny_model}"]
        named = {line.partition("=")[0] for line in overrides}
        base = [
            line
            for line in (*own, f"data.train={rows}", *BASE)
            if line.partition("=")[0] not in named
        ]
        done = run_train(tmp_path / f"run-{next(runs)}", *base, *overrides)
        assert done.code == 0
        return done

    return run


def counts(run: Run) -> tuple[int, int]:
    reference = run.result["reference"]
    assert reference["rows"] == reference["computed"] + reference["cached"]
    return reference["rows"], reference["computed"]


@pytest.mark.long
@pytest.mark.slow
def test_another_beta_rate_seed_batch_folder_or_loss_computes_nothing(train, rows, tmp_path):
    first = train()
    assert counts(first) == (24, 24)
    moved = tmp_path / "moved.jsonl"
    lines = rows.read_text().splitlines()
    moved.write_text("".join(f"{line}\n" for line in lines[::-1]))
    for overrides in (
        [],
        ["beta=0.7"],
        ["optimizer.lr=1e-3"],
        ["seed=5"],
        ["data.batch_size=4"],
        ["data.micro_batch_tokens=3000"],
        ["loss.label_smoothing=0.2"],
        [f"data.train={moved}"],
        ["trainer.max_epochs=2"],
    ):
        assert counts(train(*overrides)) == (24, 0), overrides
    # Blocks are of training rows or of held-out ones, and those of another split are others.
    assert counts(train("data.split_seed=3"))[1] > 0
    assert counts(train("reference=none")) == (0, 0)
    assert counts(train("loss=sft")) == (0, 0)


# Rows that a run needs ----------------------------------------------------------------------------


def keys_of(groups: list[TokenGroup]) -> set[bytes]:
    """Keys of the responses of groups."""
    return {response_key(group.prompt, own) for group in groups for own in group.responses}


def blocks_in(cache: Path) -> list[set[bytes]]:
    """Keys of the responses of each stored block."""
    files = cache.glob("reference/*/*.safetensors")
    return [{key.tobytes() for key in load_file(path)["keys"]} for path in files]


def test_a_short_run_computes_only_the_blocks_of_the_rows_that_it_sees(
    train, many, tmp_path, monkeypatch
):
    """200 rows, of which 40 are held out: two steps of 4 rows, and 10 rows that are evaluated.

    A block has at most 128 tokens, which is one row to three; each holds a row that is needed.
    """
    monkeypatch.setattr("dpo_lightning.reference.blocks._LEAST_BLOCK_TOKENS", 128)
    parts: list[list[list[TokenGroup]]] = []
    real = placement.with_reference_logps

    def noted(own, *args, **more):
        parts.append(own)
        return real(own, *args, **more)

    monkeypatch.setattr(placement, "with_reference_logps", noted)
    few = (
        *(f"data.train={many}", "data.micro_batch_tokens=128", "data.batch_size=4"),
        *("evaluation.max_prompts=10", "trainer.max_steps=2"),
    )
    run = train(*few)
    [[training, held_out]] = parts
    assert (len(training), len(held_out)) == (160, 40)
    sample = choose_evaluated(held_out, 10)
    assert sample is not None
    order = np.random.default_rng([1, 0]).permutation(160)  # seed 1, the first pass
    wanted = keys_of([*(training[i] for i in order[:8]), *(held_out[i] for i in sample)])
    stored = blocks_in(tmp_path / "cache")
    assert all(block & wanted for block in stored)
    assert wanted <= {key for block in stored for key in block}
    assert sum(map(len, stored)) <= 2 * 3 * 18
    assert run.result["reference"] == {"rows": 18, "computed": 18, "cached": 0}

    # The sample is said, and the metrics are exact over it.
    assert run.result["data"]["eval_groups"] == 40
    assert run.result["data"]["evaluated_groups"] == 10
    right = json.loads((run.folder / "evaluation.json").read_text())["accuracies"]
    assert len(right) == 10
    assert run.result["metrics"]["eval/rewards/accuracies"] == pytest.approx(np.mean(right))

    # A run that goes on with more steps computes what these need, and what is there stays.
    onwards = train(*few[:-1], f"resume={run.folder}", "trainer.max_steps=4")
    more = keys_of([training[i] for i in order[8:16]])
    assert onwards.result["step"] == 4
    assert onwards.result["reference"]["rows"] == 26
    assert 4 <= onwards.result["reference"]["computed"] <= 8
    again = blocks_in(tmp_path / "cache")
    assert all(block in again for block in stored)
    assert all(block & (wanted | more) for block in again)
    assert wanted | more <= {key for block in again for key in block}


@pytest.mark.slow  # reason: two runs of a thing that a unit of a few lines decides
def test_a_run_that_was_evaluated_on_another_sample_is_evaluated_anew(train, many):
    few = (f"data.train={many}", "data.batch_size=4", "trainer.max_steps=2")
    few = (*few, "evaluation.every_n_steps=2")
    first = train(*few, "evaluation.max_prompts=10")
    again = train(*few, f"resume={first.folder}", "evaluation.max_prompts=20")
    for run, count in ((first, 10), (again, 20)):
        right = json.loads((run.folder / "evaluation.json").read_text())["accuracies"]
        assert len(right) == count
        assert run.result["metrics"]["eval/rewards/accuracies"] == pytest.approx(np.mean(right))


@pytest.mark.slow
def test_one_more_row_computes_its_block(train, rows, tmp_path, monkeypatch):
    """The rows have about 50 tokens each, a block here at most 512."""
    monkeypatch.setattr("dpo_lightning.reference.blocks._LEAST_BLOCK_TOKENS", 512)
    budget = "data.micro_batch_tokens=128"
    train(budget)
    more = tmp_path / "more.jsonl"
    added = {"prompt": "Say", "chosen": " yes", "rejected": " never"}
    more.write_text(rows.read_text() + json.dumps(added) + "\n")
    # A string prompt needs no template; mixed files have both.
    found, computed = counts(train(budget, f"data.train={more}"))
    assert found == 25
    assert 1 <= computed < 20


@pytest.mark.long
@pytest.mark.slow
def test_a_changed_weight_template_type_or_length_computes_anew(
    train, tiny_model, tmp_path, monkeypatch
):
    train()
    with monkeypatch.context() as patch:
        patch.setattr("dpo_lightning.models.scoring.Scorer.kernel", property(lambda self: "new"))
        assert counts(train()) == (24, 24)
    changed = tmp_path / "changed"
    shutil.copytree(tiny_model, changed)
    model = AutoModelForCausalLM.from_pretrained(changed)
    with torch.no_grad():
        model.lm_head.weight[5, 3] += 1e-3
    model.save_pretrained(changed)
    assert counts(train(f"model.pretrained={changed}")) == (24, 24)
    # The other model as a reference of the first one: the same numbers.
    assert counts(train(f"reference.pretrained={changed}")) == (24, 0)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert counts(train(f"data.chat_template='{template}'")) == (24, 24)
    assert counts(train("model.dtype=bfloat16"))[1] == 24
    assert counts(train("trainer.precision=bf16-mixed"))[1] == 24
    # Twelve of the rows have a response that 30 tokens cut shorter than 100 do, or more of them;
    # all are few enough for one block.
    assert counts(train("data.max_length=30")) == (24, 24)
    assert counts(train("data.max_length=30", "beta=2")) == (24, 0)


def test_cached_and_live_references_are_the_same_run(train):
    """Both equal a plain loop: the first loss is ln 2 and the curves agree to rounding."""
    live = train("reference=live", "trainer.max_epochs=2")
    cached = train("reference=cached", "trainer.max_epochs=2")
    again = train("reference=auto", "trainer.max_epochs=2")
    for name in ("train/loss", "eval/loss", "train/logratios/margins", "eval/logps/chosen"):
        assert cached.values(name) == pytest.approx(live.values(name), rel=1e-4, abs=1e-6), name
        assert again.values(name) == cached.values(name), name
    assert cached.values("train/loss")[0] == pytest.approx(np.log(2), abs=1e-5)
    assert counts(live)[1] == counts(live)[0] > 24
    assert counts(cached) == (24, 24)
    assert counts(again) == (24, 0)


def test_the_cached_numbers_are_the_models(train, tiny_model, tmp_path):
    """Every stored value is a sum over the response's tokens of a plain forward pass."""
    source = tmp_path / "plain.jsonl"
    source.write_text('{"prompt": "A b", "chosen": " c d", "rejected": " e!"}\n' * 2)
    train(f"data.train={source}", "data.eval_fraction=0", "data.max_dropped=1")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer("A b")["input_ids"]
    [path] = (tmp_path / "cache").glob("reference/*/*.safetensors")
    part = load_file(path)
    stored = {k.tobytes(): v for k, v in zip(part["keys"], part["logps"], strict=True)}
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for text in (" c d", " e!"):
        response = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0].log_softmax(-1)
        start = len(prompt) - 1
        plain = sum(logps[start + i, t].item() for i, t in enumerate(response))
        assert stored[response_key(prompt, response)] == pytest.approx(plain, rel=1e-5)


def test_a_cache_that_is_no_folder_costs_a_warning(train, tmp_path, caplog):
    (tmp_path / "file").touch()
    run = train(f"reference.cache_dir={tmp_path / 'file'}")
    assert counts(run) == (24, 24)
    log = (run.folder / "train.log").read_text()
    assert "cannot be used" in log
    assert "reference.cache_dir=" in log


@pytest.mark.slow
def test_the_embedded_task_is_cached_too(tmp_path):
    cache = f"reference.cache_dir={tmp_path / 'cache'}"
    first = run_train(tmp_path / "a", *TINY, cache)
    second = run_train(tmp_path / "b", *TINY, cache, "beta=3")
    assert counts(first)[1] == 136
    assert counts(second) == (136, 0)
