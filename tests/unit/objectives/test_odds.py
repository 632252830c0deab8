"""ORPO's odds of a response that is nearly certain, where 1 - p has few digits left."""

import math

import pytest
import torch

from dpo_lightning.objectives import pairwise_loss


def test_the_odds_of_nearly_certain_responses_keep_their_digits():
    """Odds by hand: one token each, log-probabilities -2e-6 and -4e-6, beta 0.5.

    The odds are p / (1 - p), so about 1 / 2e-6 and 1 / 4e-6, and their ratio is 2: the loss is
    2e-6 - 0.5 log sigmoid(log 2) = 2e-6 + 0.5 log(3/2). 1 - p from p in float32 would be 34 and 67
    times 2^-24: a ratio of 1.97. The slope of the log-odds is 1 / (1 - p), 5e5 and 2.5e5, which
    1 - sigmoid(log 2) = 1/3 and beta multiply; the chosen one has its likelihood's -1 beside it.
    """
    chosen = torch.tensor([-2e-6], requires_grad=True)
    rejected = torch.tensor([-4e-6], requires_grad=True)
    loss = pairwise_loss(
        "orpo",
        policy_chosen_logps=chosen,
        policy_rejected_logps=rejected,
        reference_chosen_logps=None,
        reference_rejected_logps=None,
        chosen_lengths=torch.tensor([1]),
        rejected_lengths=torch.tensor([1]),
        beta=0.5,
    )
    assert loss.item() == pytest.approx(2e-6 + 0.5 * math.log(1.5), abs=1e-5)
    loss.sum().backward()
    assert chosen.grad.item() == pytest.approx(-1 - 0.5 / 3 * 5e5, rel=1e-3)
    assert rejected.grad.item() == pytest.approx(0.5 / 3 * 2.5e5, rel=1e-3)
