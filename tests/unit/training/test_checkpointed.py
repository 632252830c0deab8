"""The module's part of a checkpoint, after steps that are known."""

import lightning.pytorch as pl
import pytest
import torch

from dpo_lightning.errors import DivergedError
from tests.support.models import make_model
from tests.support.steps import in_turn, pair, take_steps, with_logratios


def groups(count: int = 3):
    model = make_model("llama")
    return in_turn(*(with_logratios(model, pair(n), 0.3, 0.1 * n) for n in range(count)))


def saved(taken) -> dict:
    path = taken.folder / "here.ckpt"
    taken.trainer.save_checkpoint(path)
    return torch.load(path, weights_only=True)


def test_float32_weights_are_saved_and_not_their_rounding(tmp_path):
    """A policy that computes in bfloat16 has its rounding; both come from the same step."""
    taken = take_steps(tmp_path, groups(), steps=3, compute_dtype=torch.bfloat16)
    state = saved(taken)["state_dict"]
    found = dict(taken.module.policy.named_parameters())
    lost = 0
    for name, weight in found.items():
        master = state[f"policy.{name}"]
        assert (weight.dtype, master.dtype) == (torch.bfloat16, torch.float32)
        assert torch.equal(weight, master.bfloat16()), name
        lost += not torch.equal(master, master.bfloat16().float())
    assert lost > len(found) / 2
    start = make_model("llama").state_dict()
    assert any(not torch.equal(state[f"policy.{name}"], start[name]) for name in found)


def test_what_is_frozen_is_not_saved(tmp_path):
    model = make_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    taken = take_steps(tmp_path, groups(1), model=model)
    names = {name.removeprefix("policy.") for name in saved(taken)["state_dict"]}
    assert names == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("steps", "is_of_these_weights"), [(2, True), (3, False)])
def test_accuracies_are_saved_with_the_weights_they_are_of(
    tmp_path, steps: int, is_of_these_weights: bool
):
    """An evaluation after step 2 says nothing of the weights after step 3."""
    evaluated = [with_logratios(make_model("llama"), pair(9), 1.0, -0.5)]
    taken = take_steps(tmp_path, groups(), eval_groups=evaluated, eval_every=2, steps=steps)
    progress = saved(taken)["progress"]
    assert progress["last_evaluation"] == 2
    found = progress["eval_accuracies"]
    assert (found is not None and found.tolist() == [1.0]) is is_of_these_weights


class StopAfter(pl.Callback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self._step


@pytest.mark.parametrize(("step", "expected"), [(1, []), (2, [0.644397, 1, 1]), (3, [])])
def test_an_interval_is_saved_while_it_is_open(tmp_path, step: int, expected: list):
    """Rows at steps 1 and 3 of three. In between are the loss, weight and number of one pair.

    Its margin is 0.3 - 0.1: log(1 + exp(-0.5 * 0.2)) = 0.644397.
    """
    taken = take_steps(
        tmp_path,
        groups(),
        steps=3,
        log_every_n_steps=5,
        lr=1e-12,
        beta=0.5,
        callbacks=[StopAfter(step)],
    )
    assert taken.trainer.global_step == step
    sums = saved(taken)["progress"]["train_sums"]
    assert ([] if sums is None else sums[0, :3].tolist()) == pytest.approx(expected, rel=1e-5)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """A finite gradient at an absurd learning rate."""
    taken = take_steps(tmp_path, groups(1), lr=3e38)
    assert taken.trainer.global_step == 1
    with pytest.raises(DivergedError, match=r"step 1: after it .* are not finite.*optimizer\.lr"):
        saved(taken)
    assert not (tmp_path / "here.ckpt").exists()


def test_weights_whose_sum_overflows_are_finite(tmp_path):
    """Each of them is a number, and saved."""
    taken = take_steps(tmp_path, groups(1))
    with torch.no_grad():
        taken.module.policy.lm_head.weight.fill_(3e38)
    assert (saved(taken)["state_dict"]["policy.lm_head.weight"] == 3e38).all()
