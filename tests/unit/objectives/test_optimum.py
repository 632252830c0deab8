"""Losses whose optimum is pi_ref exp(r / beta) / Z, by the slope of the population loss there."""

import pytest
import torch

from dpo_lightning.objectives import PAIRWISE_LOSSES, pairwise_loss
from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.objectives.optimum import why_no_beta

BETA = 0.4
REWARDS = torch.tensor([1.3, 0.2], dtype=torch.float64)
REFERENCE = torch.tensor([0.3, 0.7], dtype=torch.float64).log()


def why(*names: str, changes: bool = False, options: dict | None = None, **settings) -> str | None:
    objective = ObjectiveSettings(
        terms=dict.fromkeys(names, 1.0), options=options or {}, **settings
    )
    return why_no_beta(objective, changes=changes)


def slope(name: str, rewards: torch.Tensor, **options: float) -> float:
    """Slope of the loss at pi_ref exp(r / beta), along more of the first of two responses.

    The first is preferred with probability sigmoid(r_1 - r_2); with label_smoothing e the label
    that is seen is the other one in e of all cases.
    """
    logps = (REFERENCE + rewards / BETA).requires_grad_()
    first = torch.sigmoid(REWARDS[0] - REWARDS[1])
    wrong = options.get("label_smoothing", 0.0)
    first = first * (1 - wrong) + (1 - first) * wrong
    total = 0.0
    for chosen, rejected, chance in ((0, 1, first), (1, 0, 1 - first)):
        loss = pairwise_loss(
            name,
            policy_chosen_logps=logps[chosen : chosen + 1],
            policy_rejected_logps=logps[rejected : rejected + 1],
            reference_chosen_logps=REFERENCE[chosen : chosen + 1],
            reference_rejected_logps=REFERENCE[rejected : rejected + 1],
            chosen_lengths=torch.tensor([3 + chosen]),
            rejected_lengths=torch.tensor([3 + rejected]),
            beta=BETA,
            target_margin=0.3,
            **options,
        )
        total = total + chance * loss.sum()
    (gradient,) = torch.autograd.grad(total, logps)
    return float(gradient[0] - gradient[1])


COMPARED = [n for n, e in PAIRWISE_LOSSES.items() if e.uses_reference and not e.couples]


@pytest.mark.parametrize("name", COMPARED)
def test_a_loss_has_a_beta_exactly_if_it_is_flat_at_the_optimum(name: str):
    """IPO's is the optimum of the probability to win: of two responses drawn alike, p_1 / 2 + 1/4.

    Their difference is (2 p - 1) / 2, so that the margin is (2 p - 1) / (2 beta). ODPO has a target
    margin, without which it would be DPO.
    """
    rewards = REWARDS
    if name == "ipo_sum":
        win = torch.sigmoid(REWARDS[0] - REWARDS[1])
        rewards = torch.stack([win / 2 + 0.25, (1 - win) / 2 + 0.25])
    assert (why(name) is None) == (abs(slope(name, rewards)) < 1e-9)


def test_smoothed_labels_move_the_optimum_unless_they_are_accounted_for():
    """Robust DPO, where 0.2 of the labels are wrong, is flat at the optimum of the right ones."""
    smoothing = {"label_smoothing": 0.2}
    assert abs(slope("robust", REWARDS, **smoothing)) < 1e-9
    assert why("robust", options=smoothing) is None
    assert abs(slope("sigmoid", REWARDS, **smoothing)) > 0.01
    assert "label_smoothing" in why("sigmoid", options=smoothing)


@pytest.mark.parametrize("name", [n for n, e in PAIRWISE_LOSSES.items() if e.couples])
def test_losses_over_all_pairs_of_a_batch_have_none(name: str):
    assert why(name) == f"the optimum of loss={name} is not π_ref·exp(r/β)/Z"


@pytest.mark.parametrize("name", ["softmax", "plackett_luce"])
def test_losses_on_groups_have_a_beta(name: str):
    assert why(name) is None
    assert why(name, "sigmoid") is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"changes": True}, "beta changed over the run"),
        ({"f_divergence": "forward_kl"}, "loss.f_divergence=forward_kl has an optimum of another"),
        ({"ld_alpha": 0.5}, "loss.ld_alpha=0.5 moves the optimum"),
        ({"wpo": True}, "loss.wpo=true moves the optimum"),
        ({"rpo_alpha": 0.1}, "loss.rpo_alpha=0.1 moves the optimum"),
    ],
)
def test_what_moves_the_optimum_is_named(changed: dict, said: str):
    assert why("sigmoid", **changed).startswith(said)
    assert why("sigmoid") is None


def test_sums_of_losses_have_a_beta_if_each_has_the_same():
    assert why("sigmoid", "robust") is None
    assert why("sigmoid", "hinge") == "the optimum of loss=hinge is not π_ref·exp(r/β)/Z"
    assert why("sigmoid", "ipo_sum") == "the optimum of loss=ipo_sum is not π_ref·exp(r/β)/Z"
