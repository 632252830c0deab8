"""Runs whose reference moves: steps, resumes, and the start that all else is measured from."""

import json
import math

import pytest
import torch

from tests.support.ranks import launch
from tests.support.recovery import assert_same_end, checkpoint, load
from tests.support.runs import TINY, Run, run_train

# Six steps a pass; updates after the third, sixth, ninth and twelfth.
LONG = (
    *TINY,
    *("trainer.max_epochs=2", "evaluation.every_n_steps=4", "checkpoint.every_n_steps=2"),
    *("checkpoint.keep=9", "evaluation.partition_samples=0", "optimizer.lr=3e-3"),
    *("optimizer.warmup=0", "reference.sync_every=3"),
)
WAYS = {
    "full": ("reference.sync_alpha=1",),
    "lora": ("peft=lora", "peft.r=3", "optimizer.lr=1e-2", "peft.dropout=0.1"),
    "half": ("trainer.precision=bf16-mixed",),
}


@pytest.mark.long
@pytest.mark.parametrize("way", ["full", "lora", "half"])
def test_a_resumed_run_equals_an_undisturbed_one(way: str, tmp_path):
    """From a step between two updates: rows, checkpoints, export and answers, bit for bit."""
    settings = (*LONG, *WAYS[way], "evaluation.samples=6")
    whole = run_train(tmp_path / "whole", *settings)
    assert whole.code == 0
    assert whole.values("train/loss")[0] == pytest.approx(math.log(2), abs=1e-4)
    resumed = run_train(tmp_path / "run", *settings, f"resume={checkpoint(whole, 4)}")
    assert_same_end(resumed, whole, after=4)
    first, moved = (load(checkpoint(whole, step)) for step in (2, 6))
    assert {value.dtype for value in moved["reference"].values()} == {torch.float32}
    assert any(
        not torch.equal(first["reference"][name], value)
        for name, value in moved["reference"].items()
    )
    again = run_train(tmp_path / "again", *settings, "reference.sync_every=2",
                      f"resume={checkpoint(whole, 4)}")  # fmt: skip
    assert again.code == 2
    assert "reference.sync_every=3, this run has reference.sync_every=2" in again.result["error"]


@pytest.fixture(scope="module")
def hard(tmp_path_factory) -> Run:
    """The reference becomes the policy with the last step but one."""
    settings = (*LONG, "reference.sync_alpha=1", "reference.sync_every=11", "evaluation.samples=6")
    run = run_train(tmp_path_factory.mktemp("hard") / "run", *settings)
    assert run.code == 0
    return run


@pytest.mark.slow
def test_the_loss_starts_again_and_all_else_is_measured_from_the_start(hard: Run, tmp_path):
    """Until the update all is as without one; the step behind it has the loss ln 2.

    Held-out rows, KL and reward are those of the same policy: the reference is still the start.
    """
    still = run_train(tmp_path / "still", *LONG, "reference.sync_every=null",
                      "evaluation.samples=6")  # fmt: skip
    losses, without = hard.values("train/loss"), still.values("train/loss")
    assert losses[:11] == pytest.approx(without[:11], rel=1e-4)
    assert losses[11] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(without[11] - math.log(2)) > 0.02
    for name in ("eval/loss", "eval/rewards/margins", "controlled/kl_policy_reference"):
        assert hard.values(name)[:2] == pytest.approx(still.values(name)[:2], rel=1e-4), name
        assert hard.values(name)[2] == pytest.approx(still.values(name)[2], rel=0.1), name
    assert hard.values("controlled/kl_policy_reference")[-1] > 0.05
    assert hard.result["metrics"]["samples/kl"] > 0
    assert still.result["reference"]["rows"] == 136
    # 96 rows twice, of which each is computed, and 40 of which each is read when it is asked for.
    counted = hard.result["reference"]
    assert counted["computed"] in (2 * 96, 2 * 96 + 40)


@pytest.mark.slow
def test_the_moved_reference_is_no_answer_s_reference(hard: Run, tmp_path):
    """A later evaluation loads the start, and gives the numbers of the run."""
    from dpo_lightning.__main__ import main

    out = tmp_path / "out.json"
    assert main(["evaluate", str(hard.folder), "--output", str(out)]) == 0
    found = json.loads(out.read_text())["metrics"]
    for name in ("samples/kl", "eval/loss", "controlled/kl_policy_reference"):
        assert found[name] == pytest.approx(hard.result["metrics"][name], rel=1e-3), name


@pytest.mark.long
@pytest.mark.parametrize(
    "way",
    [
        ("strategy=ddp",),
        ("strategy=fsdp",),
        ("strategy=fsdp", "peft=lora", "peft.r=3", "optimizer.lr=1e-2"),
    ],
    ids=["ddp", "fsdp", "fsdp-lora"],
)
def test_two_ranks_equal_one(way: tuple[str, ...], tmp_path):
    """Losses of steps behind updates, and the checkpoint's reference."""
    own = way[1:]
    one = run_train(tmp_path / "one", *LONG, *own, "trainer.devices=1")
    two = launch(tmp_path / "two", *LONG, *way, "trainer.devices=2")
    for name in ("train/loss", "eval/loss"):
        assert two.values(name) == pytest.approx(one.values(name), rel=1e-4), name
    found, expected = (load(checkpoint(run, 12))["reference"] for run in (two, one))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-3 * value.norm(), name
