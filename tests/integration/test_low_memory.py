"""Training with less memory: bfloat16 weights rounded by chance, moments of 8 bits."""

import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import TINY, Run, run_train

BF16 = ("model.dtype=bfloat16", "trainer.precision=bf16-mixed")
EIGHT = ("optimizer=adamw_8bit",)
KINDS = {"bf16": BF16, "8bit": EIGHT, "both": (*BF16, *EIGHT)}
COMMON = (*TINY, "trainer.accelerator=cpu", "optimizer.lr=1e-3")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "model.safetensors")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("bf16", marks=pytest.mark.slow),
        pytest.param("8bit", marks=pytest.mark.slow),
        "both",
    ],
)
def whole(request, tmp_path_factory) -> tuple[tuple[str, ...], Run]:
    settings = (*COMMON, *KINDS[request.param])
    folder = tmp_path_factory.mktemp(request.param) / "run"
    run = run_train(folder, *settings, "checkpoint.every_n_steps=2", "checkpoint.keep=9")
    assert run.code == 0
    return settings, run


@pytest.mark.long
@pytest.mark.slow
def test_a_resumed_run_ends_like_an_undisturbed_one(whole, tmp_path):
    settings, run = whole
    checkpoint = run.folder / "checkpoints" / "step-000004.ckpt"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 4
    resumed = run_train(tmp_path / "run", *settings, f"resume={checkpoint}")
    assert resumed.code == 0
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(run)[name]), name


@pytest.mark.slow
def test_the_losses_are_close_to_those_of_float32(whole, tmp_path):
    _, run = whole
    single = run_train(tmp_path / "run", *COMMON)
    assert run.values("train/loss") == pytest.approx(single.values("train/loss"), rel=0.02)
    assert run.values("train/learning_rate") == single.values("train/learning_rate")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"),
    [(EIGHT, ("optimizer=adamw",)), pytest.param((), EIGHT, marks=pytest.mark.slow)],
)
def test_a_run_is_not_resumed_with_another_optimizer(first, then, tmp_path):
    short = (*COMMON, "trainer.max_steps=1", "data.controlled.eval_groups=4")
    run = run_train(tmp_path / "one", *short, *first)
    assert run.code == 0
    other = run_train(tmp_path / "two", *short, *then, f"resume={run.folder}")
    assert other.code == 2
    assert "the checkpoint was made with optimizer.name=adamw" in other.result["error"]


@pytest.mark.long
def test_the_controlled_task_is_learnt_where_the_nearest_rounding_stands_still(tmp_path):
    """At 3e-4 a step is less than half of the last bit of most weights.

    Expected rewards go from 1.5 to about 5; rounding by chance has to be within 0.2 of float32 and
    the nearest at least 0.3 behind. With 8-bit moments losses are those of float32 to 1e-3.
    """
    task = (
        "data.controlled.train_groups=4096", "data.controlled.eval_groups=128",
        "evaluation.samples=0", "evaluation.partition_samples=0", "trainer.accelerator=cpu",
        "optimizer.lr=3e-4", "trainer.max_steps=128", "checkpoint.last=false",
    )  # fmt: skip
    nearest = (*BF16, "optimizer.stochastic_rounding=false")
    found = {}
    for name, settings in {"single": (), "chance": BF16, "nearest": nearest, "8bit": EIGHT}.items():
        run = run_train(tmp_path / name, *task, *settings)
        assert run.code == 0
        found[name] = run.result["metrics"]
    reward = {name: metrics["controlled/expected_reward"] for name, metrics in found.items()}
    accuracy = {name: metrics["eval/rewards/accuracies"] for name, metrics in found.items()}
    assert reward["single"] > 4
    assert reward["chance"] == pytest.approx(reward["single"], abs=0.2)
    assert accuracy["chance"] == pytest.approx(accuracy["single"], abs=0.05)
    assert reward["nearest"] < reward["single"] - 0.3
    assert found["8bit"]["eval/loss"] == pytest.approx(found["single"]["eval/loss"], abs=1e-3)
