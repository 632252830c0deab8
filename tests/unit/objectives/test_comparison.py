"""Loss and metric sums of groups, against numbers worked out by hand."""

import math

import pytest
import torch

from dpo_lightning.objectives.comparison import (
    SUMS,
    Tokens,
    metrics_from_sums,
)
from dpo_lightning.objectives.objective import ObjectiveSettings
from tests.support.compared import compare_tensors

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
    objective = ObjectiveSettings(terms={loss: 1.0}, options=changes.pop("options", {}))
    comparison = compare_tensors(objective, **(BATCH | changes))
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


def test_the_added_likelihood_counts_each_best_response_once():
    """RPO by hand: sigmoid plus 0.4 times the nats per token of the best, two of them tied.

    Group 1 has the best responses 1 and 2, of 1/2 and 2/3 nats per token, mean 7/12, and the pairs
    (1, 3) and (2, 3) with margins 1.5 and 1: the mean of log(1 + e^-0.75) = 0.386871 and
    log(1 + e^-0.5) = 0.474077 is 0.430474. Group 2 has 7/5 nats per token and margin 0: ln 2. Its
    weight is 3.
    """
    tied = {
        "rank": torch.tensor([1, 1, 2, 1, 2]),
        "chosen": torch.tensor([0, 1, 3]),
        "rejected": torch.tensor([2, 2, 4]),
    }
    objective = ObjectiveSettings(terms={"sigmoid": 1.0}, rpo_alpha=0.4)
    found = compare_tensors(objective, **(BATCH | tied))
    first, second = 0.430474 + 0.4 * 7 / 12, math.log(2) + 0.4 * 7 / 5
    assert found.losses.tolist() == pytest.approx([first, second], abs=1e-5)
    assert found.loss.item() == pytest.approx(first + 3 * second, abs=1e-5)


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


def test_shares_of_pairs_weigh_them():
    """A pair that is right with probability 0.8: 0.8 log(1 + e^-m) + 0.2 log(1 + e^m), m = 0.25.

    log(1 + e^-0.25) = 0.575939 and log(1 + e^0.25) = 0.825939. The agreement is 0.8 as well.
    """
    both_ways = {
        "group": torch.tensor([0, 0]), "rank": torch.tensor([1, 2]), "weight": torch.ones(1),
        "policy_logps": torch.tensor([-1.0, -2.0]), "lengths": torch.tensor([2, 3]),
        "reference_logps": torch.tensor([-1.5, -2.0]), "chosen": torch.tensor([0, 1]),
        "rejected": torch.tensor([1, 0]), "pair_share": torch.tensor([0.8, 0.2]),
    }  # fmt: skip
    loss, sums = compare(**both_ways)
    assert loss == pytest.approx(0.8 * 0.575939 + 0.2 * 0.825939, abs=1e-6)
    assert sums["accuracy"] == pytest.approx(0.8)


def test_the_share_of_the_best_response():
    """Scores are (0.25, 0, -0.5) and (-0.5, -0.5): the best have shares 0.443871... and 1/2."""
    _, sums = compare()
    first = math.exp(0.25) / (math.exp(0.25) + 1 + math.exp(-0.5))
    assert sums["best_share"] == pytest.approx(first + 0.5, abs=1e-6)
    metrics = metrics_from_sums(list(sums.values()), beta=BETA)
    assert metrics["partition/p_chosen"] == pytest.approx((first + 0.5) / 2, abs=1e-6)


# Two responses of two and four tokens.
PAIR = {
    "lengths": torch.tensor([2, 4]), "group": torch.tensor([0, 0]), "rank": torch.tensor([1, 2]),
    "weight": torch.ones(1), "chosen": torch.tensor([0]), "rejected": torch.tensor([1]),
    "policy_logps": torch.tensor([-3.0, -10.0]), "reference_logps": torch.tensor([-3.5, -9.0]),
}  # fmt: skip
TOKENS = {
    "policy_logps": torch.tensor([-1.0, -2.0, -1.0, -2.0, -3.0, -4.0]),
    "reference_logps": torch.tensor([-1.5, -2.0, -2.0, -2.0, -2.5, -2.5]),
    "collisions": torch.tensor([-0.5, -1.5, -0.5, -1.0, -2.0, -3.0]),
    "response": torch.tensor([0, 0, 1, 1, 1, 1]),
}


def compare_tokens(**settings):
    objective = ObjectiveSettings(terms={"sigmoid": 1.0}, **settings)
    return compare_tensors(objective, **PAIR, beta=BETA, tokens=Tokens(**TOKENS)).loss.item()


def test_tokens_beyond_the_shorter_response_count_less():
    """LD-DPO with alpha 0.5, by hand.

    The chosen response has the shorter length, 2, and stays whole: logratio -3 + 3.5 = 0.5. Of the
    rejected one the first two tokens count whole and the others half: policy -3 - 0.5 * 7 = -6.5,
    reference -4 - 0.5 * 5 = -6.5, logratio 0. So the margin is 0.5 and the loss log(1 + e^-0.25);
    with alpha 1 the logratio is -10 + 9 = -1, the margin 1.5, the loss log(1 + e^-0.75).
    """
    assert compare_tokens(ld_alpha=0.5) == pytest.approx(0.575939, abs=1e-6)
    assert compare_tokens() == pytest.approx(0.386871, abs=1e-6)
    # With alpha 0 only what both have is left: -3 - -4 = 1 for the rejected one.
    assert compare_tokens(ld_alpha=0.0) == pytest.approx(math.log1p(math.exp(0.25)), abs=1e-6)


def test_pairs_are_weighted_by_their_likelihood():
    """WPO by hand: means of log p - log sum p^2 are (-0.5 - 0.5) / 2 and (-0.5 - 1 - 1 - 1) / 4.

    The weight is exp(-0.5) * exp(-0.875) and has no gradient.
    """
    expected = math.exp(-0.5 - 0.875) * 0.386871
    assert compare_tokens(wpo=True) == pytest.approx(expected, abs=1e-6)
    policy = TOKENS["policy_logps"].clone().requires_grad_()
    objective = ObjectiveSettings(terms={"sigmoid": 1.0}, wpo=True)
    tokens = Tokens(**(TOKENS | {"policy_logps": policy}))
    loss = compare_tensors(objective, **PAIR, beta=BETA, tokens=tokens).loss
    assert not loss.requires_grad  # the sums are given apart here, the weights are constants


def test_listwise_terms_and_pairwise_ones_add_up():
    """Group 1 has the scores (0.25, 0, -0.5), group 2 (-0.5, -0.5): -log of the best's share."""
    softmax, _ = compare("softmax")
    first = -math.log(math.exp(0.25) / (math.exp(0.25) + 1 + math.exp(-0.5)))
    assert softmax == pytest.approx(first + 3 * math.log(2), abs=1e-5)
    sigmoid, _ = compare("sigmoid")
    objective = ObjectiveSettings(terms={"softmax": 0.25, "sigmoid": 2.0})
    both = compare_tensors(objective, **BATCH).loss.item()
    assert both == pytest.approx(0.25 * softmax + 2 * sigmoid, abs=1e-5)
