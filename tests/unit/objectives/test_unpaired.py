"""Losses on single responses: values derived by hand, their slopes, and what is refused."""

import inspect
import math

import pytest
import torch

from dpo_lightning.objectives import UNPAIRED_LOSSES, unpaired_loss
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.objectives.registry import UNPAIRED_ENTRIES, register_loss

BETA = 0.5
# Log-ratios 1, -2 and 3: a desirable response and two undesirable ones.
POLICY = [-5.0, -9.0, -4.0]
REFERENCE = [-6.0, -7.0, -7.0]
DESIRABLE = [True, False, False]


def losses(name: str, **changes) -> list[float]:
    values = {
        "policy_logps": torch.tensor(POLICY, dtype=torch.float64),
        "reference_logps": torch.tensor(REFERENCE, dtype=torch.float64),
        "desirable": torch.tensor(DESIRABLE),
        "beta": BETA,
        **changes,
    }
    return unpaired_loss(name, **values).tolist()


def test_the_values_of_kto():
    """Against z0 = 0.4: sigmoid(0.5 (0.4 - 1)), sigmoid(0.5 (-2 - 0.4)), sigmoid(0.5 (3 - 0.4)).

    sigmoid(-0.3) = 0.4255575, sigmoid(-1.2) = 0.2314752, sigmoid(1.3) = 0.7858350.
    """
    assert losses("kto", kl=0.4) == pytest.approx([0.4255575, 0.2314752, 0.7858350], rel=1e-6)
    weighted = losses("kto", kl=0.4, desirable_weight=2.0, undesirable_weight=0.5)
    assert weighted == pytest.approx([0.8511149, 0.1157376, 0.3929175], rel=1e-6)


def test_a_negative_point_of_kto_is_0():
    """sigmoid(-0.5), sigmoid(-1), sigmoid(1.5), which is APO-zero as well."""
    expected = pytest.approx([0.3775407, 0.2689414, 0.8175745], rel=1e-6)
    assert losses("kto", kl=-3.0) == expected
    assert losses("kto", kl=torch.tensor(-3.0)) == expected
    assert losses("apo_zero_unpaired") == expected


def test_the_values_of_bco():
    """Rewards 0.5, -1, 1.5 less delta = 0.2: log(1 + e^-0.3), log(1 + e^-1.2), log(1 + e^1.3)."""
    assert losses("bco", delta=0.2) == pytest.approx([0.5543552, 0.2632824, 1.5410084], rel=1e-6)
    weighted = losses("bco", delta=0.2, desirable_weight=0.0, undesirable_weight=3.0)
    assert weighted == pytest.approx([0.0, 0.7898472, 4.6230252], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "start"), [("kto", 0.5), ("bco", math.log(2)), ("apo_zero_unpaired", 0.5)]
)
def test_where_the_policy_is_the_reference(name: str, start: float):
    found = losses(name, reference_logps=torch.tensor(POLICY, dtype=torch.float64))
    assert found == pytest.approx([start] * 3)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_desirable_goes_up_and_undesirable_down(name: str):
    """Slopes by finite differences; the point that is compared with has none."""
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    anchor = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    key = {"kto": "kl", "bco": "delta"}.get(name)
    own = {} if key is None else {key: anchor}
    unpaired_loss(
        name,
        policy_logps=policy,
        reference_logps=torch.tensor(REFERENCE, dtype=torch.float64),
        desirable=torch.tensor(DESIRABLE),
        beta=BETA,
        **own,
    ).sum().backward()
    assert policy.grad is not None
    assert anchor.grad is None
    fixed = {} if key is None else {key: 0.3}
    step = 1e-6
    for place, slope in enumerate(policy.grad.tolist()):
        moved = [
            losses(
                name,
                policy_logps=torch.tensor(
                    [x + sign * step * (i == place) for i, x in enumerate(POLICY)],
                    dtype=torch.float64,
                ),
                **fixed,
            )[place]
            for sign in (1, -1)
        ]
        assert slope == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-5)
        assert (slope < 0) is DESIRABLE[place]


def test_half_precision_is_taken_up():
    found = unpaired_loss(
        "kto",
        policy_logps=torch.tensor(POLICY, dtype=torch.bfloat16),
        reference_logps=torch.tensor(REFERENCE),
        desirable=torch.tensor(DESIRABLE),
        beta=torch.tensor(BETA),
    )
    assert found.dtype == torch.float32


def test_large_rewards_stay_finite():
    found = losses("bco", policy_logps=torch.tensor([1e4, 1e4, -1e4], dtype=torch.float64))
    assert all(map(math.isfinite, found))
    assert found[1] == pytest.approx(0.5 * (1e4 + 7))


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("kta", {}, "unknown loss 'kta': choose one of kto, bco, apo_zero_unpaired"),
        ("kto", {"beta": 0.0}, "beta is 0.0"),
        ("kto", {"delta": 0.1}, "loss 'kto' has no delta"),
        ("bco", {"kl": torch.tensor(0.0)}, "loss 'bco' has no kl"),
        ("apo_zero_unpaired", {"kl": 1.0}, "has no kl"),
        ("kto", {"gamma": 1.0}, "its options are desirable_weight, undesirable_weight"),
        ("kto", {"desirable_weight": -1.0}, "desirable_weight is -1.0: needs a number >= 0"),
        ("kto", {"desirable": torch.tensor([1, 0, 0])}, "desirable is torch.int64: it is bool"),
        ("kto", {"reference_logps": torch.zeros(3, 1)}, r"reference_logps has shape \(3, 1\)"),
        ("kto", {"policy_logps": torch.zeros(3, 1)}, r"policy_logps has shape \(3, 1\): it is"),
    ],
)
def test_what_is_refused(name: str, changes: dict, said: str):
    with pytest.raises(ValueError, match=said):
        losses(name, **changes)


@pytest.mark.parametrize("name", UNPAIRED_LOSSES)
def test_an_entry_says_where_it_is_from(name: str):
    entry = UNPAIRED_ENTRIES[name]
    assert entry.paper.startswith("https://arxiv.org/")
    assert entry.summary.endswith((".", "."))
    assert dict(entry.options) == {"desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert "beta" in inspect.signature(entry.fn).parameters


def test_their_names_are_taken():
    with pytest.raises(ValueError, match="loss 'kto' is registered already"):

        @register_loss("kto", paper="x")
        def kto(pairs, *, beta: float):
            return pairs.margin()


def test_an_objective_of_single_responses():
    kto, bco = (ObjectiveSettings(terms={name: 1.0}) for name in ("kto", "bco"))
    pairs = ObjectiveSettings(terms={"sigmoid": 1.0, "softmax": 1.0})
    assert (kto.is_unpaired, pairs.is_unpaired) == (True, False)
    assert [own.anchor for own in (kto, bco, pairs)] == ["mismatched", "running", "none"]
    assert kto.uses_reference
    assert kto.needs_reference == ["kto"]
    assert not kto.couples
    assert not kto.needs_tokens


@pytest.mark.parametrize(
    ("terms", "changes", "said"),
    [
        (("kto", "sigmoid"), {}, "kto is a loss on single responses and stands alone"),
        (("bco", "kto"), {}, "bco is a loss on single responses and stands alone"),
        (("kto",), {"rpo_alpha": 0.5}, "rpo_alpha=0.5 adds the likelihood of the better response"),
        (("kto",), {"f_divergence": "forward_kl"}, "loss=kto is no function of the margin"),
        (("bco",), {"ld_alpha": 0.5}, "which loss=bco does not compare"),
        (("bco",), {"wpo": True}, "which loss=bco does not compare"),
        (("kto",), {"options": {"gamma": 1.0}}, "it has desirable_weight, undesirable_weight"),
        (
            ("kto",),
            {"options": {"undesirable_weight": -1.0}},
            "undesirable_weight=-1: must be a number >= 0 for loss=kto",
        ),
    ],
)
def test_what_does_not_go_with_single_responses(terms, changes: dict, said: str):
    [problem] = ObjectiveSettings(terms=dict.fromkeys(terms, 1.0), **changes).problems()
    assert said in problem
