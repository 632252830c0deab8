"""Two ranks with shards (FSDP2) equal one process: losses, weights, metrics, exports, resumes."""

import pytest
import torch
from safetensors.torch import load_file

from tests.support.ranks import launch
from tests.support.runs import Run, run_train

# Two sharded ranks take half a minute.
pytestmark = pytest.mark.long

# Steps of four groups, the last of one; budgets that make several micro-batches, and ranks with
# fewer of them than others or none; five evaluation groups for two ranks.
TASK = (
    *("data.batch_size=4", "data.controlled.train_groups=21", "data.controlled.eval_groups=5"),
    *("data.micro_batch_tokens=20", "optimizer.warmup=0", "trainer.accelerator=cpu"),
    *("checkpoint.every_n_steps=2", "checkpoint.keep=9", "evaluation.samples=6"),
)
SHARDED = ("strategy=fsdp", "trainer.devices=2")


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Run:
    run = run_train(tmp_path_factory.mktemp("one"), *TASK, "trainer.devices=1")
    assert run.code == 0
    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Run:
    return launch(tmp_path_factory.mktemp("two"), *TASK, *SHARDED)


def assert_same_weights(one, other) -> None:
    weights = [load_file(run.folder / "model" / "model.safetensors") for run in (one, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).norm() <= 1e-5 * tensor.norm(), name


def test_two_sharded_ranks_equal_one_process(one, two):
    for name in ("train/loss", "train/grad_norm", "train/logps/chosen", "eval/loss"):
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-5), name
    for name in ("train/rewards/accuracies", "eval/rewards/accuracies", "eval/partition/log_z"):
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-5), name
    # Sampled with the same seed from the same weights, and what is exact.
    for name in ("samples/kl", "partition/self_check", "controlled/expected_reward"):
        found, expected = (run.result["metrics"][name] for run in (two, one))
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5), name
    assert_same_weights(one, two)
    for name in ("data", "model", "status"):
        assert one.result[name] == two.result[name]
    # One folder, written by rank 0 alone.
    assert [row["step"] for row in two.rows] == [row["step"] for row in one.rows]


def test_checkpoints_have_one_format(one, two):
    """Whole float32 tensors under the same names, moments too, whoever wrote them."""
    loaded = [
        torch.load(run.folder / "checkpoints" / "step-000004.ckpt", weights_only=True)
        for run in (one, two)
    ]
    assert loaded[0]["state_dict"].keys() == loaded[1]["state_dict"].keys()
    own, other = (checkpoint["optimizer_states"][0] for checkpoint in loaded)
    assert own["param_groups"] == other["param_groups"]
    assert own["state"].keys() == other["state"].keys()
    for number, moments in own["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(other["state"][number][name], value, rtol=1e-3, atol=1e-6)


def test_a_run_goes_on_with_more_ranks(one, tmp_path):
    """The order of the groups is kept: each later step has the loss of the undisturbed run."""
    resume = f"resume={one.folder}/checkpoints/step-000002.ckpt"
    run = launch(tmp_path, *TASK, *SHARDED, resume)
    assert [row["step"] for row in run.rows if "train/loss" in row] == [3, 4, 5, 6]
    assert run.values("train/loss") == pytest.approx(one.values("train/loss")[2:], rel=1e-5)
    assert_same_weights(one, run)


def test_a_run_goes_on_with_fewer_ranks(one, two, tmp_path):
    resume = f"resume={two.folder}/checkpoints/step-000004.ckpt"
    run = run_train(tmp_path, *TASK, "trainer.devices=1", resume)
    assert run.values("train/loss") == pytest.approx(one.values("train/loss")[4:], rel=1e-5)
    assert_same_weights(one, run)


def test_another_model_in_every_other_way(tiny_model, pairs_file, tmp_path):
    """A live reference, activations computed again, gradients reduced in every micro-batch."""
    task = [
        *(f"model.pretrained={tiny_model}", f"data.train={pairs_file}", "data.batch_size=8"),
        *("data.micro_batch_tokens=150", "optimizer.lr=0.01", "optimizer.warmup=0"),
        *("trainer.max_steps=3", "trainer.accelerator=cpu", "reference=live"),
        *("evaluation.samples=4", "evaluation.max_new_tokens=6"),
        "model.gradient_checkpointing=true",
    ]
    one = run_train(tmp_path / "one", *task, "trainer.devices=1")
    two = launch(tmp_path / "two", *task, *SHARDED, "strategy.sync_gradients=micro_batch")
    assert one.values("train/loss")[0] == pytest.approx(0.693147, abs=1e-5)
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-4), name
    assert two.result["reference"] == one.result["reference"]
