"""The check before the first step: a reference that is to be the policy's start, and is not."""

import math
from types import SimpleNamespace

import pytest
import torch

from dpo_lightning.data.packing import StepBatch, collate_groups
from dpo_lightning.errors import UserError
from dpo_lightning.reference.same_model import check_same_model
from tests.support.groups import group
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
    """Responses of two and four tokens are allowed 5e-4 (2^0.5 + 4^0.5) nats, 0.00028 a token."""
    with pytest.raises(UserError, match=f"by {said} per token.*explains 0.00028.*pretrained="):
        start(tmp_path, *logratios)


@pytest.mark.parametrize(("share", "is_let_through"), [(0.98, True), (1.02, False)])
def test_rounding_grows_as_the_root_of_a_length(tmp_path, share, is_let_through):
    """5e-4 (2^0.5 + 4^0.5) = 0.0017071 nats; in proportion to lengths it would be other sums."""
    difference = share * 0.0017071 / 2
    if is_let_through:
        assert start(tmp_path, difference, -difference).trainer.global_step == 1
    else:
        with pytest.raises(UserError, match="differ by"):
            start(tmp_path, difference, -difference)


def gap(dtype: torch.dtype, *lengths: int, nats: float) -> None:
    """Checks a policy whose responses of these lengths all differ by so many nats."""
    groups = [group(2, *lengths)]
    policy = torch.nn.Linear(1, 1, dtype=dtype)
    micro = collate_groups(groups, [0])
    zeros = torch.zeros(len(lengths))
    scorer = SimpleNamespace(plan=lambda batch: None, logps=lambda *_: zeros + nats)
    reference = SimpleNamespace(rows=0, computed=0, logps=lambda *_: zeros)
    check_same_model(
        StepBatch((micro,), 1.0, 1, 1), policy=policy, reference=reference, scorer=scorer,
        reduce=lambda sums: sums,
    )  # fmt: skip


def test_one_token_in_bfloat16_is_let_through_and_a_wrong_window_is_not():
    """Kernels differ by 0.04 nats at a response of one token; a window off by one by 0.39 a token.

    At a hundred tokens the limit is 0.1 * 10 nats, 0.01 a token.
    """
    gap(torch.bfloat16, 1, 1, nats=0.06)
    gap(torch.bfloat16, 100, 100, nats=0.9)
    for lengths, nats in (((1, 1), 0.39), ((100, 100), 1.1), ((400, 400), 2.1)):
        with pytest.raises(UserError, match="bfloat16"):
            gap(torch.bfloat16, *lengths, nats=nats)


def test_a_reference_that_is_another_model_is_not_checked(tmp_path):
    taken = start(tmp_path, 3.0, -3.0, starts_from_reference=False)
    assert taken.values("train/loss") == pytest.approx([math.log1p(math.exp(-3))], rel=1e-5)
