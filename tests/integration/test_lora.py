"""LoRA runs from the command line: reference, resume, export, wrong adapters."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.ranks import launch
from tests.support.runs import TINY, Run, run_train

LORA = ("peft=lora", "peft.r=4", "optimizer.lr=5e-3", "trainer.accelerator=cpu")
ROWS = ("data.batch_size=8", "evaluation.samples=0", "evaluation.partition_samples=0", *LORA)
LN2 = math.log(2)
CURVES = ("train/loss", "train/grad_norm", "train/logps/chosen", "eval/loss", "eval/logps/rejected")


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "adapter_model.safetensors")


def same(one: Run, other: Run) -> bool:
    a, b = adapter(one), adapter(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def refusal(run: Run) -> str:
    assert run.code == 2
    text = run.result["error"]
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    """A run on the embedded task: six steps, three of them saved."""
    run = run_train(
        tmp_path_factory.mktemp("lora") / "run",
        *TINY,
        *LORA,
        *("peft.merge=true", "evaluation.samples=32"),
        *("checkpoint.every_n_steps=2", "checkpoint.keep=9"),
    )
    assert run.code == 0
    return run


def train_from(train, started, more) -> Run:
    """A run from a stored adapter, which has a rank of its own."""
    return train("peft.r=16", *started, *more)


@pytest.fixture
def train(tmp_path, tiny_model, pairs_file):
    """Function that runs on rows of the test's own, with a cache of its own."""
    runs = iter(range(100))

    def run(*overrides: str) -> Run:
        return run_train(
            tmp_path / f"run-{next(runs)}",
            *(f"model.pretrained={tiny_model}", f"data.train={pairs_file}"),
            *(f"reference.cache_dir={tmp_path / 'cache'}", *ROWS, *overrides),
        )

    return run


def test_the_start_is_ln_2_and_only_the_adapter_is_trained(whole: Run):
    """Two layers of width 32 (2 key heads of 4, 64 inside) at rank 4, a matrix on either side.

    q and o: 4 (32 + 32) each, k and v: 4 (32 + key width) each, the others: 4 (32 + inside) each.
    """
    base = AutoModelForCausalLM.from_pretrained(base_of(whole))
    c = base.config
    width, inside = c.hidden_size, c.intermediate_size
    keys = width * c.num_key_value_heads // c.num_attention_heads
    layer = 4 * (2 * (width + width) + 2 * (width + keys) + 3 * (width + inside))
    model = whole.result["model"]
    assert model["trainable"] == c.num_hidden_layers * layer
    assert model["parameters"] == base.num_parameters() + model["trainable"]
    assert whole.values("train/loss")[0] == pytest.approx(LN2, abs=1e-6)
    metrics = whole.result["metrics"]
    assert metrics["controlled/kl_policy_reference"] > 1e-3
    assert metrics["samples/kl"] == pytest.approx(
        metrics["controlled/kl_policy_reference"], abs=5 * metrics["samples/kl_stderr"] + 1e-3
    )
    assert abs(metrics["partition/self_check"]) < 5 * metrics["partition/self_check_stderr"] + 0.05


def base_of(run: Run) -> str:
    return json.loads((run.folder / "model" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]


def test_the_exports_are_the_policy(whole: Run):
    """Either run's exact expected reward is that of its result, and PEFT merges to the same."""
    from dpo_lightning.data.controlled import ControlledTask

    base = AutoModelForCausalLM.from_pretrained(base_of(whole)).eval()
    loaded = PeftModel.from_pretrained(base, str(whole.folder / "model")).eval()
    merged = AutoModelForCausalLM.from_pretrained(whole.folder / "model-merged").eval()
    task = ControlledTask()
    own, other = (task.outcome_logps(model) for model in (loaded, merged))
    reward = (own.exp() * task.rewards).sum(1).mean().item()
    expected = whole.result["metrics"]["controlled/expected_reward"]
    assert reward == pytest.approx(expected, rel=1e-9)
    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    card = (whole.folder / "model" / "README.md").read_text()
    assert "library_name: peft" in card
    # The hub takes no folder there, and its path is nobody's business.
    assert base_of(whole) not in card
    assert "base_model" not in card
    AutoTokenizer.from_pretrained(whole.folder / "model")
    assert not [path for path in (whole.folder / "model").iterdir() if path.suffix == ".bin"]
    assert not (whole.folder / "model" / "reference").exists()


def test_a_checkpoint_holds_the_adapter_alone(whole: Run):
    path = whole.folder / "checkpoints" / "step-000004.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    assert all(".lora_" in name and ".default." in name for name in state)
    assert sum(value.numel() for value in state.values()) == whole.result["model"]["trainable"]


@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_like_an_undisturbed_one(whole: Run, tmp_path, step: int):
    checkpoint = whole.folder / "checkpoints" / f"step-{step:06d}.ckpt"
    resumed = run_train(tmp_path / "run", *TINY, *LORA, f"resume={checkpoint}")
    assert resumed.code == 0
    assert resumed.rows[0]["step"] == step + 1
    assert same(resumed, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "message"),
    [("peft.r=8", "peft.r=4, this run has peft.r=8"), ("peft=none", "resume with the same"),
     ("peft.alpha=7", "peft.alpha=32, this run has peft.alpha=7")],
)  # fmt: skip
def test_another_adapter_does_not_resume(whole: Run, tmp_path, changed: str, message: str):
    base = ["optimizer.lr=5e-3"] if changed == "peft=none" else LORA
    run = run_train(tmp_path / "run", *TINY, *base, changed, f"resume={whole.folder}")
    assert message in refusal(run)


@pytest.mark.slow
def test_a_live_and_a_cached_reference_are_the_same_run(train, tiny_model):
    cached = train()
    live = train("reference=live")
    count = cached.result["reference"]
    assert (count["computed"], count["cached"]) == (count["rows"], 0)
    for name in CURVES:
        assert cached.values(name) == pytest.approx(live.values(name), rel=1e-4, abs=1e-6), name
    assert cached.values("train/loss")[0] == pytest.approx(LN2, abs=1e-6)
    assert live.values("train/loss")[0] == pytest.approx(LN2, abs=1e-7)
    # The base model's weights were not written to, and know no adapter.
    assert not list(tiny_model.glob("adapter*"))


@pytest.mark.long
def test_the_cache_is_that_of_the_base_weights(tmp_path, tiny_model, pairs_file):
    common = (
        *(f"model.pretrained={tiny_model}", f"data.train={pairs_file}", "data.batch_size=8"),
        *("evaluation.samples=0", "trainer.max_steps=1", "trainer.accelerator=cpu"),
        f"reference.cache_dir={tmp_path / 'cache'}",
    )
    for number, (precision, dtype) in enumerate(
        [("32-true", "float32"), ("bf16-mixed", "float32"), ("bf16-mixed", "bfloat16")]
    ):
        own = (f"trainer.precision={precision}", f"model.dtype={dtype}")
        full = run_train(tmp_path / f"full-{number}", *common, *own)
        lora = run_train(tmp_path / f"lora-{number}", *common, *own, "peft=lora")
        assert full.result["reference"]["cached"] == 0
        assert lora.result["reference"]["computed"] == 0
        assert full.values("train/loss") == lora.values("train/loss")


@pytest.mark.long
def test_an_adapter_of_supervised_training_is_start_and_reference(train, tmp_path):
    """ln 2 against what the policy starts as; against the base only when that is asked for."""
    sft = train("loss=sft")
    assert sft.code == 0
    folder = sft.folder / "model"
    started = (f"peft.adapter={folder}", "trainer.max_steps=3")
    runs = {
        name: train_from(train, started, more)
        for name, more in {
            "cached": (),
            "live": ("reference=live",),
            "dropout": ("peft.dropout=0.2", "reference=live"),
            "base": ("reference.adapter=base",),
            "other": (f"reference.adapter={folder}",),
        }.items()
    }
    for name in ("cached", "live", "other"):
        assert runs[name].values("train/loss")[0] == pytest.approx(LN2, abs=1e-6), name
    assert abs(runs["base"].values("train/loss")[0] - LN2) > 1e-4
    assert runs["dropout"].code == 0
    for name in CURVES:
        assert runs["cached"].values(name) == pytest.approx(
            runs["live"].values(name), rel=1e-4, abs=1e-6
        ), name
        assert runs["other"].values(name) == runs["cached"].values(name), name
    # Base rows and adapter rows are kept apart, and each is computed once.
    computed = {name: run.result["reference"]["computed"] for name, run in runs.items()}
    rows = runs["cached"].result["reference"]["rows"]
    assert (computed["cached"], computed["other"], computed["base"]) == (rows, 0, rows)
    # Nothing of the frozen copy is trained, counted or exported.
    assert runs["cached"].result["model"] == sft.result["model"]
    assert adapter(runs["cached"]).keys() == adapter(sft).keys()
    resumed = train_from(train, started, (f"resume={runs['cached'].folder}", "trainer.max_steps=4"))
    assert resumed.code == 0
    changed = tmp_path / "changed"
    shutil.copytree(folder, changed)
    config = json.loads((changed / "adapter_config.json").read_text())
    (changed / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 5}))
    other = train_from(train, (f"peft.adapter={changed}",), (f"resume={runs['cached'].folder}",))
    assert "the checkpoint was made with model=" in refusal(other)


@pytest.mark.slow
def test_bfloat16_trains_float32_matrices_and_merges_into_float32_weights(train, tiny_model):
    run = train("trainer.precision=bf16-mixed", "peft.merge=true", "checkpoint.every_n_steps=3",
                "checkpoint.keep=9")  # fmt: skip
    assert run.code == 0
    assert run.values("train/loss")[0] == pytest.approx(LN2, abs=1e-3)
    values = adapter(run)
    assert {value.dtype for value in values.values()} == {torch.float32}
    assert not any(torch.equal(value, value.bfloat16().float()) for value in values.values())
    base = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    merged = AutoModelForCausalLM.from_pretrained(run.folder / "model-merged").eval()
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight)
    loaded = PeftModel.from_pretrained(base, str(run.folder / "model")).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, merged(input_ids=ids).logits, rtol=1e-5, atol=1e-5
    )
    again = train("trainer.precision=bf16-mixed",
                  f"resume={run.folder / 'checkpoints' / 'step-000003.ckpt'}")  # fmt: skip
    assert again.code == 0
    assert same(again, run)


@pytest.mark.slow
def test_in_bfloat16_what_is_exact_is_of_the_base_in_its_own_type(tmp_path):
    """The base computes in bfloat16; the export stands on the float32 weights it came from."""
    from dpo_lightning.data.controlled import ControlledTask

    run = run_train(tmp_path / "run", *TINY, *LORA, "trainer.precision=bf16-mixed")
    assert run.code == 0
    base = AutoModelForCausalLM.from_pretrained(base_of(run)).eval()
    loaded = PeftModel.from_pretrained(base, str(run.folder / "model")).eval()
    task = ControlledTask()
    reward = (task.outcome_logps(loaded).exp() * task.rewards).sum(1).mean().item()
    metrics = run.result["metrics"]
    assert metrics["controlled/expected_reward"] == pytest.approx(reward, rel=1e-7)


@pytest.mark.slow
def test_checkpointing_and_small_budgets_do_not_change_the_run(train):
    whole = train("reference=live")
    split = train("reference=live", "model.gradient_checkpointing=true",
                  "data.micro_batch_tokens=60")  # fmt: skip
    for name in CURVES:
        assert split.values(name) == pytest.approx(whole.values(name), rel=1e-4, abs=1e-6), name


@pytest.mark.long
@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    task = [
        *("data.batch_size=4", "data.controlled.train_groups=21", "data.controlled.eval_groups=5"),
        *("data.micro_batch_tokens=20", "optimizer.warmup=0", "reference=live", "peft=lora"),
    ]
    one = run_train(tmp_path / "one", *task, "trainer.accelerator=cpu", "evaluation.samples=0")
    two = launch(tmp_path / "two", *task, "strategy=ddp", "trainer.devices=2")
    for name in CURVES:
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-4, abs=1e-6), name
    for name, value in adapter(one).items():
        torch.testing.assert_close(adapter(two)[name], value, rtol=1e-3, atol=1e-5)


def test_weights_in_four_bits_are_trained_beside(train):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = train("peft=qlora", "trainer.max_steps=3")
    assert run.code == 0
    assert run.values("train/loss")[0] == pytest.approx(LN2, abs=1e-5)
    plain = train("trainer.max_steps=3")
    assert run.result["model"] == plain.result["model"]
    losses = run.values("train/loss")
    assert losses[-1] < losses[0]
    # Other weights, other log-probabilities: they do not share a cache.
    assert plain.result["reference"]["computed"] == run.result["reference"]["rows"]


def test_the_learning_rate_follows_what_is_trained(train):
    run = train("optimizer.lr=null", "optimizer.warmup=0", "trainer.max_steps=1")
    assert run.code == 0
    assert run.values("train/learning_rate") == [pytest.approx(5e-6)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["peft.target_modules=[nothing]"], "nothing"),
        (["peft.target_modules=[lm_head]"], "peft.target_modules: lm_head is the model's head"),
        (["peft.adapter={folder}/absent"], "peft.adapter={folder}/absent: no such folder"),
    ],
)
def test_wrong_adapters_are_one_line(train, tmp_path, capsys, overrides: list[str], message: str):
    run = train(*(line.format(folder=tmp_path) for line in overrides))
    assert run.code == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert message.format(folder=tmp_path) in line


def test_another_models_adapter_is_named(whole: Run, train):
    """The embedded task's model is another: its matrices have other shapes."""
    folder: Path = whole.folder / "model"
    text = refusal(train_from(train, (f"peft.adapter={folder}",), ()))
    assert f"peft.adapter={folder}: " in text
