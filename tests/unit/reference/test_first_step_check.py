"""The check before the first step: a reference that is to be the policy's start, and is not."""

import math

import pytest

from dpo_lightning.errors import UserError
from tests.support.models import make_model
from tests.support.steps import pair, take_steps, with_logratios


def start(folder, *logratios: float, **settings):
    """A step of one pair, of two and four tokens, whose log-ratios are the given ones."""
    groups = [with_logratios(make_model("llama"), pair(1), *logratios)]
    return take_steps(folder, groups, beta=0.5, **({"starts_from_reference": True} | settings))


def test_the_first_loss_of_a_policy_that_starts_from_its_reference_is_ln_2(tmp_path):
    assert start(tmp_path, 0.0, 0.0).values("train/loss") == pytest.approx([math.log(2)], abs=1e-6)


@pytest.mark.parametrize(
    ("logratios", "said"),
    [
        ((3.0, -3.0), "1 nats"),  # which would cancel in a sum: 6 nats over 6 tokens
        ((0.0, 0.6), "0.1 nats"),
        ((0.0018, -0.0018), "0.0006 nats"),
        ((math.nan, 0.0), "nan nats"),
    ],
)
def test_another_reference_is_refused_with_the_difference_per_token(tmp_path, logratios, said):
    with pytest.raises(UserError, match=f"by {said} per token.*explains 0.0001.*pretrained="):
        start(tmp_path, *logratios)


def test_what_rounding_explains_is_let_through(tmp_path):
    """0.0003 nats over six tokens are half of the 1e-4 a token that float32 is allowed."""
    assert start(tmp_path, 0.0002, -0.0001).trainer.global_step == 1


def test_a_reference_that_is_another_model_is_not_checked(tmp_path):
    taken = start(tmp_path, 3.0, -3.0, starts_from_reference=False)
    assert taken.values("train/loss") == pytest.approx([math.log1p(math.exp(-3))], rel=1e-5)
