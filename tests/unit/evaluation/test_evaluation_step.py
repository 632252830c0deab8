"""An evaluation in the middle of a training: each group's accuracy, and the beta it had."""

import math
from dataclasses import replace

import pytest
import torch

from dpo_lightning.data.evaluations import HeldOut
from tests.support.models import make_model
from tests.support.ranks import on_ranks
from tests.support.steps import ids, pair, take_steps, with_logratios

# Nothing moves: log-ratios stay what they were made.
STILL = {"lr": 1e-12}


def eval_groups():
    """Log-ratios whose order is right, wrong, right in two pairs of three, and a tie.

    The third is ranked 1, 2, 3 and has 0.5, 1.0 and -1.0: the first pair alone is wrong.
    """
    model = make_model("llama")
    three = replace(pair(3), responses=(ids(5, 6), ids(7, 8, 9), ids(4)), ranks=(1, 2, 3))
    return [
        with_logratios(model, pair(1), 1.0, -0.5),
        with_logratios(model, pair(2), -1.0, 0.5),
        with_logratios(model, three, 0.5, 1.0, -1.0),
        with_logratios(model, pair(4), 0.25, 0.25),
        with_logratios(model, pair(5), 0.75, 0.5),
    ]


ACCURACIES = [1.0, 0.0, 2 / 3, 0.5, 1.0]


def train_group():
    return [with_logratios(make_model("llama"), pair(9), 0.3, 0.1)]


@pytest.mark.parametrize("micro_batch_tokens", [1000, 20, 1])
def test_each_group_has_its_own_accuracy(tmp_path, micro_batch_tokens: int):
    """In the order of the data, whatever micro-batches they were in; their mean is the metric."""
    taken = take_steps(
        tmp_path,
        train_group(),
        eval_groups=eval_groups(),
        micro_batch_tokens=micro_batch_tokens,
        **STILL,
    )
    assert taken.module.eval_accuracies.tolist() == pytest.approx(ACCURACIES)
    assert taken.values("eval/rewards/accuracies") == pytest.approx([sum(ACCURACIES) / 5])


def _evaluate_on_two(rank: int, folder) -> list[float]:
    taken = take_steps(folder / "run", train_group(), eval_groups=eval_groups(), ranks=2, **STILL)
    return taken.module.eval_accuracies.tolist()


@pytest.mark.slow
def test_each_rank_has_the_accuracies_of_all(tmp_path):
    """Five groups are shared by two ranks; each has a 0 where the other had the group."""
    for found in on_ranks(_evaluate_on_two, tmp_path, tmp_path):
        assert found == pytest.approx(ACCURACIES)


def test_an_evaluation_is_of_its_own_groups_alone(tmp_path):
    """The second one begins anew: twice the same numbers, where nothing moved in between."""
    taken = take_steps(
        tmp_path, train_group(), eval_groups=eval_groups(), eval_every=1, steps=2, **STILL
    )
    first, second = taken.values("eval/loss")
    assert first == second
    assert taken.module.eval_accuracies.tolist() == pytest.approx(ACCURACIES)


def of_beta(beta: float, margin: float) -> float:
    return math.log1p(math.exp(-beta * margin))


def test_an_evaluation_has_the_beta_of_the_step_before_it(tmp_path):
    """Beta goes from 0.2 to 1.0 in five steps, 0.2 more in each, and so in each evaluation.

    The one group has a margin of 1.5: after step k the loss is log(1 + exp(-0.2 k * 1.5)).
    """
    taken = take_steps(
        tmp_path,
        train_group(),
        eval_groups=[with_logratios(make_model("llama"), pair(1), 1.0, -0.5)],
        eval_every=1,
        steps=5,
        beta=0.2,
        plan={"end": 1.0, "schedule": "linear"},
        **STILL,
    )
    betas = [0.2, 0.4, 0.6, 0.8, 1.0]
    assert taken.values("train/beta") == pytest.approx(betas)
    assert taken.values("train/loss") == pytest.approx([of_beta(b, 0.2) for b in betas], rel=1e-5)
    assert taken.values("eval/loss") == pytest.approx([of_beta(b, 1.5) for b in betas], rel=1e-5)


def test_an_evaluation_follows_no_margins(tmp_path):
    """Beta 0.5 is adapted to the margins of a step, not to those of what is evaluated."""
    taken = take_steps(
        tmp_path,
        train_group(),
        eval_groups=[with_logratios(make_model("llama"), pair(1), 1.0, -0.5)],
        eval_every=1,
        steps=2,
        beta=0.5,
        plan={"adaptive": 0.4, "momentum": 0.75},
        **STILL,
    )
    assert taken.values("eval/loss") == pytest.approx([of_beta(0.5, 1.5)] * 2, rel=1e-5)
    # M = 0.5 * 0.2 = 0.1, M_0 = 0 and then 0.025: 0.5 (1 + 0.04) and 0.5 (1 + 0.03).
    assert taken.values("train/beta") == pytest.approx([0.52, 0.515], rel=1e-5)
    assert taken.module.margin_average.item() == pytest.approx(0.025 + 0.25 * 0.075, rel=1e-4)


def test_an_evaluation_leaves_the_gradient_alone(tmp_path):
    """A run that evaluates after each step ends with the weights of one that does not."""
    groups = [with_logratios(make_model("llama"), pair(n), 0.3, 0.1) for n in range(3)]
    runs = [
        take_steps(
            tmp_path / str(every), groups, eval_groups=eval_groups(), eval_every=every, steps=3
        )
        for every in (1, 3)
    ]
    one, other = (run.weights for run in runs)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_an_evaluation_before_the_last_sees_the_sample_of_each_set(tmp_path):
    """Accuracies are 1, 0, 2/3 in set a and 1/2, 1 in set b; rows 0, 2 and 4 are the sample.

    After step 1 a has (1 + 2/3) / 2 and b has 1; after step 2, the last, all count, and what
    selects checkpoints is still of the sample.
    """
    taken = take_steps(
        tmp_path,
        train_group(),
        eval_groups=eval_groups(),
        eval_every=1,
        held_out=HeldOut((3, 2), ("a", "b"), (0, 2, 4)),
        steps=2,
        **STILL,
    )
    whole = [(1 + 2 / 3) / 3, 0.75]
    for own, expected in (("a/", [5 / 6, whole[0]]), ("b/", [1.0, whole[1]])):
        assert taken.values(f"eval/{own}rewards/accuracies") == pytest.approx(expected)
    for name in ("loss", "rewards/accuracies", "logratios/margins"):
        assert taken.values(f"eval/{name}") == taken.values(f"eval/a/{name}")
    assert taken.module.eval_accuracies.tolist() == pytest.approx(ACCURACIES)
    sample = taken.module.sample_metrics
    assert sample["eval/rewards/accuracies"] == pytest.approx(5 / 6)
    assert sample["eval/b/rewards/accuracies"] == pytest.approx(1.0)


def test_accuracies_of_a_sample_are_not_those_of_all(tmp_path):
    """A run that ends after its evaluation of a sample has none to report by row."""
    taken = take_steps(
        tmp_path,
        train_group(),
        eval_groups=eval_groups(),
        eval_every=2,
        held_out=HeldOut((5,), sample=(1, 3)),
        steps=3,
        **STILL,
    )
    assert taken.values("eval/rewards/accuracies") == pytest.approx([0.25])
    assert taken.module.eval_accuracies is None
