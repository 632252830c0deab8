"""Two gloo ranks equal one process, on ragged batches, with a rank that has nothing to do."""

import json

import pytest
from safetensors.torch import load_file

from tests.support.ranks import launch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("batch_size", "groups"),
    [(4, 21), pytest.param(1, 5, marks=pytest.mark.long)],
    ids=["the last step has one group", "one group a step"],
)
def test_two_ranks_equal_one_process(tmp_path, batch_size: int, groups: int):
    """Both cases leave a rank without groups in some step; budgets make several micro-batches."""
    # Five evaluation groups cannot be shared equally by two ranks.
    task = [
        f"data.batch_size={batch_size}",
        f"data.controlled.train_groups={groups}",
        "data.controlled.eval_groups=5",
        "data.micro_batch_tokens=20",
        "optimizer.warmup=0",
    ]
    one = launch(tmp_path / "one", *task)
    two = launch(tmp_path / "two", *task, "strategy=ddp", "trainer.devices=2")
    for name in ("train/loss", "train/grad_norm", "train/logps/chosen", "eval/loss"):
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-5), name
    for name in ("train/rewards/accuracies", "eval/rewards/accuracies", "eval/partition/log_z"):
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-5), name
    weights = [load_file(run.folder / "model" / "model.safetensors") for run in (one, two)]
    for name, tensor in weights[0].items():
        assert (tensor - weights[1][name]).norm() <= 1e-5 * tensor.norm(), name
    assert one.result["status"] == two.result["status"] == "finished"
    assert json.dumps(one.result["data"]) == json.dumps(two.result["data"])
    # One folder, written by rank 0 alone.
    assert len({row["step"] for row in two.rows}) == len(two.values("train/loss"))


@pytest.mark.long
def test_an_adapted_beta_is_that_of_all_ranks(tmp_path):
    """Six groups a step on two ranks: the margins of both make one beta."""
    task = [
        *("data.batch_size=6", "data.controlled.train_groups=18", "data.controlled.eval_groups=5"),
        *("loss.adaptive_beta=0.8", "optimizer.lr=0.01", "optimizer.warmup=0"),
        "evaluation.partition_samples=0",
    ]
    one = launch(tmp_path / "one", *task)
    two = launch(tmp_path / "two", *task, "strategy=ddp", "trainer.devices=2")
    betas = one.values("train/beta")
    assert len({round(beta, 6) for beta in betas}) == 3
    assert two.values("train/beta") == pytest.approx(betas, rel=1e-5)
    assert two.values("train/loss") == pytest.approx(one.values("train/loss"), rel=1e-5)
