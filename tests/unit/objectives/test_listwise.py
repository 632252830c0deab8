"""The listwise losses, against hand-worked numbers, plain loops and the pairwise loss."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.objectives.listwise import LISTWISE_LOSSES, listwise_loss
from dpo_lightning.objectives.pairwise import pairwise_loss
from tests.support.properties import examples

NAMES = ("softmax", "plackett_luce")


def loss(name, *groups, dtype=torch.float64):
    """Calls a loss on groups, each a list of (score, rank)."""
    owners = [g for g, responses in enumerate(groups) for _ in responses]
    scores, ranks = zip(*[pair for responses in groups for pair in responses], strict=True)
    return listwise_loss(
        name,
        scores=torch.tensor(scores, dtype=dtype),
        group=torch.tensor(owners),
        rank=torch.tensor(ranks),
    )


def by_loop(name, responses):
    """The formulas as they are written, one response at a time."""

    def against_worse(score, rank):
        worse = sum(math.exp(s) for s, r in responses if r > rank)
        return -math.log(math.exp(score) / (math.exp(score) + worse))

    if name == "plackett_luce":
        return sum(against_worse(*pair) for pair in responses)
    best = min(rank for _, rank in responses)
    terms = [against_worse(*pair) for pair in responses if pair[1] == best]
    return sum(terms) / len(terms)


def test_three_ranked_responses_by_hand():
    """Scores log 4, log 2, log 1 for ranks 1, 2, 3: weights 4, 2, 1.

    softmax: -log(4 / 7) = 0.559616. Plackett-Luce: the second stage adds -log(2 / 3) = 0.405465.
    """
    group = [(math.log(4), 1), (math.log(2), 2), (0.0, 3)]
    assert loss("softmax", group).tolist() == pytest.approx([0.559616], abs=1e-6)
    assert loss("plackett_luce", group).tolist() == pytest.approx([0.965081], abs=1e-6)


def test_ties_by_hand():
    """Weights 4 and 2 tied for the best, 1 and 3 tied behind them; siblings are not compared.

    softmax: (-log(4 / 8) - log(2 / 6)) / 2 = (0.693147 + 1.098612) / 2 = 0.895880.
    Plackett-Luce: 0.693147 + 1.098612 = 1.791759, and nothing for the last two. Breslow would
    have it over all that are left: -log(4/10) - log(2/10) - log(1/4) - log(3/4) = 4.199705.
    """
    group = [(math.log(4), 1), (math.log(2), 1), (0.0, 2), (math.log(3), 2)]
    assert loss("softmax", group).tolist() == pytest.approx([0.895880], abs=1e-6)
    assert loss("plackett_luce", group).tolist() == pytest.approx([1.791759], abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_is_the_sigmoid_loss_to_the_last_bit(name):
    """Whatever the size of the scores, with the better response first or second, beside others."""
    generator = torch.Generator().manual_seed(0)
    size = torch.logspace(-6, 6, 200, dtype=torch.float64)
    scores = size.unsqueeze(1) * torch.randn(200, 2, generator=generator, dtype=torch.float64)
    ranks = torch.tensor([[1, 2], [2, 1]]).repeat(100, 1)
    better = torch.where(ranks[:, 0] == 1, scores[:, 0], scores[:, 1])
    worse = torch.where(ranks[:, 0] == 1, scores[:, 1], scores[:, 0])
    expected = pairwise_loss(
        "sigmoid",
        policy_chosen_logps=better,
        policy_rejected_logps=worse,
        reference_chosen_logps=None,
        reference_rejected_logps=None,
        chosen_lengths=torch.ones(200),
        rejected_lengths=torch.ones(200),
        beta=1.0,
    )
    group = torch.arange(200).repeat_interleave(2)
    # A group of five behind them makes padding of the pairs.
    values = listwise_loss(
        name,
        scores=torch.cat([scores.flatten(), torch.randn(5, generator=generator).double()]),
        group=torch.cat([group, group.new_full((5,), 200)]),
        rank=torch.cat([ranks.flatten(), torch.tensor([3, 1, 2, 2, 5])]),
    )
    assert torch.equal(values[:200], expected)
    assert torch.equal(-torch.nn.functional.logsigmoid(better - worse), expected)


RESPONSES = st.lists(st.tuples(st.floats(-30, 30), st.integers(1, 4)), min_size=1, max_size=6)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=examples(60))
@given(groups=st.lists(RESPONSES, min_size=1, max_size=5))
def test_any_groups_equal_the_plain_loop(name, groups):
    expected = [by_loop(name, responses) for responses in groups]
    assert loss(name, *groups).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=examples(40))
@given(responses=RESPONSES, shift=st.floats(-1e3, 1e3), draw=st.randoms(use_true_random=False))
def test_only_differences_and_ranks_matter(name, responses, shift, draw):
    """A prompt's constant (its beta log Z), the order of a group, the ranks' own numbers."""
    changed = [(score + shift, 10 * rank - 7) for score, rank in responses]
    draw.shuffle(changed)
    before, after = loss(name, responses), loss(name, changed)
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)


def test_the_rankings_of_a_group_have_probability_one_in_total():
    """exp(-loss) over all 4! rankings; over the 4 choices of the best for softmax."""
    scores = [0.3, -1.2, 2.0, 0.9]
    rankings = [
        list(zip(scores, ranks, strict=True)) for ranks in itertools.permutations((1, 2, 3, 4))
    ]
    assert (-loss("plackett_luce", *rankings)).exp().sum().item() == pytest.approx(1, abs=1e-12)
    firsts = [[(s, 1 if i == best else 2) for i, s in enumerate(scores)] for best in range(4)]
    assert (-loss("softmax", *firsts)).exp().sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    """Groups of 3, 1, 4 with ties, 2 tied; a single one's and the tied ones' gradients are 0."""
    scores = torch.randn(
        10, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).requires_grad_()
    group = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3, 3])
    rank = torch.tensor([2, 1, 3, 1, 1, 2, 1, 3, 1, 1])

    def of(s):
        return listwise_loss(name, scores=s, group=group, rank=rank)

    assert torch.autograd.gradcheck(of, scores)
    values = of(scores)
    assert values[[1, 3]].tolist() == [0, 0]
    values.sum().backward()
    assert scores.grad[[3, 8, 9]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", NAMES)
def test_everything_tied_has_no_loss_and_no_gradient(name):
    scores = torch.tensor([1.0, -5.0, 1e6, 2.0], requires_grad=True)
    group, rank = torch.tensor([0, 0, 0, 1]), torch.tensor([1, 1, 1, 1])
    values = listwise_loss(name, scores=scores, group=group, rank=rank)
    values.sum().backward()
    assert values.tolist() == [0, 0]
    assert scores.grad.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_huge_scores_stay_finite(name, dtype):
    """Right by 2e6: 0. Wrong by 2e6: 2e6, with slopes -1 and 1. Both at 1e6: log 2, slopes 1/2."""
    scores = torch.tensor([1e6, -1e6, -1e6, 1e6, 1e6, 1e6], dtype=dtype, requires_grad=True)
    values = listwise_loss(
        name,
        scores=scores,
        group=torch.tensor([0, 0, 1, 1, 2, 2]),
        rank=torch.tensor([1, 2, 1, 2, 1, 2]),
    )
    values.sum().backward()
    assert values.tolist() == pytest.approx([0, 2e6, math.log(2)])
    assert scores.grad.tolist() == pytest.approx([0, 0, -1, 1, -0.5, 0.5])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_is_computed_in_float32(name):
    """Weights 4, 2, 1 that bfloat16 rounds; what is left is what float32 makes of the rounded."""
    group = [(math.log(4), 1), (math.log(2), 2), (0.0, 3)]
    rounded = [(torch.tensor(s).bfloat16().item(), r) for s, r in group]
    value = loss(name, group, dtype=torch.bfloat16)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(name, rounded, dtype=torch.float32))
    assert loss(name, group).dtype == torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_no_responses(name):
    nothing = torch.zeros(0, dtype=torch.int64)
    assert listwise_loss(name, scores=torch.zeros(0), group=nothing, rank=nothing).shape == (0,)


def test_wrong_arguments_are_refused():
    good = {
        "scores": torch.zeros(4),
        "group": torch.tensor([0, 0, 1, 1]),
        "rank": torch.tensor([1, 2, 1, 2]),
    }
    with pytest.raises(ValueError, match=r"unknown loss 'sigmoid'.*softmax, plackett_luce"):
        listwise_loss("sigmoid", **good)
    for change, message in (
        ({"rank": torch.tensor([1, 2])}, r"rank has shape \(2,\)"),
        ({"group": torch.zeros(4, 1, dtype=torch.int64)}, r"group has shape \(4, 1\)"),
        ({"scores": torch.zeros(4, 1)}, r"scores has shape \(4, 1\)"),
        ({"scores": torch.zeros(4, dtype=torch.int64)}, "floating"),
        ({"rank": torch.ones(4)}, "int64"),
        ({"group": torch.tensor([0, 0, 2, 2])}, "not numbered"),
        ({"group": torch.tensor([1, 1, 2, 2])}, "not numbered"),
        ({"group": torch.tensor([0, 1, 0, 1])}, "not numbered"),
        ({"group": torch.tensor([-1, -1, 0, 0])}, "not numbered"),
    ):
        with pytest.raises(ValueError, match=message):
            listwise_loss("softmax", **{**good, **change})


def test_every_loss_says_where_it_is_from():
    assert tuple(LISTWISE_LOSSES) == NAMES
    assert all(entry.paper.startswith("https://arxiv.org/") for entry in LISTWISE_LOSSES.values())
