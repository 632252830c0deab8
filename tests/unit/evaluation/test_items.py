"""Held-out groups one by one: numbers by hand, and the metrics of an evaluation out of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo_lightning.data.datamodule import EvalSteps
from dpo_lightning.data.evaluations import HeldOut
from dpo_lightning.evaluation.items import FITTED, measure_groups, numbered
from dpo_lightning.models.scoring import Scorer
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.reference.kinds import CachedReference
from dpo_lightning.training.batch_logps import batch_logps
from tests.support.models import make_model
from tests.support.steps import ids, pair, plain_logps, with_logratios

BETA = 0.5
SIGMOID = ObjectiveSettings(terms={"sigmoid": 1.0})
RATIOS = [(1.0, -0.5), (-1.0, 0.5), (0.5, 1.0, -1.0), (0.75, 0.25)]


def loss(margin: float) -> float:
    return math.log1p(math.exp(-BETA * margin))


@pytest.fixture(scope="module")
def measured():
    """Pairs with margins 1.5, -1.5 and 0.5, and a group of three with 0.5, 1 and -1; one weighs 2.

    In batches of two tokens each group is a micro-batch of its own, the longest one first, which is
    the third.
    """
    model = make_model("llama")
    scorer = Scorer("flat")
    three = replace(pair(3), responses=(ids(5, 6), ids(7, 8, 9), ids(4, 6)), ranks=(1, 2, 3))
    made = [pair(1), pair(2), three, replace(pair(4), weight=2.0)]
    groups = [with_logratios(model, own, *r) for own, r in zip(made, RATIOS, strict=True)]
    chosen = [plain_logps(model, own)[0].item() for own in groups]
    scorer.prepare(model)
    reference = CachedReference(rows=4, computed=0)
    found = {}
    batches = HeldOut((len(groups),)).batches(4)
    for tokens in (2, 1000):
        steps = EvalSteps(
            groups, batches, rank=0, world_size=1, micro_batch_tokens=tokens, shared=True
        )
        found[tokens] = measure_groups(
            (steps[n] for n in range(len(steps))),
            count=4,
            objective=SIGMOID,
            logps=lambda batch: batch_logps(
                batch, policy=model, reference=reference, scorer=scorer, objective=SIGMOID
            ),
            device=torch.device("cpu"),
            betas=(BETA, 0.2),
        )
    return found, chosen


@pytest.mark.parametrize("tokens", [2, 1000])
def test_values_of_each_group(measured, tokens: int):
    """The third has pairs with margins -0.5, 1.5 and 2.0, of which two are right; of its better
    response the log-ratio is 0.5, of the others it is 0 in the mean.
    """
    _, items = measured[0][tokens]
    values = items.values()
    three = sum(map(loss, (-0.5, 1.5, 2.0))) / 3
    assert values["eval/loss"] == pytest.approx([loss(1.5), loss(-1.5), three, loss(0.5)], rel=1e-5)
    assert values["eval/rewards/accuracies"] == pytest.approx([1.0, 0.0, 2 / 3, 1.0])
    assert values["eval/logratios/margins"] == pytest.approx([1.5, -1.5, 0.5, 0.5], abs=1e-5)
    assert values["eval/logratios/chosen"] == pytest.approx([1.0, -1.0, 0.5, 0.75], abs=1e-5)
    assert values["eval/logratios/rejected"] == pytest.approx([-0.5, 0.5, 0.0, 0.25], abs=1e-5)
    assert items.owner.tolist() == [0, 1, 2, 2, 2, 3]
    assert items.margins == pytest.approx([1.5, -1.5, -0.5, 1.5, 2.0, 0.5], abs=1e-5)
    assert items.share == pytest.approx([1, 1, 1 / 3, 1 / 3, 1 / 3, 1])


def test_the_fitted_losses_are_those_of_the_best_scale(measured):
    """No other scale of all margins has a smaller mean, and beta is none of it."""
    _, items = measured[0][1000]

    def mean(scale: float) -> float:
        losses = np.log1p(np.exp(-scale * items.margins)) * items.share
        return float(losses.sum()) / 4

    best = items.values()[FITTED].mean()
    assert best == pytest.approx(min(mean(scale) for scale in np.linspace(0, 3, 3001)), abs=1e-6)


@pytest.mark.parametrize("tokens", [2, 1000])
def test_groups_add_up_to_the_metrics_of_the_evaluation(measured, tokens: int):
    """The loss weighs the last group twice; rewards are of the first step's beta, 0.2."""
    found, chosen = measured
    metrics, items = found[tokens]
    losses = items.values()["eval/loss"]
    assert metrics["loss"] == pytest.approx((losses.sum() + losses[3]) / 5, rel=1e-6)
    assert metrics["logps/chosen"] == pytest.approx(sum(chosen) / 4, rel=1e-5)
    assert metrics["rewards/chosen"] == pytest.approx(0.2 * (1 - 1 + 0.5 + 0.75) / 4, abs=1e-5)
    assert items.metrics() == pytest.approx(metrics, rel=1e-5, abs=1e-6)
    some = items.metrics(np.array([0, 3]))
    assert some["loss"] == pytest.approx((loss(1.5) + 2 * loss(0.5)) / 3, rel=1e-5)
    # log of exp(0.5) + exp(-0.25), and of exp(0.375) + exp(0.125).
    log_z = [math.log(math.exp(BETA * a) + math.exp(BETA * b)) for a, b in (RATIOS[0], RATIOS[3])]
    assert some["partition/log_z"] == pytest.approx(sum(log_z) / 2, rel=1e-5)


def test_keys_are_numbered_by_their_first_places():
    assert numbered(["b", "a", "b", "c"]).tolist() == [0, 1, 0, 2]
