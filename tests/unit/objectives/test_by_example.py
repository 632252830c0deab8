"""Single responses of a micro-batch: loss, sums, metrics; what log-ratios tell about labels."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.objectives.by_example import (
    UNPAIRED_SUMS,
    Examples,
    anchor_sums,
    desirable_of,
    group_rows,
    judge_examples,
    label_gains,
    measure_examples,
    metrics_of_sums,
    sum_names,
)
from dpo_lightning.objectives.comparison import SUMS, Logps
from dpo_lightning.objectives.objective import ObjectiveSettings
from tests.support.properties import examples

KTO, BCO, DPO = (ObjectiveSettings(terms={name: 1.0}) for name in ("kto", "bco", "sigmoid"))
BETA, Z0 = 0.5, 0.4


@dataclass
class Batch:
    """A labelled response of weight 2, and a pair of weight 1."""

    group: torch.Tensor
    rank: torch.Tensor
    weight: torch.Tensor
    desirable: torch.Tensor | None


def batch() -> Batch:
    return Batch(
        group=torch.tensor([0, 1, 1]),
        rank=torch.tensor([1, 1, 2]),
        weight=torch.tensor([2.0, 1.0]),
        desirable=torch.tensor([False, True, False]),
    )


LOGPS = Logps(policy=torch.tensor([-9.0, -5.0, -4.0]), reference=torch.tensor([-7.0, -6.0, -7.0]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_a_pair_is_two_examples_and_a_label_one():
    """Log-ratios -2, 1, 3 against z0 = 0.4; weights 2, 1, 1.

    2 sigmoid(0.5 (-2 - 0.4)) + sigmoid(0.5 (0.4 - 1)) + sigmoid(0.5 (3 - 0.4)).
    """
    found = judge_examples(KTO, batch(), LOGPS, beta=BETA, anchor=torch.tensor(Z0))
    each = [sigmoid(-1.2), sigmoid(-0.3), sigmoid(1.3)]
    assert found.loss.item() == pytest.approx(2 * each[0] + each[1] + each[2], rel=1e-6)
    assert found.losses.tolist() == pytest.approx([each[0], each[1] + each[2]], rel=1e-6)
    sums = dict(zip(UNPAIRED_SUMS, found.sums.tolist(), strict=True))
    assert sums == pytest.approx(
        {
            **{"loss": found.loss.item(), "weight": 4.0, "groups": 2.0, "anchor": 0.0},
            **{"anchors": 0.0, "desirable": 1.0, "desirable_logps": -5.0},
            **{"desirable_logratios": 1.0, "undesirable": 2.0, "undesirable_logps": -13.0},
            **{"undesirable_logratios": 1.0, "gain": 0.0, "gains": 0.0},
        }
    )
    assert found.accuracies.tolist() == [0.0, 0.0]


def test_ranks_say_what_is_desirable_where_no_row_has_a_label():
    own = batch()
    own.desirable = None
    assert desirable_of(own).tolist() == [True, True, False]


def test_the_metrics_of_a_step():
    """Means over the responses of each kind, and the step's z0 once."""
    found = judge_examples(KTO, batch(), LOGPS, beta=BETA, anchor=torch.tensor(Z0))
    anchor = anchor_sums(KTO, torch.tensor(Z0), beta=BETA, like=found.sums)
    metrics = metrics_of_sums(KTO, (found.sums + anchor).tolist(), beta=BETA)
    assert metrics == pytest.approx(
        {
            "loss": found.loss.item() / 4,
            **{"rewards/desirable": 0.5, "rewards/undesirable": 0.25},
            **{"logps/desirable": -5.0, "logps/undesirable": -6.5},
            **{"logratios/desirable": 1.0, "logratios/undesirable": 0.5},
            **{"logratios/separation": 0.5, "kto/z0": 0.4},
        }
    )


def test_the_shift_of_bco_is_in_units_of_reward():
    """A mean log-ratio of 0.4 at beta 0.5 is a delta of 0.2."""
    found = judge_examples(BCO, batch(), LOGPS, beta=BETA, anchor=torch.tensor(Z0))
    anchor = anchor_sums(BCO, torch.tensor(Z0), beta=BETA, like=found.sums)
    metrics = metrics_of_sums(BCO, (found.sums + anchor).tolist(), beta=BETA)
    assert metrics["bco/delta"] == pytest.approx(0.2)
    each = [math.log1p(math.exp(x)) for x in (-1.2, -0.3, 1.3)]
    assert metrics["loss"] == pytest.approx((2 * each[0] + each[1] + each[2]) / 4, rel=1e-6)


def test_a_mean_over_nothing_is_no_number():
    own = batch()
    own.desirable = torch.tensor([False, False, False])
    found = judge_examples(KTO, own, LOGPS, beta=BETA, anchor=0.0)
    metrics = metrics_of_sums(KTO, found.sums.tolist(), beta=BETA)
    assert math.isnan(metrics["rewards/desirable"])
    assert math.isnan(metrics["logratios/separation"])
    assert metrics["logratios/undesirable"] == pytest.approx(2 / 3)


def test_the_weight_of_a_term_multiplies_its_loss():
    twice = ObjectiveSettings(terms={"kto": 2.0}, options={"undesirable_weight": 0.5})
    found = judge_examples(twice, batch(), LOGPS, beta=BETA, anchor=Z0)
    expected = 2 * (0.5 * 2 * sigmoid(-1.2) + sigmoid(-0.3) + 0.5 * sigmoid(1.3))
    assert found.loss.item() == pytest.approx(expected, rel=1e-6)


def test_sums_have_their_own_names():
    assert sum_names(KTO) == UNPAIRED_SUMS
    assert sum_names(DPO) == SUMS


# Held-out examples --------------------------------------------------------------------------------


def held_out() -> Examples:
    """The examples of above as groups 3 and 7, with mismatched log-ratios 1 and -0.2."""

    def numbers(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Examples(
        place=torch.tensor([3, 7, 7]),
        logratios=numbers(-2, 1, 3),
        policy_logps=numbers(-9, -5, -4),
        desirable=torch.tensor([False, True, False]),
        weight=numbers(2, 1, 1),
        mismatched=numbers(1, -0.2),
    )


def test_a_held_out_set_has_a_point_of_its_own():
    """z0 = (1 - 0.2) / 2 = 0.4; rewards are multiples of another beta than the loss's."""
    found = measure_examples(KTO, held_out(), beta=BETA, reward_beta=0.1, running=9.0)
    expected = (2 * sigmoid(-1.2) + sigmoid(-0.3) + sigmoid(1.3)) / 4
    assert found["loss"] == pytest.approx(expected)
    assert found["kto/z0"] == pytest.approx(0.4)
    assert found["rewards/desirable"] == pytest.approx(0.1)
    assert found["label_gain"] >= 0


def test_bco_takes_the_mean_of_the_training():
    found = measure_examples(BCO, held_out(), beta=BETA, reward_beta=BETA, running=0.4)
    each = [math.log1p(math.exp(x)) for x in (-1.2, -0.3, 1.3)]
    assert found["loss"] == pytest.approx((2 * each[0] + each[1] + each[2]) / 4)
    assert found["bco/delta"] == pytest.approx(0.2)


def test_the_metrics_of_all_are_those_of_the_groups_together():
    whole = held_out()
    own = Examples(
        place=torch.tensor([0, 1, 1]),
        logratios=whole.logratios,
        policy_logps=whole.policy_logps,
        desirable=whole.desirable,
        weight=whole.weight,
        mismatched=whole.mismatched,
    )
    rows = group_rows(KTO, own, count=2, beta=BETA, anchor=0.4)
    found = metrics_of_sums(KTO, rows.sum(0).tolist(), beta=0.1)
    assert found == pytest.approx(
        measure_examples(KTO, whole, beta=BETA, reward_beta=0.1, running=0.0)
    )


def test_a_log_ratio_that_says_nothing_has_no_gain():
    """Both kinds have the same two log-ratios."""
    ratios = torch.tensor([1.0, 2.0, 1.0, 2.0])
    gains = label_gains(ratios, torch.tensor([True, True, False, False]))
    assert gains.mean().item() == pytest.approx(0, abs=1e-9)
    # One that says the opposite has none either: the scale is not below 0.
    worse = label_gains(ratios.sort().values, torch.tensor([True, True, False, False]))
    assert worse.tolist() == pytest.approx([0] * 4)


def test_the_gain_of_two_log_ratios_by_hand():
    """At 0 one in four is desirable, at 1 three in four: the logistic meets both shares.

    ln 2 + 0.75 ln 0.75 + 0.25 ln 0.25 = 0.1308120.
    """
    ratios = torch.tensor([0.0] * 4 + [1.0] * 4)
    label = torch.tensor([True, False, False, False, True, True, True, False])
    gains = label_gains(ratios, label)
    assert gains.mean().item() == pytest.approx(0.1308120, rel=1e-4)
    assert gains[4].item() == pytest.approx(math.log(2) + math.log(0.75), rel=1e-4)
    assert gains[7].item() == pytest.approx(math.log(2) + math.log(0.25), rel=1e-4)


def test_labels_that_are_told_apart_gain_their_entropy():
    """One desirable of three: -(1/3 ln 1/3 + 2/3 ln 2/3) = 0.6365142."""
    gains = label_gains(torch.tensor([-1.0, 0.0, 5.0]), torch.tensor([False, False, True]))
    assert gains.mean().item() == pytest.approx(0.6365142, abs=1e-3)


def test_labels_of_one_kind_have_nothing_to_gain():
    assert label_gains(torch.tensor([1.0, 2.0]), torch.tensor([True, True])).tolist() == [0, 0]
    assert label_gains(torch.zeros(0), torch.zeros(0, dtype=torch.bool)).tolist() == []
    same = label_gains(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([True, False, False]))
    assert same.tolist() == pytest.approx([0] * 3)


@settings(max_examples=examples(50))
@given(
    st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=2, max_size=30),
    st.floats(0.01, 100),
    st.floats(-100, 100),
)
def test_a_gain_is_free_of_scale_and_offset(rows, scale: float, offset: float):
    """And lies between 0 and the entropy of the labels."""
    ratios = torch.tensor([ratio for ratio, _ in rows], dtype=torch.float64)
    label = torch.tensor([kind for _, kind in rows])
    gain = label_gains(ratios, label).mean().item()
    share = label.double().mean().item()
    entropy = sum(-p * math.log(p) for p in (share, 1 - share) if p)
    assert -1e-6 <= gain <= entropy + 1e-9
    other = label_gains(scale * ratios + offset, label).mean().item()
    if ratios.std() > 1e-3:
        assert other == pytest.approx(gain, abs=1e-5)
