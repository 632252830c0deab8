"""Loss and metric sums of groups, against numbers worked out by hand."""

import math

import pytest
import torch

from dpo_lightning.objectives.comparison import SUMS, compare_responses, metrics_from_sums

BETA = 0.5
BATCH = {
    "policy_logps": torch.tensor([-1.0, -2.0, -4.0, -7.0, -9.0]),
    "reference_logps": torch.tensor([-1.5, -2.0, -3.0, -6.0, -8.0]),
    "lengths": torch.tensor([2, 3, 4, 5, 6]),
    "group": torch.tensor([0, 0, 0, 1, 1]),
    "rank": torch.tensor([1, 2, 2, 1, 2]),
    "weight": torch.tensor([1.0, 3.0]),
    "chosen": torch.tensor([0, 0, 3]),
    "rejected": torch.tensor([1, 2, 4]),
    "beta": BETA,
}


def compare(loss: str = "sigmoid", **changes):
    options = changes.pop("options", {})
    comparison = compare_responses(loss, **(BATCH | changes), options=options)
    return comparison.loss.item(), dict(zip(SUMS, comparison.sums.tolist(), strict=True))


def test_a_group_of_three_with_a_tie_and_a_heavier_pair():
    """Logratios are (0.5, 0, -1) and (-1, -1).

    Group 1 has the pairs (1, 2) and (1, 3), margins 0.5 and 1.5, both right: its loss is the mean
    of log(1 + e^-0.25) = 0.575939 and log(1 + e^-0.75) = 0.386871, that is 0.481405. Group 2 has
    margin 0: ln 2, and a tie counts one half. Weights are 1 and 3.
    """
    loss, sums = compare()
    assert loss == pytest.approx(0.481405 + 3 * math.log(2), abs=1e-5)
    assert sums["loss"] == pytest.approx(loss)
    assert sums["weight"] == 4
    assert sums["groups"] == 2
    assert sums["accuracy"] == pytest.approx(1 + 0.5)
    first = math.log(math.exp(0.25) + 1 + math.exp(-0.5))
    assert sums["log_z"] == pytest.approx(first + math.log(2) - 0.5, abs=1e-6)
    assert (sums["best"], sums["rest"]) == (2, 3)
    assert sums["best_logps"] == pytest.approx(-8)
    assert sums["rest_logratios"] == pytest.approx(0 - 1 - 1)


def test_metrics_are_ratios_of_sums():
    """Best logratios average (0.5 - 1) / 2 = -0.25, the others (0 - 1 - 1) / 3 = -2/3."""
    _, sums = compare()
    metrics = metrics_from_sums(list(sums.values()), beta=BETA)
    assert metrics["loss"] == pytest.approx((0.481405 + 3 * math.log(2)) / 4, abs=1e-5)
    assert metrics["logratios/chosen"] == pytest.approx(-0.25)
    assert metrics["logratios/rejected"] == pytest.approx(-2 / 3)
    assert metrics["rewards/margins"] == pytest.approx(BETA * (2 / 3 - 0.25))
    assert metrics["rewards/accuracies"] == pytest.approx(0.75)
    assert metrics["logps/rejected"] == pytest.approx((-2 - 4 - 9) / 3)
    nothing = metrics_from_sums([0.0] * len(SUMS), beta=BETA)
    assert all(math.isnan(value) for value in nothing.values())


def test_without_a_reference_the_logratio_is_the_logp():
    """Margins are 1, 3 and 2: log(1 + e^-0.5), log(1 + e^-1.5) and log(1 + e^-1)."""
    loss, sums = compare(reference_logps=None)
    first = (math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1.5))) / 2
    assert loss == pytest.approx(first + 3 * math.log1p(math.exp(-1)), abs=1e-5)
    assert sums["accuracy"] == pytest.approx(2)
    assert sums["best_logratios"] == sums["best_logps"]


def test_sft_counts_each_best_response_once():
    """1/2 and 7/5 nats per token; two best responses of one group share its weight."""
    loss, _ = compare("sft", reference_logps=None)
    assert loss == pytest.approx(1 / 2 + 3 * 7 / 5, abs=1e-6)
    tied = {
        "rank": torch.tensor([1, 1, 2, 1, 2]),
        "chosen": torch.tensor([0, 1, 3]),
        "rejected": torch.tensor([2, 2, 4]),
    }
    loss, _ = compare("sft", reference_logps=None, **tied)
    assert loss == pytest.approx((1 / 2 + 2 / 3) / 2 + 3 * 7 / 5, abs=1e-6)


def test_sums_of_parts_are_the_sums_of_the_whole():
    whole = torch.tensor(list(compare()[1].values()))
    parts = torch.zeros_like(whole)
    for g, rows in ((0, [0, 1, 2]), (1, [3, 4])):
        index = torch.tensor(rows)
        pairs = [i for i, c in enumerate(BATCH["chosen"].tolist()) if c in rows]
        part = {name: BATCH[name][index] for name in ("policy_logps", "reference_logps", "lengths")}
        part |= {"rank": BATCH["rank"][index], "group": torch.zeros(len(rows), dtype=torch.int64)}
        part |= {"weight": BATCH["weight"][[g]]}
        part |= {name: BATCH[name][pairs] - rows[0] for name in ("chosen", "rejected")}
        parts += torch.tensor(list(compare(**part)[1].values()))
    torch.testing.assert_close(parts, whole)
