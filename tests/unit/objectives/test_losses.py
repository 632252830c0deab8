"""Every registered loss on pairs: values by hand, gradients, extremes, and what holds of each.

All tables are checked against the registry: a loss that is not in them fails.
"""

import functools
import itertools
import math
import zlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.objectives import PAIRWISE_LOSSES, pairwise_loss
from dpo_lightning.objectives.registry import DIVERGENCES
from tests.support.losses import loss
from tests.support.properties import examples

# Tests of plugins may have registered others in the same process.
LOSSES = [
    name
    for name, entry in PAIRWISE_LOSSES.items()
    if entry.fn.__module__ == "dpo_lightning.objectives.losses"
]
MARGIN_LOSSES = [name for name in LOSSES if PAIRWISE_LOSSES[name].on_margin]
COUPLING = [name for name in LOSSES if PAIRWISE_LOSSES[name].couples]
ALONE = [name for name in LOSSES if name not in COUPLING]

# Options at values that are not their defaults, within every loss's own bounds.
OTHER_VALUES = {
    "label_smoothing": 0.2,
    "discopop_tau": 0.5,
    "gamma": 1.25,
    "cpo_alpha": 0.3,
    "delta": 2.5,
}
ALPHAS = (-0.5, 0.5, 2.0)
FLIP = 0.2

every_loss = pytest.mark.parametrize("name", LOSSES)
hypothesis_settings = settings(max_examples=examples(25))


def other_options(name):
    return {option: OTHER_VALUES[option] for option in PAIRWISE_LOSSES[name].options}


def divergences_of(name):
    """Arguments for each f-divergence that a loss can be used under."""
    if name not in MARGIN_LOSSES:
        return [{}]
    others = [{"f_divergence": n} for n in DIVERGENCES if n != "alpha_divergence"]
    return [*others, *({"f_divergence": "alpha_divergence", "f_alpha": a} for a in ALPHAS)]


def call(name, policy, reference, lengths, *, beta=0.1, **options):
    """Calls a loss on tensors of (B, 2), chosen and rejected; a reference of None is none."""
    return pairwise_loss(
        name,
        policy_chosen_logps=policy[:, 0],
        policy_rejected_logps=policy[:, 1],
        reference_chosen_logps=None if reference is None else reference[:, 0],
        reference_rejected_logps=None if reference is None else reference[:, 1],
        chosen_lengths=lengths[:, 0],
        rejected_lengths=lengths[:, 1],
        beta=beta,
        **options,
    )


def gradient(name, policy, reference, lengths, **options):
    """Gradient of the sum over the batch with respect to the policy's logps, (B, 2)."""
    policy = policy.detach().clone().requires_grad_()
    call(name, policy, reference, lengths, **options).sum().backward()
    return torch.zeros_like(policy) if policy.grad is None else policy.grad


def float64(rows):
    return torch.tensor(rows, dtype=torch.float64)


def smaller(value):
    """-log sigmoid."""
    return math.log1p(math.exp(-value))


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


# Values by hand ----------------------------------------------------------------------------------

# Logratios -10 + 10.1 = 0.1 of the chosen, -30 + 20.1 = -9.9 of the rejected response; margin 10.
# Beta 0.1: rewards 0.01 and -0.99, and 1 between them. Per token 0.1 / 4 + 9.9 / 10 = 1.015.
PAIR = {"policy": [(-10, -30)], "reference": [(-10.1, -20.1)], "lengths": ((4, 10),)}
# The sides exchanged: margin -10.
FLIPPED = {"policy": [(-30, -10)], "reference": [(-20.1, -10.1)], "lengths": ((10, 4),)}


def assert_value(name, pair, expected, **options):
    expected = expected if isinstance(expected, list) else [expected]
    values = loss(name, **pair, dtype=torch.float64, **options)
    assert values.tolist() == pytest.approx(expected, abs=1e-6)


def test_every_loss_has_a_value_by_hand():
    missing = [name for name in LOSSES if f"test_value_of_{name}" not in globals()]
    assert not missing


def test_value_of_sigmoid():
    """-log sigmoid(1) = log(1 + e^-1) = log 1.3678794 = 0.3132617; flipped log(1 + e) = 1.3132617.

    Smoothed by 0.1: 0.9 * 0.3132617 + 0.1 * 1.3132617 = 0.2819355 + 0.1313262 = 0.4132617.
    """
    assert_value("sigmoid", PAIR, 0.3132617)
    assert_value("sigmoid", FLIPPED, 1.3132617)
    assert_value("sigmoid", PAIR, 0.4132617, label_smoothing=0.1)


def test_value_of_hinge():
    """1 - 0.05 * 10 = 0.5; flipped 1 + 0.05 * 10 = 1.5; with beta 0.25, 1 - 2.5 < 0 is 0."""
    assert_value("hinge", PAIR, 0.5, beta=0.05)
    assert_value("hinge", FLIPPED, 1.5, beta=0.05)
    assert_value("hinge", PAIR, 0.0, beta=0.25)


def test_value_of_ipo():
    """1 / (2 * 0.1) = 5: (1.015 - 5)^2 = 3.985^2 = 15.880225; flipped 6.015^2 = 36.180225."""
    assert_value("ipo", PAIR, 15.880225)
    assert_value("ipo", FLIPPED, 36.180225)


def test_value_of_ipo_sum():
    """(10 - 5)^2 = 25; flipped (-10 - 5)^2 = 225."""
    assert_value("ipo_sum", PAIR, 25.0)
    assert_value("ipo_sum", FLIPPED, 225.0)


def test_value_of_robust():
    """(0.9 * 0.3132617 - 0.1 * 1.3132617) / 0.8 = (0.2819355 - 0.1313262) / 0.8 = 0.1882617.

    Flipped (0.9 * 1.3132617 - 0.1 * 0.3132617) / 0.8 = 1.1506093 / 0.8 = 1.4382617. No flips, no
    correction: 0.3132617.
    """
    assert_value("robust", PAIR, 0.1882617, label_smoothing=0.1)
    assert_value("robust", FLIPPED, 1.4382617, label_smoothing=0.1)
    assert_value("robust", PAIR, 0.3132617)


def test_value_of_exo_pair():
    """q = sigmoid(1) = 0.7310586 and 0.2689414, their logs -0.3132617 and -1.3132617.

    e = 0.1: 0.7310586 * (-0.3132617 - log 0.9) + 0.2689414 * (-1.3132617 - log 0.1)
    = 0.7310586 * -0.2079012 + 0.2689414 * 0.9893234 = -0.1519880 + 0.2660700 = 0.1140821.
    e = 0.001: 0.7310586 * (-0.3132617 + 0.0010005) + 0.2689414 * (-1.3132617 + 6.9077553)
    = 0.7310586 * -0.3122612 + 0.2689414 * 5.5944936 = -0.2282812 + 1.5045910 = 1.2763098.
    """
    assert_value("exo_pair", PAIR, 0.1140821, label_smoothing=0.1)
    assert_value("exo_pair", PAIR, 1.2763098)


def test_value_of_discopop():
    """tau 0.5: sigmoid(1 / 0.5) = 0.8807971 of e^-1 = 0.3678794, the rest of 0.3132617.

    0.1192029 * 0.3132617 + 0.8807971 * 0.3678794 = 0.0373417 + 0.3240271 = 0.3613688. Flipped:
    0.8807971 * 1.3132617 + 0.1192029 * 2.7182818 = 1.1567171 + 0.3240271 = 1.4807442. At the
    default 0.05 sigmoid(20) is 1 - 2e-9: 0.3678794, and flipped the logistic one, 1.3132617.
    """
    assert_value("discopop", PAIR, 0.3613688, discopop_tau=0.5)
    assert_value("discopop", FLIPPED, 1.4807442, discopop_tau=0.5)
    assert_value("discopop", PAIR, 0.3678794)
    assert_value("discopop", FLIPPED, 1.3132617)


def test_value_of_sigmoid_norm():
    """0.1 * 1.015 = 0.1015, e^-0.1015 = 0.9034812: log 1.9034812 = 0.6436844.

    Flipped it is 0.1015 more: 0.7451844.
    """
    assert_value("sigmoid_norm", PAIR, 0.6436844)
    assert_value("sigmoid_norm", FLIPPED, 0.7451844)


def test_value_of_odpo():
    """-log sigmoid(1 - 0.5) = log(1 + e^-0.5) = log 1.6065307 = 0.4740770; without it 0.3132617."""
    assert_value("odpo", PAIR, 0.4740770, target_margin=float64([0.5]))
    assert_value("odpo", PAIR, 0.3132617)


def test_value_of_nca_pair():
    """Rewards 0.01 and -0.99: -log sigmoid of 0.01 is 0.6881597, of -0.01 0.6981597, of 0.99
    0.3159609. 0.6881597 + 0.5 * 0.6981597 + 0.5 * 0.3159609 = 1.1952200.
    """
    assert_value("nca_pair", PAIR, 1.1952200)


def test_value_of_bco_pair():
    """-log sigmoid of 0.01 and of 0.99: 0.6881597 + 0.3159609 = 1.0041206."""
    assert_value("bco_pair", PAIR, 1.0041206)


def test_value_of_sppo_hard():
    """(0.1 - 5)^2 + (-9.9 + 5)^2 = 24.01 + 24.01 = 48.02; flipped 14.9^2 + 5.1^2 = 248.02."""
    assert_value("sppo_hard", PAIR, 48.02)
    assert_value("sppo_hard", FLIPPED, 248.02)


def test_value_of_apo_zero():
    """sigmoid(-0.01) + sigmoid(-0.99) = 0.4975000 + 0.2709121 = 0.7684121."""
    assert_value("apo_zero", PAIR, 0.7684121)


def test_value_of_apo_down():
    """sigmoid(0.01) + sigmoid(-1) = 0.5025000 + 0.2689414 = 0.7714414."""
    assert_value("apo_down", PAIR, 0.7714414)


def test_value_of_kto_pair():
    """Logratios (0.1, -9.9) and (3, 5): z+ = 3.1 / 2 = 1.55, z- = -4.9 / 2 < 0, so 0.

    (sigmoid(0.1 * (0 - 0.1)) + sigmoid(0.1 * (-9.9 - 1.55))) / 2 = (sigmoid(-0.01) +
    sigmoid(-1.145)) / 2 = (0.4975000 + 0.2414035) / 2 = 0.3694518; of the second pair
    (sigmoid(-0.3) + sigmoid(0.345)) / 2 = (0.4255575 + 0.5854046) / 2 = 0.5054810.

    With 20.1 for 5, z- = 10.2 / 2 = 5.1: (sigmoid(0.5) + sigmoid(-1.145)) / 2 = (0.6224593 +
    0.2414035) / 2 = 0.4319314, (sigmoid(0.21) + sigmoid(1.855)) / 2 = (0.5523079 + 0.8647131) / 2
    = 0.7085105.
    """
    pairs = {
        "policy": [(-10, -30), (-5, -7)],
        "reference": [(-10.1, -20.1), (-8, -12)],
        "lengths": ((4, 10), (2, 3)),
    }
    assert_value("kto_pair", pairs, [0.3694518, 0.5054810])
    pairs["reference"][1] = (-8, -27.1)
    assert_value("kto_pair", pairs, [0.4319314, 0.7085105])


def test_value_of_aot():
    """The policy's margins are 20 and 2, the reference's 10 and 20: sorted, 2 - 10 and 20 - 20.

    The second pair has the policy's 2: log(1 + e^0.8) = 1.1711007. The first has its 20: log 2 =
    0.6931472. (Pair by pair it would be margins of 10 and -18.) Smoothed by 0.2, the second is
    1.1711007 - 0.2 * 0.8 = 1.0111007.
    """
    pairs = {
        "policy": [(-10, -30), (-5, -7)],
        "reference": [(-10.1, -20.1), (-8, -28)],
        "lengths": ((4, 10), (2, 3)),
    }
    assert_value("aot", pairs, [0.6931472, 1.1711007])
    assert_value("aot", pairs, [0.6931472, 1.0111007], label_smoothing=0.2)


def test_value_of_aot_unpaired():
    """Chosen logratios 0.1 and -1, rejected -9.9 and 5: sorted, -1 + 9.9 = 8.9 and 0.1 - 5 = -4.9.

    The second pair has the chosen -1: log(1 + e^-0.89) = 0.3440547; the first log(1 + e^0.49) =
    0.9678642. (Pair by pair it would be margins of 10 and -6.) Smoothed by 0.2: 0.3440547 + 0.2 *
    0.89 = 0.5220547 and 0.9678642 - 0.2 * 0.49 = 0.8698642.
    """
    pairs = {
        "policy": [(-10, -30), (-5, -7)],
        "reference": [(-10.1, -20.1), (-4, -12)],
        "lengths": ((4, 10), (2, 3)),
    }
    assert_value("aot_unpaired", pairs, [0.9678642, 0.3440547])
    assert_value("aot_unpaired", pairs, [0.8698642, 0.5220547], label_smoothing=0.2)


def test_value_of_sft():
    """10 / 4 = 2.5; of 30 nats on 10 tokens 3."""
    assert_value("sft", PAIR, 2.5)
    assert_value("sft", FLIPPED, 3.0)


def test_value_of_simpo():
    """Per token -10 / 4 = -2.5 and -30 / 10 = -3. Beta 2: 2 * 0.5 - 0.5 = 0.5, log(1 + e^-0.5) =
    0.4740770. With gamma 0 it is log(1 + e^-1) = 0.3132617.
    """
    assert_value("simpo", PAIR, 0.4740770, beta=2.0)
    assert_value("simpo", PAIR, 0.3132617, beta=2.0, gamma=0.0)


def test_value_of_orpo():
    """Odds of e^-2.5 = 0.0820850 are 0.0820850 / 0.9179150 = 0.0894255, of e^-3 = 0.0497871
    0.0497871 / 0.9502129 = 0.0523957.

    -log sigmoid(log r) = log(1 + 1 / r), 1 / r = 0.0523957 / 0.0894255 = 0.5859146: 0.4611613. The
    chosen response costs 2.5 per token: 2.5 + 0.1 * 0.4611613 = 2.5461161.
    """
    assert_value("orpo", PAIR, 2.5461161)


def test_value_of_cpo():
    """Plain logps differ by 20: log(1 + e^-2) = 0.1269280, and 2.5 per token: 2.6269280.

    Smoothed by 0.1 it is 0.1 * 2 more, and with alpha 0.5 half of 2.5: 1.5769280.
    """
    assert_value("cpo", PAIR, 2.6269280)
    assert_value("cpo", PAIR, 1.5769280, label_smoothing=0.1, cpo_alpha=0.5)


def test_value_of_slic():
    """Plain logps -10 and -10.4: 1 - 0.4 = 0.6, with delta 0.3 nothing. Flipped PAIR: 1 + 20."""
    near = {"policy": [(-10, -10.4)], "lengths": ((4, 10),)}
    assert_value("slic", near, 0.6, beta=3.0)
    assert_value("slic", near, 0.0, delta=0.3)
    assert_value("slic", FLIPPED, 21.0)


# Gradients ---------------------------------------------------------------------------------------

# Away from every kink, and both means of logratios below 0: KTO's reference points are held.
POLICY = float64([(-3.0, -5.0), (-2.0, -1.5), (-6.0, -4.0)])
REFERENCE = float64([(-3.5, -2.0), (-1.0, -4.2), (-5.1, -3.4)])
LENGTHS = torch.tensor([(2, 3), (4, 5), (3, 1)])


@pytest.mark.parametrize("beta", [0.05, 0.7, 2.0])
@every_loss
def test_gradients(name, beta):
    for options, divergence in itertools.product(
        ({}, other_options(name)), (*divergences_of(name), "none")
    ):
        reference: torch.Tensor | None = REFERENCE
        if divergence == "none":
            if PAIRWISE_LOSSES[name].needs_reference:
                continue
            divergence, reference = {}, None
        of = functools.partial(
            call, name, reference=reference, lengths=LENGTHS, beta=beta, **options, **divergence
        )
        assert torch.autograd.gradcheck(
            of, POLICY.clone().requires_grad_(), atol=1e-6, rtol=1e-4
        ), (options, divergence)


def test_kto_has_a_gradient_through_its_reference_points():
    """Both means above 0, so each z takes the mean slope of the other half's terms.

    With v the sigmoid of a term, its slope is 0.5 beta v (1 - v) =: g. Chosen score i has -g_i of
    its own term and -mean(g') of z in the rejected terms, rejected score i has g'_i + mean(g).
    """
    scores = float64([(1.0, 4.0), (2.0, -1.0)])
    beta = 0.7
    z = scores.mean(0)
    slopes = gradient("kto_pair", scores - 20, torch.full_like(scores, -20), LENGTHS[:2], beta=beta)
    above = [sigmoid(beta * float(z[1] - scores[i, 0])) for i in range(2)]
    below = [sigmoid(beta * float(scores[i, 1] - z[0])) for i in range(2)]
    own, other = ([0.5 * beta * v * (1 - v) for v in values] for values in (above, below))
    for i in range(2):
        expected = (-own[i] - sum(other) / 2, other[i] + sum(own) / 2)
        assert slopes[i].tolist() == pytest.approx(expected, rel=1e-12)


# Extremes ----------------------------------------------------------------------------------------


def extremes(option):
    """Ends of an option's range, or values near them; 0 and 1000 where there is none."""
    rule = option.rule
    low = rule["least"] if "least" in rule else rule["above"] + 1e-6
    high = rule["most"] if "most" in rule else rule["below"] - 1e-6 if "below" in rule else 1e3
    return float(low), float(high)


EDGES = (0.0, -1e-7, -0.75, -1e3, -1e6)
# Every pairing of two sides of policy and reference: logratios of +-1e6 and margins of +-2e6.
GRID = float64(list(itertools.product(EDGES, repeat=4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_loss
def test_no_value_or_gradient_is_ever_infinite(name, dtype):
    entry = PAIRWISE_LOSSES[name]
    policy, reference = GRID[:, :2].to(dtype), GRID[:, 2:].to(dtype)
    lengths = torch.tensor((1, 7)).expand(len(GRID), 2)
    choices = [dict(entry.options)]
    choices += [
        dict(zip(entry.schema, values, strict=True))
        for values in itertools.product(*map(extremes, entry.schema.values()))
    ]
    sides = [(reference, d) for d in divergences_of(name)]
    sides += [] if entry.needs_reference else [(None, {})]
    for beta, options, (other, divergence) in itertools.product((1e-3, 0.1, 10.0), choices, sides):
        logps = policy.clone().requires_grad_()
        values = call(name, logps, other, lengths, beta=beta, **options, **divergence)
        assert values.dtype == dtype
        assert values.shape == (len(GRID),)
        values.sum().backward()
        case = (beta, options, divergence, other is None)
        assert values.isfinite().all(), case
        assert logps.grad is not None
        assert logps.grad.isfinite().all(), case


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js_divergence"])
@pytest.mark.parametrize("name", MARGIN_LOSSES)
def test_a_pair_that_is_far_wrong_is_still_pushed(name, divergence):
    """The chosen response's logratio is -1e6: the gradient is what leads back from there.

    EXO's, a KL from the policy's choice, dies there by definition.
    """
    slopes = gradient(
        name,
        float64([(-1e6, -1.0)]),
        float64([(-1.0, -1.0)]),
        torch.tensor([(4, 5)]),
        f_divergence=divergence,
    )
    assert (slopes[0, 0] < 0) == (name != "exo_pair")


# What holds of each ------------------------------------------------------------------------------

logps = st.floats(-60, -0.5, allow_nan=False, width=32)
lengths_of_pair = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def batches(draw, least=1, most=5):
    """Draws a batch (policy, reference, lengths, beta), float64."""
    n = draw(st.integers(least, most))
    sides = [draw(st.lists(st.tuples(logps, logps), min_size=n, max_size=n)) for _ in range(2)]
    lengths = draw(st.lists(lengths_of_pair, min_size=n, max_size=n))
    beta = draw(st.sampled_from([0.01, 0.1, 0.5, 2.0]))
    return float64(sides[0]), float64(sides[1]), torch.tensor(lengths), beta


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


# The loss of the pair with its sides exchanged, from the loss `v`, the margin `m`, the margin per
# token `n` and beta `b`, by name; options are those below. None where nothing simple holds, with
# the reason.
SWAPPED_OPTIONS = {
    "sigmoid": {"label_smoothing": FLIP},
    "robust": {"label_smoothing": FLIP},
    "exo_pair": {"label_smoothing": FLIP},
    "cpo": {"label_smoothing": FLIP, "cpo_alpha": 0.0},
    "simpo": {"gamma": 0.0},
    "aot": {"label_smoothing": FLIP},
    "aot_unpaired": {"label_smoothing": FLIP},
}
SWAPPED = {
    # -log sigmoid(-x) = x - log sigmoid(x): the e-th share of it goes the other way.
    "sigmoid": lambda v, m, n, b: v + (1 - 2 * FLIP) * b * m,
    "cpo": lambda v, m, n, b: v + (1 - 2 * FLIP) * b * m,
    "robust": lambda v, m, n, b: v + b * m / (1 - 2 * FLIP),
    "sigmoid_norm": lambda v, m, n, b: v + b * n,
    "odpo": lambda v, m, n, b: v + b * m,
    "simpo": lambda v, m, n, b: v + b * n,
    "bco_pair": lambda v, m, n, b: v + b * m,
    # Squares (x - c)^2 and (x + c)^2 differ by 4 x c, c = 1 / (2 beta).
    "ipo": lambda v, m, n, b: v + 2 * n / b,
    "ipo_sum": lambda v, m, n, b: v + 2 * m / b,
    "sppo_hard": lambda v, m, n, b: v + 2 * m / b,
    # KL of (1 - q, q) from (1 - e, e) instead of (q, 1 - q).
    "exo_pair": lambda v, m, n, b: v + (2 * (b * m).sigmoid() - 1) * math.log((1 - FLIP) / FLIP),
    # Hinges: one of the two is at least its offset.
    "hinge": lambda v, m, n, b: (1 + b * m).relu(),
    "slic": lambda v, m, n, b: (1 + m).relu(),
    # sigmoid(x) + sigmoid(-x) = 1, of each response.
    "apo_zero": lambda v, m, n, b: 2 - v,
    "kto_pair": lambda v, m, n, b: 1 - v,
    # The quantiles are the negative ones in reverse: of the batch together.
    "aot": lambda v, m, n, b: v.sum() + (1 - 2 * FLIP) * b * m.sum(),
    "aot_unpaired": lambda v, m, n, b: v.sum() + (1 - 2 * FLIP) * b * m.sum(),
    # One-sided by design: the chosen response is treated in another way than the rejected one.
    "nca_pair": None,
    "apo_down": None,
    "orpo": None,
    "sft": None,
    # The two losses that it mixes are no mirror images.
    "discopop": None,
}


def test_what_an_exchange_of_the_sides_does_is_said_of_every_loss():
    assert set(SWAPPED) == set(LOSSES)


@pytest.mark.parametrize("name", [name for name in LOSSES if SWAPPED.get(name)])
@hypothesis_settings
@given(batch=batches())
def test_sides_exchanged(name, batch):
    policy, reference, lengths, beta = batch
    options = SWAPPED_OPTIONS.get(name, {})
    values = call(name, policy, reference, lengths, beta=beta, **options)
    swapped = call(name, policy.flip(1), reference.flip(1), lengths.flip(1), beta=beta, **options)
    scores = policy - reference if PAIRWISE_LOSSES[name].uses_reference else policy
    margin, mean = scores[:, 0] - scores[:, 1], (scores / lengths)[:, 0] - (scores / lengths)[:, 1]
    expected = SWAPPED[name](values, margin, mean, beta)
    close(swapped.sum() if expected.ndim == 0 else swapped, expected)


@hypothesis_settings
@given(batch=batches(), offset=st.floats(0, 5))
def test_odpo_with_its_sides_and_its_offset_exchanged(batch, offset):
    policy, reference, lengths, beta = batch
    target = torch.full((len(policy),), offset, dtype=torch.float64)
    values = call("odpo", policy, reference, lengths, beta=beta, target_margin=target)
    swapped = call(
        "odpo", policy.flip(1), reference.flip(1), lengths, beta=beta, target_margin=-target
    )
    scores = policy - reference
    close(swapped - values, beta * (scores[:, 0] - scores[:, 1]) - target)


# Losses that a constant added to both scores of a pair leaves alone: the partition function of the
# prompt. IPO per token and length-normalised DPO are on a margin too, of scores per token: there
# a constant per token cancels. CPO is without its likelihood.
SHIFTED = {
    "sigmoid": "pair",
    "hinge": "pair",
    "ipo_sum": "pair",
    "robust": "pair",
    "exo_pair": "pair",
    "discopop": "pair",
    "odpo": "pair",
    "slic": "pair",
    "cpo": "pair",
    "aot": "pair",
    "ipo": "token",
    "sigmoid_norm": "token",
    "simpo": "token",
    # Not paired: the constant cancels where it is the same for all pairs.
    "aot_unpaired": "batch",
    # Each response by itself against the reference, or its likelihood.
    "nca_pair": None,
    "bco_pair": None,
    "sppo_hard": None,
    "apo_zero": None,
    "apo_down": None,
    "kto_pair": None,
    "sft": None,
    "orpo": None,
}


def test_what_a_constant_in_both_scores_does_is_said_of_every_loss():
    assert set(SHIFTED) == set(LOSSES)
    assert all(SHIFTED[name] in ("pair", "token") for name in MARGIN_LOSSES)


@every_loss
@hypothesis_settings
@given(batch=batches(least=2), constant=st.floats(-4, 4).filter(lambda c: abs(c) > 0.5))
def test_a_constant_in_both_scores_of_a_pair(name, batch, constant):
    policy, reference, lengths, beta = batch
    options = {"cpo_alpha": 0.0} if name == "cpo" else {}
    kind = SHIFTED[name]
    shift = torch.full_like(policy, constant)
    if kind == "token":
        shift = shift * lengths
    elif kind != "batch":
        shift[1:] = 0  # a constant of one prompt
    values = call(name, policy, reference, lengths, beta=beta, **options)
    shifted = call(name, policy + shift, reference, lengths, beta=beta, **options)
    if kind is not None:
        close(shifted, values)


@pytest.mark.parametrize("name", [name for name in LOSSES if SHIFTED.get(name) is None])
def test_losses_on_single_responses_do_not_ignore_a_constant(name):
    """The other half of the table: a loss with None there is not invariant."""
    values = call(name, POLICY, REFERENCE, LENGTHS)
    assert not torch.allclose(call(name, POLICY - 0.4, REFERENCE, LENGTHS), values)


@pytest.mark.parametrize("name", [n for n in LOSSES if PAIRWISE_LOSSES[n].uses_reference])
@hypothesis_settings
@given(batch=batches(), constants=st.tuples(st.floats(-4, 4), st.floats(-4, 4)))
def test_only_log_ratios_count(name, batch, constants):
    """Adding the same to policy and reference changes nothing, whichever side it is added to.

    AOT compares margins of the policy with margins of the reference of other pairs: there it
    changes nothing where it is the same for all pairs, as it is here.
    """
    policy, reference, lengths, beta = batch
    shift = float64(constants)
    values = call(name, policy, reference, lengths, beta=beta)
    close(call(name, policy + shift, reference + shift, lengths, beta=beta), values)


@every_loss
def test_the_flags_about_the_reference_are_true(name):
    entry = PAIRWISE_LOSSES[name]
    values = call(name, POLICY, REFERENCE, LENGTHS, beta=0.7)
    other = call(name, POLICY, REFERENCE - float64([(1.0, 0.3)]), LENGTHS, beta=0.7)
    assert torch.equal(values, other) == (not entry.uses_reference)
    if entry.needs_reference:
        with pytest.raises(ValueError, match="compares each response with the reference"):
            call(name, POLICY, None, LENGTHS)
        return
    without = call(name, POLICY, None, LENGTHS, beta=0.7)
    # Without one the score is the plain log-probability, as with a reference of probability 1.
    assert torch.equal(without, call(name, POLICY, torch.zeros_like(POLICY), LENGTHS, beta=0.7))


@every_loss
def test_the_flag_about_the_rejected_side_is_true(name):
    values = call(name, POLICY, REFERENCE, LENGTHS, beta=0.7)
    other = call(name, POLICY - float64([(0.0, 0.4)]), REFERENCE, LENGTHS, beta=0.7)
    assert torch.equal(values, other) == (not PAIRWISE_LOSSES[name].uses_rejected)


@pytest.mark.parametrize("name", LOSSES)
def test_the_flag_about_divergences_is_true(name):
    entry = PAIRWISE_LOSSES[name]
    if not entry.on_margin:
        with pytest.raises(ValueError, match="losses on the margin"):
            call(name, POLICY, REFERENCE, LENGTHS, f_divergence="js_divergence")
        return
    plain = call(name, POLICY, REFERENCE, LENGTHS)
    assert not torch.allclose(
        call(name, POLICY, REFERENCE, LENGTHS, f_divergence="js_divergence"), plain
    )
    # The link takes the place of the log-ratio, of both sides and nowhere else.
    linked = math.log(2) + torch.nn.functional.logsigmoid(POLICY - REFERENCE)
    close(
        call(name, POLICY, REFERENCE, LENGTHS, f_divergence="js_divergence"),
        call(name, linked, torch.zeros_like(linked), LENGTHS),
    )
    with pytest.raises(ValueError, match="losses on the margin"):
        call(name, POLICY, None, LENGTHS, f_divergence="js_divergence")


# The sign of the gradient: by the chosen response's logp, by the rejected one's. None where it has
# a minimum in between, which is in MINIMA or said here.
SLOPES = {
    "sigmoid": (-1, 1),
    "hinge": (-1, 1),
    "robust": (-1, 1),
    "sigmoid_norm": (-1, 1),
    "odpo": (-1, 1),
    "bco_pair": (-1, 1),
    "apo_zero": (-1, 1),
    "kto_pair": (-1, 1),
    "aot": (-1, 1),
    "aot_unpaired": (-1, 1),
    "simpo": (-1, 1),
    "orpo": (-1, 1),
    "cpo": (-1, 1),
    "slic": (-1, 1),
    "sft": (-1, 0),
    "nca_pair": (None, 1),
    "ipo": (None, None),
    "ipo_sum": (None, None),
    "exo_pair": (None, None),
    "sppo_hard": (None, None),
    # Down for both, and the rejected one more; the chosen one's slope has no sign of its own.
    "apo_down": (None, 1),
    # Not monotone: its loss rises where the exponential takes over from the logistic.
    "discopop": (None, None),
}


def test_the_sign_of_the_slope_is_said_of_every_loss():
    assert set(SLOPES) == set(LOSSES)


@every_loss
@hypothesis_settings
@given(batch=batches())
def test_the_sign_of_the_slope(name, batch):
    policy, reference, lengths, beta = batch
    slopes = gradient(name, policy, reference, lengths, beta=beta)
    for side, sign in enumerate(SLOPES[name]):
        if sign == 0:
            assert not slopes[:, side].any()
        elif sign is not None:
            assert (slopes[:, side] * sign >= 0).all()


@pytest.mark.parametrize("name", [name for name in LOSSES if SLOPES.get(name) == (-1, 1)])
def test_a_loss_that_falls_with_the_margin_does_fall(name):
    """Strictly, wherever no hinge is satisfied: a zero gradient has the right sign as well."""
    margins = torch.arange(-8.0, 1.0, dtype=torch.float64)
    values = [
        call(name, float64([(m / 2 - 10, -10 - m / 2)]), float64([(-10.0, -10.0)]), LENGTHS[:1])
        for m in margins
    ]
    falls = torch.cat(values).diff()
    assert (falls < 0).all()


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
@pytest.mark.parametrize(
    ("name", "scores", "options"),
    [
        # beta * m = log((1 - e) / e): the policy is as sure as the label is right.
        ("sigmoid", lambda b: (math.log(4) / b, 0.0), {"label_smoothing": 0.2}),
        ("exo_pair", lambda b: (math.log(4) / b, 0.0), {"label_smoothing": 0.2}),
        ("ipo_sum", lambda b: (0.5 / b + 3, 3.0), {}),
        # Per token: 2 tokens chosen, 3 rejected.
        ("ipo", lambda b: (2 * (0.5 / b + 3), 3 * 3.0), {}),
        ("sppo_hard", lambda b: (0.5 / b, -0.5 / b), {}),
        # sigmoid(-x) = sigmoid(x) / 2: x = log 2; the rejected one has none.
        ("nca_pair", lambda b: (math.log(2) / b, None), {}),
    ],
)
def test_minima(name, scores, options, beta):
    chosen, rejected = scores(beta)
    rows = float64([(chosen, -4.0 if rejected is None else rejected)])
    reference = torch.full_like(rows, -50)
    slopes = gradient(name, rows - 50, reference, LENGTHS[:1], beta=beta, **options)
    assert abs(slopes[0, 0]) < 1e-12
    assert rejected is None or abs(slopes[0, 1]) < 1e-12
    here = call(name, rows - 50, reference, LENGTHS[:1], beta=beta, **options)
    for step in (-0.01, 0.01):
        moved = rows - 50 + float64([(step, 0.0)])
        assert call(name, moved, reference, LENGTHS[:1], beta=beta, **options) > here


LN2 = math.log(2)
# The loss of a policy that is its reference, by beta `b`; of a loss without one, that of two
# responses of the same log-probability per token, which is `-p`.
STEP_0 = {
    "sigmoid": lambda b, p: LN2,
    "hinge": lambda b, p: 1.0,
    "ipo": lambda b, p: 1 / (4 * b * b),
    "ipo_sum": lambda b, p: 1 / (4 * b * b),
    "robust": lambda b, p: LN2,
    # Half of log(1/2 / (1 - e)) and of log(1/2 / e), e = 0.001.
    "exo_pair": lambda b, p: -LN2 - 0.5 * math.log(0.001 * 0.999),
    # Half the logistic and half the exponential loss.
    "discopop": lambda b, p: 0.5 * LN2 + 0.5,
    "sigmoid_norm": lambda b, p: LN2,
    "odpo": lambda b, p: LN2,
    "nca_pair": lambda b, p: 2 * LN2,
    "bco_pair": lambda b, p: 2 * LN2,
    "sppo_hard": lambda b, p: 1 / (2 * b * b),
    "apo_zero": lambda b, p: 1.0,
    "apo_down": lambda b, p: 1.0,
    "kto_pair": lambda b, p: 0.5,
    "aot": lambda b, p: LN2,
    "aot_unpaired": lambda b, p: LN2,
    "sft": lambda b, p: p,
    "simpo": lambda b, p: smaller(-0.5),
    "orpo": lambda b, p: p + b * LN2,
    # Lengths are the same: so are the logps themselves.
    "cpo": lambda b, p: LN2 + p,
    "slic": lambda b, p: 1.0,
}


def test_the_loss_of_step_0_is_said_of_every_loss():
    assert set(STEP_0) == set(LOSSES)


@every_loss
@hypothesis_settings
@given(batch=batches(), per_token=st.floats(0.05, 9.0))
def test_the_loss_of_step_0(name, batch, per_token):
    policy, _, lengths, beta = batch
    if not PAIRWISE_LOSSES[name].uses_reference:
        lengths = lengths[:, :1].expand(-1, 2)
        policy = -per_token * lengths.to(torch.float64)
    values = call(name, policy, policy, lengths, beta=beta)
    expected = STEP_0[name](beta, per_token)
    close(values, torch.full_like(values, expected))


@every_loss
@hypothesis_settings
@given(batch=batches(least=2), seed=st.integers(0, 1000))
def test_the_order_of_pairs_does_not_matter(name, batch, seed):
    """Each pair's loss goes where the pair goes, of the losses over a whole batch too.

    AOT's ties are broken by order, so it is their sum then.
    """
    policy, reference, lengths, beta = batch
    order = torch.randperm(len(policy), generator=torch.Generator().manual_seed(seed))
    values = call(name, policy, reference, lengths, beta=beta)
    moved = call(name, policy[order], reference[order], lengths[order], beta=beta)
    close(moved.sum(), values.sum())
    quantiles = policy[:, 0] - policy[:, 1] if name == "aot" else (policy - reference)[:, 0]
    if not name.startswith("aot") or len(quantiles.unique()) == len(quantiles):
        close(moved, values[order])


@pytest.mark.parametrize("name", ALONE)
@hypothesis_settings
@given(batch=batches(least=2), other=st.tuples(logps, logps, logps, logps))
def test_a_pair_does_not_see_the_others(name, batch, other):
    policy, reference, lengths, beta = batch
    values = call(name, policy, reference, lengths, beta=beta)
    policy, reference = policy.clone(), reference.clone()
    policy[0], reference[0] = float64(other[:2]), float64(other[2:])
    changed = call(name, policy, reference, lengths, beta=beta)
    assert torch.equal(changed[1:], values[1:])
    alone = call(name, policy[1:], reference[1:], lengths[1:], beta=beta)
    close(alone, values[1:])


@pytest.mark.parametrize("name", COUPLING)
def test_losses_over_a_batch_do_see_the_others(name):
    policy = POLICY.clone()
    values = call(name, policy, REFERENCE, LENGTHS)
    policy[0] = float64((-5.0, -1.5))
    assert not torch.allclose(call(name, policy, REFERENCE, LENGTHS)[1:], values[1:])


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@hypothesis_settings
@given(batch=batches(least=2))
def test_transport_is_the_cheapest_pairing(name, batch):
    """For a convex loss no other pairing of the two samples costs less than the sorted one."""
    policy, reference, lengths, beta = batch
    n = len(policy)
    if name == "aot":
        up, down = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    else:
        up, down = (policy - reference).unbind(1)
    costs = [
        torch.nn.functional.softplus(-beta * (up - down[list(order)])).sum().item()
        for order in itertools.permutations(range(n))
    ]
    total = call(name, policy, reference, lengths, beta=beta).sum().item()
    assert total == pytest.approx(min(costs), abs=1e-8)


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in ("sft", "slic")])
def test_beta_is_looked_at(name):
    values = [call(name, POLICY, REFERENCE, LENGTHS, beta=beta) for beta in (0.3, 0.6)]
    assert not torch.allclose(values[0], values[1])


@every_loss
def test_a_beta_that_is_a_tensor_gives_the_same(name):
    """A beta that changes from step to step comes as a tensor of one entry."""
    values = call(name, POLICY, REFERENCE, LENGTHS, beta=0.3)
    close(call(name, POLICY, REFERENCE, LENGTHS, beta=float64(0.3)), values)


@pytest.mark.parametrize(
    ("name", "option"), [(name, o) for name in LOSSES for o in PAIRWISE_LOSSES[name].options]
)
def test_every_option_is_looked_at_and_its_default_is_the_stated_one(name, option):
    policy, reference = POLICY.clone(), REFERENCE.clone()
    plain = call(name, policy, reference, LENGTHS)
    default = PAIRWISE_LOSSES[name].options[option]
    assert torch.equal(call(name, policy, reference, LENGTHS, **{option: default}), plain)
    other = call(name, policy, reference, LENGTHS, **{option: OTHER_VALUES[option]})
    assert not torch.allclose(other, plain)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name in LOSSES
        for value in ("x", math.nan, math.inf, -1e-9, True)
        if PAIRWISE_LOSSES[name].options
    ],
)
def test_options_that_are_out_of_range_are_refused(name, value):
    for option in PAIRWISE_LOSSES[name].options:
        with pytest.raises(ValueError, match=f"{option} is"):
            call(name, POLICY, REFERENCE, LENGTHS, **{option: value})


@every_loss
def test_a_batch_of_one_and_none_and_large_ones(name):
    """No loss needs more than one pair, and an empty batch has no loss."""
    assert call(name, POLICY[:1], REFERENCE[:1], LENGTHS[:1]).shape == (1,)
    assert call(name, POLICY[:0], REFERENCE[:0], LENGTHS[:0]).shape == (0,)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    many = -torch.rand(500, 2, 2, generator=generator) * 700
    lengths = torch.randint(1, 900, (500, 2), generator=generator)
    single = call(name, many[:, 0], many[:, 1], lengths)
    double = call(name, many[:, 0].double(), many[:, 1].double(), lengths)
    torch.testing.assert_close(single.double(), double, rtol=2e-5, atol=2e-5)
