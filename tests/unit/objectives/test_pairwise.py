"""The pairwise losses, against numbers worked out by hand."""

import math

import pytest
import torch

from dpo_lightning.objectives import PAIRWISE_LOSSES, pairwise_loss
from tests.support.losses import loss


def test_sigmoid_is_equation_7():
    """Logratios -10 + 10.1 = 0.1 and -30 + 20.1 = -9.9; margin 10; beta 0.1: -log sigmoid(1).

    -log sigmoid(1) = log(1 + e^-1) = 0.313262. The second pair is the first with the sides
    exchanged: log(1 + e) = 1.313262. Unreduced: one value per pair, in order.
    """
    values = loss(policy=[(-10, -30), (-30, -10)], reference=[(-10.1, -20.1), (-20.1, -10.1)])
    assert values.shape == (2,)
    assert values.tolist() == pytest.approx([0.313262, 1.313262], abs=1e-5)


def test_label_smoothing_mixes_in_the_flipped_label():
    """0.9 * log(1 + e^-1) + 0.1 * log(1 + e) = 0.9 * 0.313262 + 0.1 * 1.313262 = 0.413262."""
    pair = {"policy": [(-10, -30)], "reference": [(-10.1, -20.1)]}
    assert loss(**pair, label_smoothing=0.1).item() == pytest.approx(0.413262, abs=1e-5)
    assert loss(**pair, label_smoothing=0.0).item() == loss(**pair).item()


def test_label_smoothing_stops_pushing_where_the_label_is_that_sure():
    """The gradient of (1-e) log(1+e^-m) + e log(1+e^m) is sigmoid(m) - (1-e): 0 at logit(1-e).

    With e = 0.2 that is m = log 4, so beta * margin with beta 0.5 at margin 2 log 4.
    """
    policy = torch.tensor([2 * math.log(4), 0.0], dtype=torch.float64, requires_grad=True)
    value = pairwise_loss(
        "sigmoid",
        policy_chosen_logps=policy[:1],
        policy_rejected_logps=policy[1:],
        reference_chosen_logps=torch.zeros(1, dtype=torch.float64),
        reference_rejected_logps=torch.zeros(1, dtype=torch.float64),
        chosen_lengths=torch.ones(1),
        rejected_lengths=torch.ones(1),
        beta=0.5,
        label_smoothing=0.2,
    )
    value.sum().backward()
    assert policy.grad is not None
    assert policy.grad.abs().max() < 1e-12


def test_a_policy_that_is_its_reference_loses_ln_2():
    logps = [(-12.5, -40.25), (-3.0, -700.0)]
    values = loss(policy=logps, reference=logps, beta=0.37)
    assert values.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)


def test_without_a_reference_it_is_the_founding_formula():
    """Z = e^(0.5 * -2) + e^(0.5 * -3) = 0.367879 + 0.223130 = 0.591009.

    -log(0.367879 / 0.591009) = 0.474077.
    """
    value = loss(policy=[(-2, -3)], beta=0.5)
    assert value.item() == pytest.approx(0.474077, abs=1e-5)
    z = math.exp(0.5 * -2) + math.exp(0.5 * -3)
    assert value.item() == pytest.approx(-math.log(math.exp(0.5 * -2) / z), abs=1e-6)


def test_sft_is_the_chosen_response_per_token():
    """12 / 4 = 3 and 30 / 5 = 6, whatever beta and the rejected side are."""
    values = loss("sft", policy=[(-12, -1), (-30, -2)], lengths=((4, 9), (5, 1)), beta=7.0)
    assert values.tolist() == [3.0, 6.0]
    alone = pairwise_loss(
        "sft",
        policy_chosen_logps=torch.tensor([-12.0]),
        policy_rejected_logps=None,
        reference_chosen_logps=None,
        reference_rejected_logps=None,
        chosen_lengths=torch.tensor([4]),
        rejected_lengths=None,
        beta=0.1,
    )
    assert alone.tolist() == [3.0]


@pytest.mark.parametrize("reference", [None, [(-3.5, -2.0), (-1.0, -4.0)]])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3}])
def test_sigmoid_gradients(reference, options):
    policy = torch.tensor([(-3.0, -5.0), (-2.0, -1.5)], dtype=torch.float64, requires_grad=True)
    sides = None if reference is None else torch.tensor(reference, dtype=torch.float64)

    def of(logps):
        return pairwise_loss(
            "sigmoid",
            policy_chosen_logps=logps[:, 0],
            policy_rejected_logps=logps[:, 1],
            reference_chosen_logps=None if sides is None else sides[:, 0],
            reference_rejected_logps=None if sides is None else sides[:, 1],
            chosen_lengths=torch.ones(2),
            rejected_lengths=torch.ones(2),
            beta=0.7,
            **options,
        )

    assert torch.autograd.gradcheck(of, policy)


def test_long_responses_stay_finite_and_keep_their_margin():
    """At -1e6 a float32 is good to 1/16, and the logratios 0.5 and -0.5 are exact.

    beta 0.1 and margin 1: log(1 + e^-0.1) = 0.644397. With a margin of -1e6 the loss is linear:
    0.1 * 1e6 = 1e5.
    """
    close = loss(policy=[(-1e6, -5e5)], reference=[(-1e6 - 0.5, -5e5 + 0.5)])
    assert close.item() == pytest.approx(0.644397, abs=1e-5)
    far = loss(policy=[(-1e6, 0.0), (0.0, -1e6)], reference=[(0.0, 0.0), (0.0, 0.0)])
    assert far.tolist() == pytest.approx([1e5, 0.0])


def test_unequal_lengths_do_not_round_the_margin_away():
    """Logratios 0.5 of a long chosen response and -0.3 of a short rejected one: margin 0.8.

    Beta 1: log(1 + e^-0.8) = 0.371101. Chosen minus rejected first would round to 1/16: 0.8125.
    """
    value = loss(policy=[(-1e6, -3.3)], reference=[(-1e6 - 0.5, -3.0)], beta=1.0)
    assert value.item() == pytest.approx(0.371101, abs=1e-5)


def test_half_precision_is_computed_in_float32_and_float64_stays():
    pair = {"policy": [(-10, -30)], "reference": [(-10.1, -20.1)]}
    assert loss(**pair, dtype=torch.bfloat16).dtype == torch.float32
    assert loss(**pair, dtype=torch.float64).dtype == torch.float64


def test_the_registry_says_what_a_loss_needs():
    assert PAIRWISE_LOSSES["sigmoid"].uses_reference
    assert PAIRWISE_LOSSES["sigmoid"].uses_rejected
    assert PAIRWISE_LOSSES["sigmoid"].options == {"label_smoothing": 0.0}
    assert not PAIRWISE_LOSSES["sft"].uses_reference
    assert not PAIRWISE_LOSSES["sft"].uses_rejected
    assert PAIRWISE_LOSSES["sft"].options == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "sigmod"}, "'sigmod': choose one of sigmoid, .*sft"),
        ({"smoothing": 0.1}, "no option 'smoothing': its options are label_smoothing"),
        ({"name": "sft", "label_smoothing": 0.1}, "its options are none"),
        ({"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"beta": 0.0}, "beta is 0.0"),
        ({"beta": math.nan}, "beta is nan"),
    ],
)
def test_a_wrong_call_is_answered_with_the_choices(changes, words):
    with pytest.raises(ValueError, match=words):
        loss(**{"policy": [(-1, -2)], **changes})


def one_pair(**changes):
    """A correct call on one pair without a reference, but for `changes`."""
    call = {
        "policy_chosen_logps": torch.tensor([-1.0]),
        "policy_rejected_logps": torch.tensor([-2.0]),
        "reference_chosen_logps": None,
        "reference_rejected_logps": None,
        "chosen_lengths": torch.tensor([1]),
        "rejected_lengths": torch.tensor([1]),
        "beta": 0.1,
    }
    return pairwise_loss("sigmoid", **{**call, **changes})


def test_half_a_reference_is_refused():
    with pytest.raises(ValueError, match="one side alone"):
        one_pair(reference_chosen_logps=torch.tensor([-1.0]))


def test_a_comparison_without_the_rejected_side_is_refused():
    with pytest.raises(ValueError, match="the rejected one is None"):
        one_pair(policy_rejected_logps=None)


def test_shapes_that_would_broadcast_are_refused():
    with pytest.raises(ValueError, match=r"policy_rejected_logps has shape \(1, 1\)"):
        one_pair(policy_rejected_logps=torch.tensor([[-2.0]]))


def test_logps_per_token_are_refused():
    """(B, T) on every side would give a loss per token and no word about it."""
    with pytest.raises(ValueError, match=r"both are \(B,\)"):
        one_pair(
            policy_chosen_logps=torch.zeros(1, 3),
            policy_rejected_logps=torch.zeros(1, 3),
            chosen_lengths=torch.ones(1, 3),
            rejected_lengths=torch.ones(1, 3),
        )
