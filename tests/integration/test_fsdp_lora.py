"""LoRA runs whose frozen base two ranks share equal LoRA runs of one process."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support.ranks import launch
from tests.support.recovery import assert_same_end
from tests.support.runs import Run, run_train
from tests.support.warm import run_apart

pytestmark = pytest.mark.long

# Steps of four groups, the last of one; budgets that make several micro-batches, and ranks with
# fewer of them than others or none; five evaluation groups for two ranks.
TASK = (
    *("data.batch_size=4", "data.controlled.train_groups=21", "data.controlled.eval_groups=5"),
    *("data.micro_batch_tokens=20", "optimizer.warmup=0", "trainer.accelerator=cpu"),
    *("checkpoint.every_n_steps=2", "checkpoint.keep=9", "evaluation.samples=6"),
    *("peft=lora", "peft.r=3", "optimizer.lr=5e-3"),
)
SHARDED = ("strategy=fsdp", "trainer.devices=2")
CURVES = ("train/loss", "train/grad_norm", "train/logps/chosen", "eval/loss", "eval/logps/rejected")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("one")
    run = run_train(folder / "run", *TASK, "trainer.devices=1", "peft.merge=true")
    assert run.code == 0
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Run:
    return launch(tmp_path_factory.mktemp("two") / "run", *TASK, *SHARDED, "peft.merge=true")


def adapter(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "adapter_model.safetensors")


def assert_same_adapter(one: Run, other: Run) -> None:
    own, theirs = adapter(one), adapter(other)
    assert own.keys() == theirs.keys()
    for name, value in own.items():
        assert (theirs[name] - value).norm() <= 1e-5 * value.norm(), name


def test_two_ranks_equal_one_process(one: Run, two: Run):
    for name in (*CURVES, "train/rewards/accuracies", "eval/partition/log_z"):
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-5, abs=1e-6), name
    for name in ("samples/kl", "partition/self_check", "controlled/expected_reward"):
        found, expected = (run.result["metrics"][name] for run in (two, one))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    assert_same_adapter(one, two)
    for name in ("data", "model", "status"):
        assert one.result[name] == two.result[name], name
    assert [row["step"] for row in two.rows] == [row["step"] for row in one.rows]


def test_the_exports_are_those_of_one_process(one: Run, two: Run):
    """The same files; PEFT loads the adapter, and gives the log-probabilities of the merged one."""
    for name in ("model", "model-merged"):
        files = [sorted(path.name for path in (run.folder / name).iterdir()) for run in (one, two)]
        assert files[0] == files[1]
    configs = [
        json.loads((run.folder / "model" / "adapter_config.json").read_text()) for run in (one, two)
    ]
    assert configs[0] == configs[1]
    base = AutoModelForCausalLM.from_pretrained(configs[0]["base_model_name_or_path"]).eval()
    loaded = PeftModel.from_pretrained(base, str(two.folder / "model")).eval()
    merged = AutoModelForCausalLM.from_pretrained(two.folder / "model-merged").eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    own, other = (model(input_ids=ids).logits.log_softmax(-1) for model in (loaded, merged))
    torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    from dpo_lightning.data.controlled import ControlledTask

    task = ControlledTask()
    reward = (task.outcome_logps(loaded).exp() * task.rewards).sum(1).mean().item()
    expected = two.result["metrics"]["controlled/expected_reward"]
    assert reward == pytest.approx(expected, rel=1e-7)


def test_a_checkpoint_holds_the_adapter_alone_and_is_of_one_process(one: Run, two: Run):
    loaded = [
        torch.load(run.folder / "checkpoints" / "step-000004.ckpt", weights_only=True)
        for run in (one, two)
    ]
    assert loaded[0]["state_dict"].keys() == loaded[1]["state_dict"].keys()
    assert all(".lora_" in name for name in loaded[1]["state_dict"])
    own, other = (checkpoint["optimizer_states"][0] for checkpoint in loaded)
    assert own["param_groups"] == other["param_groups"]
    for number, moments in own["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(other["state"][number][name], value, rtol=1e-3, atol=1e-6)


def test_a_run_that_was_killed_goes_on_to_the_bit(tmp_path):
    """Rank 0 is gone in the fifth step, in which its dropout has drawn; the other one ends too."""
    task = (
        *(*TASK, *SHARDED, "peft.dropout=0.2", "trainer.threads=1", "logger=none"),
        *("plugins=[tests.support.disturbances]", "trainer.callbacks=[disturb]"),
    )
    undisturbed = run_apart(
        *task, f"hydra.run.dir={tmp_path / 'whole'}", env={"DISTURB": "vanish:99:0"}
    )
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr
    whole = Run(0, tmp_path / "whole")
    own = (*task, f"hydra.run.dir={tmp_path / 'run'}")
    killed = run_apart(*own, env={"DISTURB": "vanish:5:0"})
    assert killed.returncode != 0
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*.ckpt"))
    # A thread writes them, and the fourth step's may not be whole yet.
    assert saved in (["step-000002.ckpt"], ["step-000002.ckpt", "step-000004.ckpt"])
    last = 2 * len(saved)
    again = run_apart(*own, "resume=auto", env={"DISTURB": "vanish:99:0"})
    assert again.returncode == 0, again.stdout + again.stderr
    resumed = Run(0, tmp_path / "run")
    assert resumed.result["resumed"]["step"] == last
    assert_same_end(resumed, whole, after=last)


def test_a_run_goes_on_with_more_ranks_and_with_fewer(one: Run, two: Run, tmp_path):
    for source, launched in ((one, True), (two, False)):
        resume = f"resume={source.folder}/checkpoints/step-000004.ckpt"
        folder = tmp_path / str(launched)
        if launched:
            run = launch(folder, *TASK, *SHARDED, resume)
        else:
            run = run_train(folder, *TASK, "trainer.devices=1", resume)
        assert run.values("train/loss") == pytest.approx(one.values("train/loss")[4:], rel=1e-5)
        assert_same_adapter(one, run)


@pytest.fixture
def task(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> list[str]:
    return [
        *(f"model.pretrained={tiny_model}", f"data.train={pairs_file}", "data.batch_size=8"),
        *("data.micro_batch_tokens=150", "optimizer.lr=0.01", "optimizer.warmup=0"),
        *("trainer.max_steps=3", "trainer.accelerator=cpu", "peft=lora", "peft.r=3"),
        *("evaluation.samples=4", "evaluation.max_new_tokens=6"),
        f"reference.cache_dir={tmp_path / 'cache'}",
    ]


def test_another_model_in_every_other_way(task: list[str], tmp_path):
    """A live reference, activations computed again, gradients reduced in every micro-batch."""
    more = (*task, "reference=live", "model.gradient_checkpointing=true")
    one = run_train(tmp_path / "one", *more, "trainer.devices=1")
    two = launch(tmp_path / "two", *more, *SHARDED, "strategy.sync_gradients=micro_batch",
                 "evaluation.samples=4")  # fmt: skip
    assert one.values("train/loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    for name in CURVES:
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-4, abs=1e-6), name
    assert two.result["reference"] == one.result["reference"]
    assert_same_adapter(one, two)
    assert not (two.folder / "model" / "model.safetensors").exists()


def test_a_stored_adapter_is_start_and_reference_and_bfloat16_is_that_of_one_process(
    task: list[str], tmp_path
):
    """Frozen weights in bfloat16, float32 matrices that are rounded as they are gathered."""
    first = run_train(tmp_path / "first", *task, "trainer.devices=1")
    more = (
        *(word for word in task if not word.startswith("peft.r=")),
        *(f"peft.adapter={first.folder / 'model'}", "trainer.precision=bf16-mixed"),
    )
    for number, dtype in enumerate(("float32", "bfloat16")):
        own = (*more, f"model.dtype={dtype}")
        one = run_train(tmp_path / f"one-{number}", *own, "trainer.devices=1")
        two = launch(tmp_path / f"two-{number}", *own, *SHARDED)
        assert one.values("train/loss")[0] == pytest.approx(math.log(2), abs=2e-3)
        # bfloat16 has 8 bits: sums over ranks are of other products.
        for name in ("train/loss", "eval/loss"):
            assert two.values(name) == pytest.approx(one.values(name), rel=5e-3), name
        for name, value in adapter(one).items():
            assert value.dtype == adapter(two)[name].dtype == torch.float32
            assert (adapter(two)[name] - value).norm() <= 0.05 * value.norm(), name
        # What is held and what is rounded as it is gathered are the same numbers: one cache.
        assert two.result["reference"]["computed"] == 0
