"""Steps that are not finite: skipped without a trace, or the end; on one rank and on two."""

import math
from dataclasses import replace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from dpo_lightning.errors import DivergedError
from tests.support.models import make_model
from tests.support.ranks import on_ranks
from tests.support.steps import (
    ids,
    in_turn,
    pair,
    plain_logps,
    take_steps,
    with_logratios,
)

BETA = 0.5
# Nothing moves: each group's margin is what it was made with, whatever step it is in.
STILL = {"lr": 1e-12, "beta": BETA}


def group(number: int, chosen: float, rejected: float, **changes):
    return with_logratios(make_model("llama"), pair(number, **changes), chosen, rejected)


def broken(number: int):
    """A group whose reference is not a number, so that neither loss nor gradient is one."""
    return pair(number, reference_logps=np.array([np.nan, -1.0], dtype=np.float32))


def loss(margin: float, beta: float = BETA) -> float:
    return math.log1p(math.exp(-beta * margin))


class BreaksGradients(pl.Callback):
    """Makes the gradient of one weight infinite in some steps, counted from 1, on this rank."""

    def __init__(self, *steps: int) -> None:
        self._steps = steps

    def on_train_start(self, trainer, pl_module):
        def spoil(gradient):
            broken = trainer.global_step + 1 in self._steps
            return gradient * torch.inf if broken else gradient

        next(pl_module.policy.parameters()).register_hook(spoil)


# One process -------------------------------------------------------------------------------------


def test_a_skipped_step_changes_nothing_but_the_count(tmp_path):
    """The second of three groups is broken: weights and moments are those of the other two alone.

    Its learning rate goes with it: of a constant one the others have what they had.
    """
    groups = [group(1, 1.0, -0.5), broken(2), group(3, -0.4, 0.3)]
    settings = {"beta": BETA, "lr": 1e-3, "max_grad_norm": 1.0}
    taken = take_steps(tmp_path / "a", in_turn(*groups), steps=3, max_skipped_steps=1, **settings)
    plain = take_steps(tmp_path / "b", in_turn(groups[0], groups[2]), steps=2, **settings)
    assert taken.trainer.global_step == 3
    for name, weight in taken.weights.items():
        assert torch.equal(weight, plain.weights[name]), name
    for kind, moments in taken.moments.items():
        assert all(map(torch.equal, moments, plain.moments[kind]))
    assert taken.values("train/skipped_steps") == [0, 1, 1]
    # The broken one has no loss and no norm.
    assert taken.values("train/loss") == plain.values("train/loss")
    assert taken.values("train/grad_norm") == plain.values("train/grad_norm")


def test_a_skipped_step_counts_in_the_schedule(tmp_path):
    """Linear from 1e-3 to 0 in four steps: 1, 3/4, 2/4, 1/4, whatever became of the second."""
    groups = [group(1, 1.0, -0.5), broken(2), group(3, -0.4, 0.3), group(4, 0.1, 0.2)]
    taken = take_steps(
        tmp_path, in_turn(*groups), steps=4, lr=1e-3, schedule="linear", max_skipped_steps=1
    )
    rates = [1e-3, 7.5e-4, 5e-4, 2.5e-4]
    assert taken.values("train/learning_rate") == pytest.approx(rates)


def test_an_interval_is_the_mean_of_the_steps_that_were_taken(tmp_path):
    """Rows at steps 1 and 4; the last has the losses of steps 2 and 4: margins 0.7 and -0.1."""
    groups = [group(1, 1.0, -0.5), group(2, 0.4, -0.3), broken(3), group(4, 0.1, 0.2)]
    taken = take_steps(
        tmp_path, in_turn(*groups), steps=4, max_skipped_steps=1, log_every_n_steps=4, **STILL
    )
    expected = [loss(1.5), (loss(0.7) + loss(-0.1)) / 2]
    assert taken.values("train/loss") == pytest.approx(expected, rel=1e-5)


def test_more_skipped_steps_than_allowed_are_the_end(tmp_path):
    """One may be passed over; the second ends the run before its step, and says which row."""
    groups = [broken(1), group(2, 1.0, -0.5), broken(3)]
    with pytest.raises(DivergedError, match="=1 are used up") as caught:
        take_steps(tmp_path, in_turn(*groups), steps=3, max_skipped_steps=1, **STILL)
    report = caught.value.report
    assert (report["step"], report["loss"], report["grad_norm"]) == (3, "nan", "nan")
    [row] = report["rows"]
    assert (row["source"], row["finite"], row["response_tokens"]) == ("rows:3", False, [2, 4])


def test_the_rows_of_a_step_are_reported_with_their_own_numbers(tmp_path):
    """One step of a pair, of three responses and of a broken pair: the broken one comes first."""
    model = make_model("llama")
    three = replace(pair(2), responses=(ids(5, 6), ids(7, 8, 9), ids(4)), ranks=(1, 2, 3))
    groups = [group(1, 1.0, -0.5), with_logratios(model, three, 0.5, 1.0, -1.0), broken(3)]
    with pytest.raises(DivergedError, match="not finite in rows:3, and the gradient") as caught:
        take_steps(tmp_path, groups, batch_size=3, **STILL)
    rows = caught.value.report["rows"]
    assert [row["row"] for row in rows] == [2, 0, 1]
    assert [row["finite"] for row in rows] == [False, True, True]
    assert rows[0]["reference_logps"] == ["nan", -1.0]
    for row, own in zip(rows[1:], groups, strict=False):
        expected = [logp.item() for logp in plain_logps(model, own)]
        assert row["policy_logps"] == pytest.approx(expected, rel=1e-4)
        assert row["reference_logps"] == own.reference_logps.tolist()
        assert row["response_tokens"] == [len(response) for response in own.responses]
        assert row["prompt_tokens"] == 3
    # Pairs have their own margins; of three responses the mean of margins -0.5, 1.5 and 2.0.
    losses = [loss(1.5), (loss(-0.5) + loss(1.5) + loss(2.0)) / 3]
    assert [row["loss"] for row in rows[1:]] == pytest.approx(losses, rel=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped_too(tmp_path):
    """The loss of the second step is a number, its gradient is none."""
    groups = in_turn(group(1, 1.0, -0.5), group(2, 0.4, -0.3))
    common = {"steps": 2, **STILL}
    taken = take_steps(
        tmp_path / "a", groups, max_skipped_steps=1, callbacks=[BreaksGradients(2)], **common
    )
    assert taken.module.skipped_steps == 1
    assert all(weight.isfinite().all() for weight in taken.weights.values())
    with pytest.raises(DivergedError, match=f"the loss is {loss(0.7):.4g}, finite in each"):
        take_steps(tmp_path / "b", groups, callbacks=[BreaksGradients(2)], **common)


# Beta that follows the margins -------------------------------------------------------------------

ADAPTIVE = {"adaptive": 0.4, "momentum": 0.75}


def adaptive_groups():
    """Margins 2, 4 and -1, of which the second has a loss that is infinite."""
    return in_turn(group(1, 1.0, -1.0), group(2, 3.0, -1.0, weight=math.inf), group(3, -0.5, 0.5))


def check_adapted(taken) -> None:
    """Beta 0.5 is adapted to the margins M = 0.5 * 2 = 1, then 2 in vain, then -0.5.

    M_0 is 0 and beta 0.5 (1 + 0.4 * 1) = 0.7; then M_0 = 0.25 * 1. The skipped step leaves it
    there, and beta is 0.5 (1 + 0.4 (-0.5 - 0.25)) = 0.35; then M_0 = 0.75 * 0.25 - 0.25 * 0.5.
    With the skipped step's margin M_0 would have been 0.6875, and beta 0.2625.
    """
    assert taken.values("train/beta") == pytest.approx([0.7, 0.35], rel=1e-5)
    expected = [loss(2, beta=0.7), loss(-1, beta=0.35)]
    assert taken.values("train/loss") == pytest.approx(expected, rel=1e-5)
    assert taken.module.margin_average.item() == pytest.approx(0.0625, rel=1e-4)
    assert taken.module.skipped_steps == 1


def test_the_margins_of_a_skipped_step_are_forgotten(tmp_path):
    check_adapted(
        take_steps(
            tmp_path, adaptive_groups(), steps=3, plan=ADAPTIVE, max_skipped_steps=1, **STILL
        )
    )


# Two ranks ---------------------------------------------------------------------------------------


def _adaptive_on_two(rank: int, folder) -> float:
    taken = take_steps(
        folder / "run",
        adaptive_groups(),
        steps=3,
        ranks=2,
        plan=ADAPTIVE,
        max_skipped_steps=1,
        **STILL,
    )
    if rank == 0:
        check_adapted(taken)
    return taken.module.margin_average.item()


def test_a_rank_without_groups_takes_part_in_an_adapted_beta(tmp_path):
    """One group a step: the other rank has none, and the numbers are those of one process."""
    averages = on_ranks(_adaptive_on_two, tmp_path, tmp_path)
    assert averages == pytest.approx([0.0625, 0.0625], rel=1e-4)


def step_of_four():
    """One step; margins 1.5, 0.7, -0.7 and -0.1."""
    return [group(1, 1.0, -0.5), group(2, 0.4, -0.3), group(3, -0.4, 0.3), group(4, 0.1, 0.2)]


def _skip_on_two(rank: int, folder) -> dict:
    """A step of four groups of which one is broken, then a sound one."""
    groups = step_of_four()
    groups += [replace(group, source=f"more:{n}") for n, group in enumerate(groups)]
    groups = in_turn(*groups)
    bad = next(i for i, item in enumerate(groups) if item.source == "rows:3")
    groups[bad] = replace(groups[bad], reference_logps=broken(3).reference_logps)
    taken = take_steps(
        folder / "run", groups, steps=2, batch_size=4, ranks=2, max_skipped_steps=1, beta=BETA
    )
    return {
        "weights": {name: weight.numpy() for name, weight in taken.weights.items()},
        "skipped": taken.module.skipped_steps,
        "losses": taken.values("train/loss") if rank == 0 else None,
    }


def test_two_ranks_skip_a_step_that_one_of_them_cannot_take(tmp_path):
    """Both stay together, and end where one process ends that has the second step alone."""
    one, other = on_ranks(_skip_on_two, tmp_path, tmp_path)
    plain = take_steps(tmp_path / "plain", step_of_four(), batch_size=4, beta=BETA)
    assert one["skipped"] == other["skipped"] == 1
    for name, weight in plain.weights.items():
        np.testing.assert_array_equal(one["weights"][name], other["weights"][name])
        np.testing.assert_allclose(one["weights"][name], weight, rtol=1e-4, atol=1e-5)
    mean = (loss(1.5) + loss(0.7) + loss(-0.7) + loss(-0.1)) / 4
    assert one["losses"] == pytest.approx([mean], rel=1e-5)


def _end_on_two(rank: int, folder) -> dict:
    spoilt = [BreaksGradients(1)] if rank == 1 else []
    with pytest.raises(DivergedError) as caught:
        take_steps(
            folder / "run", step_of_four(), batch_size=4, ranks=2, beta=BETA, callbacks=spoilt
        )
    return caught.value.report


def test_a_step_that_ends_a_run_is_reported_whole_on_every_rank(tmp_path):
    """One rank's gradient is no number; loss and rows are those of both ranks' groups."""
    one, other = on_ranks(_end_on_two, tmp_path, tmp_path)
    assert one == other
    mean = (loss(1.5) + loss(0.7) + loss(-0.7) + loss(-0.1)) / 4
    assert one["loss"] == pytest.approx(mean, rel=1e-5)
    assert one["grad_norm"] == "nan"
    assert [row["row"] for row in one["rows"]] == [0, 1, 2, 3]
    assert [row["source"] for row in one["rows"]] == [f"rows:{n}" for n in (1, 2, 3, 4)]
    losses = [loss(margin) for margin in (1.5, 0.7, -0.7, -0.1)]
    assert [row["loss"] for row in one["rows"]] == pytest.approx(losses, rel=1e-5)


def _signal_on_two(rank: int, folder, received: list[int]) -> int:
    taken = take_steps(
        folder / "run",
        step_of_four(),
        batch_size=4,
        ranks=2,
        pending_signal=lambda: received[rank],
    )
    return taken.module.stop_signal


@pytest.mark.parametrize("received", [[0, 15], [2, 15], [0, 0]])
def test_a_signal_to_one_rank_is_that_of_all(tmp_path, received: list[int]):
    """Both know of it after the same step, so that neither goes on alone; of two the larger one."""
    assert on_ranks(_signal_on_two, tmp_path, tmp_path, received) == [max(received)] * 2
