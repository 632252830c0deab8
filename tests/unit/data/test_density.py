"""Weights of undesirable rows by their prompts: the ratio of two densities, within bounds."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.density import add_density_weights
from dpo_lightning.data.splits import PreparedData
from dpo_lightning.data.tokens import TokenGroup
from tests.support.groups import ids
from tests.support.properties import examples

WIDE = (0.05, 20.0)
A, B, ALL = 1, 2, 3
# Words of one row alone begin here.
OWN = 1_000


def row(number: int, *prompt: int, label: bool | None, weight: float = 1.0) -> TokenGroup:
    """A row of a conversation of its own, with a token in its prompt that no other row has."""
    responses = (ids(7, 0),) if label is not None else (ids(7, 0), ids(8, 0))
    return TokenGroup(
        prompt=ids(ALL, *prompt, OWN + number),
        responses=responses,
        ranks=tuple(range(1, len(responses) + 1)),
        weight=weight,
        source=f"rows:{number}",
        prompt_key=f"row {number}",
        label=label,
    )


def rows(good: tuple[int, int], bad: tuple[int, int]) -> list[TokenGroup]:
    """Desirable and undesirable rows, so many with the token A and so many with B."""
    number = count()
    return [
        row(next(number), token, label=label)
        for label, sizes in ((True, good), (False, bad))
        for token, size in zip((A, B), sizes, strict=True)
        for _ in range(size)
    ]


def weighed(
    groups: Sequence[TokenGroup],
    bounds: Sequence[float] = WIDE,
    held_out: Sequence[TokenGroup] = (),
) -> PreparedData:
    data = PreparedData(train=[*groups], eval=[*held_out])
    add_density_weights(data, bounds)
    return data


def weights(groups: Sequence[TokenGroup], token: int, *, label: bool = False) -> list[float]:
    return [g.weight for g in groups if g.label is label and token in g.prompt]


def test_undesirable_rows_weigh_the_ratio_of_the_densities_of_their_prompts():
    """Three quarters of the desirable rows have A, and of 800 undesirable ones a fifth.

    p(A | good) / p(A | bad) = 0.75 / 0.2 = 3.75, and of B 0.25 / 0.8 = 0.3125. The ridge and the
    rows that a classifier does not see move them by some hundredths.
    """
    groups = weighed(rows((300, 100), (160, 640))).train
    assert np.mean(weights(groups, A)) == pytest.approx(3.75, rel=0.08)
    assert np.mean(weights(groups, B)) == pytest.approx(0.3125, rel=0.08)
    assert set(weights(groups, A, label=True) + weights(groups, B, label=True)) == {1.0}


def test_weighed_rows_of_both_kinds_have_the_same_prompts():
    """The share of A among undesirable rows, by weight, is that of desirable ones: 0.75.

    And the weights keep their mass: the mean of p/q over rows of q is 1.
    """
    groups = weighed(rows((300, 100), (160, 640))).train
    of_a, of_b = sum(weights(groups, A)), sum(weights(groups, B))
    assert of_a / (of_a + of_b) == pytest.approx(0.75, abs=0.02)
    assert (of_a + of_b) / 800 == pytest.approx(1, abs=0.04)


def test_a_ratio_stays_within_its_bounds():
    data = weighed(rows((300, 100), (160, 640)), (0.5, 2.0))
    assert {*weights(data.train, A)} == {2.0}
    assert {*weights(data.train, B)} == {0.5}
    assert data.notes == [
        "data.density_ratio: undesirable rows weigh 0.5 to 2 by their prompts, 0.8 in the mean; "
        "100% are at a bound"
    ]


def test_the_weight_of_a_row_is_kept_and_counts():
    """A row of weight 3 is three rows to the densities: 0.75 / 0.2 again, times its weight."""
    groups = [
        replace(g, weight=3.0) if g.label and A in g.prompt else replace(g, weight=0.5 * g.weight)
        for g in rows((100, 100), (160, 640))
    ]
    groups = [replace(g, weight=1.0) if g.label and B in g.prompt else g for g in groups]
    found = weighed(groups).train
    assert np.mean(weights(found, A)) == pytest.approx(0.5 * 3.75, rel=0.1)
    assert set(weights(found, A, label=True)) == {3.0}


def test_what_only_single_rows_have_tells_nothing():
    """Labels are drawn with no eye on prompts: the ratio is 1, whatever the tokens of a row."""
    chance = np.random.default_rng(0)
    groups = [
        row(n, *(10 + chance.integers(0, 40, size=6)), label=bool(chance.random() < 0.5))
        for n in range(1500)
    ]
    found = [g.weight for g in weighed(groups).train if g.label is False]
    # Of a classifier that is off by chance, up as often as down.
    assert np.median(found) == pytest.approx(1, abs=0.05)
    # Rows that are judged by a classifier that learned them would be pushed below 1.
    seen = [weighed(groups, held_out=groups).eval]
    own = [g.weight for g in seen[0] if g.label is False]
    assert np.mean(own) < np.mean(found)


def test_few_prompts_with_many_rows_are_told_apart_too():
    """Two conversations in all: parts of conversations would leave one of them unknown."""
    groups = [
        replace(g, prompt_key=str(A in g.prompt), prompt=ids(ALL, A if A in g.prompt else B),
                responses=(ids(OWN + n, 0),))
        for n, g in enumerate(rows((300, 100), (160, 640)))
    ]  # fmt: skip
    assert np.mean(weights(weighed(groups).train, A)) == pytest.approx(3.75, rel=0.08)


def test_a_conversation_is_judged_by_classifiers_that_know_none_of_its_turns():
    """120 conversations of eight rows with one label and a token of their own.

    Their tokens tell each label for certain, to who has seen another row of the conversation.
    """
    groups = [
        replace(row(8 * talk + turn, 10 + talk, label=talk % 2 == 0), prompt_key=f"talk {talk}")
        for talk in range(120)
        for turn in range(8)
    ]
    found = [g.weight for g in weighed(groups).train if g.label is False]
    assert min(found) > 0.7


def test_held_out_rows_are_weighed_by_what_the_training_rows_tell():
    """Also those with tokens that are beyond all that was learned from."""
    held_out = [
        row(10_000, A, label=False), row(10_001, B, label=False), row(10_002, A, label=True)
    ]  # fmt: skip
    found = weighed(rows((300, 100), (160, 640)), held_out=held_out).eval
    assert found[0].weight == pytest.approx(3.75, rel=0.08)
    assert found[1].weight == pytest.approx(0.3125, rel=0.08)
    assert found[2].weight == 1.0


def test_pairs_keep_their_weight():
    pairs = [row(9_000 + n, A, label=None, weight=2.0) for n in range(50)]
    mixed = weighed([*pairs, *rows((300, 100), (160, 640))]).train
    assert {g.weight for g in mixed if g.label is None} == {2.0}
    alone = weighed(rows((300, 100), (160, 640))).train
    assert weights(mixed[50:], A) == weights(alone, A)


@pytest.mark.parametrize(
    "groups",
    [
        rows((40, 40), (0, 0)),
        rows((0, 0), (40, 40)),
        [row(n, A, label=None) for n in range(9)],
        [],
    ],
    ids=["desirable", "undesirable", "pairs", "none"],
)
def test_rows_of_one_kind_are_not_weighed_and_it_is_said(groups: list[TokenGroup]):
    data = weighed(groups)
    assert [g.weight for g in data.train] == [g.weight for g in groups]
    assert data.notes == [
        "data.density_ratio: the training rows have no labels of both kinds, so none is weighed"
    ]


@settings(max_examples=examples(20))
@given(
    labels=st.lists(st.tuples(st.booleans(), st.sampled_from([A, B])), min_size=2, max_size=40),
    order=st.randoms(use_true_random=False),
)
def test_nothing_depends_on_the_order_of_the_rows(labels: list[tuple[bool, int]], order: Random):
    groups = [row(n, token, label=label) for n, (label, token) in enumerate(labels)]
    mixed = [*groups]
    order.shuffle(mixed)
    first = {g.source: g.weight for g in weighed(groups).train}
    assert {g.source: g.weight for g in weighed(mixed).train} == first
    assert all(WIDE[0] <= weight <= WIDE[1] for weight in first.values())
