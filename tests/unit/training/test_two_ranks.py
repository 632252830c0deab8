"""Two ranks that share a step give the numbers of one process."""

import numpy as np
import pytest

from tests.support.models import make_model
from tests.support.ranks import on_ranks
from tests.support.steps import pair, take_steps, with_logratios

# Seven groups of unequal weights: steps of four and of three.
RATIOS = [(1.0, -0.5), (0.4, -0.3), (-0.4, 0.3), (0.1, 0.2), (2.0, 1.0), (-1.0, 0.0), (0.3, 0.2)]
COMMON = {"steps": 2, "batch_size": 4, "beta": 0.5, "lr": 1e-3, "max_grad_norm": 0.2}


def groups():
    model = make_model("llama")
    return [
        with_logratios(model, pair(number, weight=1.0 + number % 3), *ratios)
        for number, ratios in enumerate(RATIOS)
    ]


def eval_groups():
    model = make_model("llama")
    return [with_logratios(model, pair(10 + n), 0.2 * n, -0.3) for n in range(3)]


def numbers(taken) -> dict:
    names = ("train/loss", "train/grad_norm", "train/logps/chosen", "eval/loss")
    return {
        "weights": {name: weight.numpy() for name, weight in taken.weights.items()},
        "metrics": {name: taken.values(name) for name in names},
        "moments": [moment.numpy() for moment in taken.moments["exp_avg"]],
    }


def _on_two(rank: int, folder, how: dict) -> dict:
    taken = take_steps(
        folder / "run", groups(), eval_groups=eval_groups(), ranks=2, **COMMON, **how
    )
    return numbers(taken)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"micro_batch_tokens": 10},  # each group a micro-batch
        # Three groups in micro-batches of one: the rank with one of them repeats a group in vain.
        {"micro_batch_tokens": 10, "equal_counts": True},
    ],
    ids=["whole", "micro-batches", "fillers"],
)
def test_two_ranks_equal_one_process(tmp_path, how: dict):
    """Losses, gradient norms, moments, weights and evaluation, on both ranks alike."""
    one, other = on_ranks(_on_two, tmp_path, tmp_path, how)
    alone = numbers(take_steps(tmp_path / "one", groups(), eval_groups=eval_groups(), **COMMON))
    for name, values in alone["metrics"].items():
        assert one["metrics"][name] == pytest.approx(values, rel=1e-5), name
    for name, weight in alone["weights"].items():
        np.testing.assert_array_equal(one["weights"][name], other["weights"][name])
        np.testing.assert_allclose(one["weights"][name], weight, rtol=1e-4, atol=1e-5)
    for found, moment in zip(one["moments"], alone["moments"], strict=True):
        assert np.linalg.norm(found - moment) <= 1e-4 * np.linalg.norm(moment)
