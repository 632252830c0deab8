"""bfloat16: float32 master weights behind it, and numbers close to those of float32."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.runs import TINY, Run, run_train

BF16 = (*TINY, "trainer.precision=bf16-mixed", "trainer.accelerator=cpu", "optimizer.lr=1e-3")


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("bf16") / "run"
    run = run_train(folder, *BF16, "checkpoint.every_n_steps=2", "checkpoint.keep=9")
    assert run.code == 0
    return run


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> Run:
    """The same run in float32."""
    folder = tmp_path_factory.mktemp("single") / "run"
    run = run_train(folder, *TINY, "trainer.accelerator=cpu", "optimizer.lr=1e-3")
    assert run.code == 0
    return run


def test_the_start_is_ln_2_and_the_rest_close_to_float32(whole: Run, single: Run):
    assert whole.values("train/loss")[0] == pytest.approx(math.log(2), abs=1e-3)
    for name, tolerance in (("train/loss", 0.01), ("train/logps/chosen", 0.02)):
        assert whole.values(name) == pytest.approx(single.values(name), rel=tolerance), name
    one, other = weights(whole), weights(single)
    moved = math.hypot(*((one[n] - other[n]).norm().item() for n in one))
    assert moved < 0.05 * math.hypot(*(value.norm().item() for value in other.values()))


def test_the_export_has_float32_weights_that_bfloat16_cannot_hold(whole: Run):
    for name, value in weights(whole).items():
        assert value.dtype == torch.float32
        if value.ndim == 2:
            assert not torch.equal(value, value.bfloat16().float()), name


def test_exact_quantities_are_of_the_exported_weights(whole: Run):
    from transformers import AutoModelForCausalLM

    from dpo_lightning.data.controlled import ControlledTask

    task = ControlledTask()
    model = AutoModelForCausalLM.from_pretrained(whole.folder / "model").eval()
    logps = task.outcome_logps(model)
    reward = (logps.exp() * task.rewards).sum(1).mean().item()
    metrics = whole.result["metrics"]
    assert metrics["controlled/expected_reward"] == pytest.approx(reward, rel=1e-6)
    assert metrics["controlled/probability_sum"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("step", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_resumed_run_ends_like_an_undisturbed_one(whole: Run, tmp_path, step: int):
    checkpoint = whole.folder / "checkpoints" / f"step-{step:06d}.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert {value.dtype for value in state.values()} == {torch.float32}
    resumed = run_train(tmp_path / "run", *BF16, f"resume={checkpoint}")
    assert resumed.code == 0
    for name, value in weights(resumed).items():
        assert torch.equal(value, weights(whole)[name]), name


@pytest.mark.slow
def test_micro_batches_do_not_change_the_step(whole: Run, single: Run, tmp_path):
    """Other micro-batches round otherwise, by no more than bfloat16 itself differs from float32.

    A step whose gradients nearly cancel is rounded by some per cent, on one processor more than on
    another; the bound of 0.5% holds for the others.
    """
    split = run_train(tmp_path / "run", *BF16, "data.micro_batch_tokens=40")
    assert split.values("train/loss") == pytest.approx(whole.values("train/loss"), rel=5e-3)
    norms = np.array([run.values("train/grad_norm") for run in (split, whole, single)])
    rounding = np.abs(norms[1] - norms[2])
    assert (np.abs(norms[0] - norms[1]) <= 5e-3 * norms[1] + 2 * rounding).all(), norms


@pytest.mark.slow
def test_a_live_reference_is_rounded_like_the_policy(tmp_path):
    """Otherwise the first loss would hold the rounding of one side alone."""
    run = run_train(tmp_path / "run", *BF16, "reference=live", "trainer.max_steps=2")
    assert run.values("train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert np.isfinite(run.values("train/loss")).all()


@pytest.mark.slow
def test_weights_held_in_bfloat16_have_no_masters(tmp_path):
    run = run_train(tmp_path / "run", *BF16, "model.dtype=bfloat16", "trainer.max_steps=2")
    assert run.code == 0
    assert {value.dtype for value in weights(run).values()} == {torch.bfloat16}
