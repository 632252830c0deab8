"""Noise that is a hash: its numbers, what they depend on, and the tokens that it draws."""

import math

import numpy as np
import pytest
import torch

from dpo_lightning.evaluation.noise import answer_keys, draw_tokens, mixed, occurrences, waits
from tests.support.noise import race, wait


def test_the_hash_is_splitmix64():
    """The first numbers of its published generator with seed 1234567, which adds a constant."""
    step = 0x9E3779B97F4A7C15
    states = [(1234567 + n * step) % 2**64 for n in (1, 2, 3)]
    signed = torch.tensor([s - 2**64 if s >> 63 else s for s in states])
    found = [value % 2**64 for value in mixed(signed).tolist()]
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_waiting_times_are_those_of_whole_numbers():
    """Written out with Python's numbers, which have no sign and no end."""
    keys = [5, -7, 2**63 - 1]
    found = waits(torch.tensor(keys), 3, 6)
    expected = [[wait(key, 3, place) for place in range(6)] for key in keys]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_waiting_times_are_exponential():
    """Of 40,000 with mean 1 and deviation 1 the mean is within 4/200; 1/e of them are above 1."""
    found = waits(torch.arange(200), 0, 200)
    assert (found > 0).all()
    assert abs(found.mean() - 1) < 0.02
    share = (found > 1).double().mean()
    assert abs(share - math.exp(-1)) < 4 * math.sqrt(0.37 * 0.63 / 40_000)
    # Neither neighbours nor the same place of two keys have to do with each other: 4/200 again.
    for one, other in ((found[:, 1:], found[:, :-1]), (found[1:], found[:-1])):
        assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.02


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 16, 70])
def test_tokens_come_with_their_probability(vocabulary):
    """Of 4000 draws each share lies within 4.5 standard errors, sqrt(p(1-p)/4000), of p.

    At temperature 1/2 the scores are doubled: p = softmax(2 scores).
    """
    scores = torch.linspace(-1.5, 1.0, vocabulary)[torch.randperm(vocabulary)]
    count = 4000
    keys = torch.arange(count) * 977
    tokens, finite = draw_tokens(scores.expand(count, -1), keys, 3, temperature=0.5)
    p = (2 * scores.double()).softmax(0)
    shares = torch.bincount(tokens, minlength=vocabulary) / count
    assert len(shares) == vocabulary
    assert finite.all()
    assert ((shares - p).abs() <= 4.5 * (p * (1 - p) / count).sqrt()).all()


def test_a_token_is_that_of_the_race_written_out():
    draw = torch.Generator().manual_seed(1)
    scores = torch.randn(40, 37, generator=draw) * 3
    keys = torch.arange(40) - 20
    for step, temperature in ((0, 1.0), (7, 0.7)):
        found, _ = draw_tokens(scores, keys, step, temperature=temperature)
        assert found.tolist() == [
            race(row.tolist(), key, step, temperature)
            for row, key in zip(scores, keys.tolist(), strict=True)
        ]


def test_a_little_rounding_seldom_changes_a_token():
    """Scores moved by 1e-6 or so: a race has another winner about once in a million draws."""
    draw = torch.Generator().manual_seed(2)
    scores = torch.randn(1, 2048, generator=draw).expand(5_000, -1)
    moved = scores + 1e-6 * torch.randn(1, 2048, generator=draw)
    keys = torch.arange(5_000)
    one, other = (draw_tokens(s, keys, 0, temperature=1.0)[0] for s in (scores, moved))
    assert (one != other).sum() <= 1


def test_what_has_no_probability_is_not_drawn_and_what_is_no_distribution_is_said():
    """A block of tokens that cannot come never wins, and the last block is not a whole one."""
    scores = torch.full((500, 21), -torch.inf)
    scores[:, 20] = -300.0
    tokens, finite = draw_tokens(scores, torch.arange(500), 0, temperature=1.0)
    assert (tokens == 20).all()
    assert finite.all()
    scores[1, 3], scores[2, 3] = torch.nan, torch.inf
    scores[3, 20] = -torch.inf
    tokens, finite = draw_tokens(scores, torch.arange(500), 0, temperature=1.0)
    assert finite[:5].tolist() == [True, False, False, False, True]
    assert ((tokens >= 0) & (tokens < 21)).all()


def test_a_key_is_of_all_that_an_answer_belongs_to():
    prompt = np.array([3, 4], dtype=np.int32)
    plain = {"seed": 1, "round": 1, "occurrence": 0, "count": 3}
    changes = [{}, {"seed": 2}, {"round": 2}, {"occurrence": 1}]
    found = [key for change in changes for key in answer_keys(prompt, **(plain | change))]
    found += answer_keys(prompt[::-1], **plain) + answer_keys(prompt[:1], **plain)
    assert len(set(found)) == len(found) == 18
    assert answer_keys(prompt.astype(np.int64), **plain) == found[:3]
    assert answer_keys(prompt, **(plain | {"count": 1})) == found[:1]
    assert all(-(2**63) <= key < 2**63 for key in found)
    assert min(found) < 0 < max(found)


def test_a_prompt_that_was_there_is_counted():
    one, other = np.array([1, 2]), np.array([1])
    assert occurrences([one, other, one.astype(np.int32), one]) == [0, 0, 1, 2]
