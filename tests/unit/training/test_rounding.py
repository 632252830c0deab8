"""Rounding by chance, and the random bits that are a function of an element's place."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.training import rounding
from dpo_lightning.training.rounding import (
    first_element,
    noise_key,
    noise_of,
    round_by_chance,
    round_finite,
    scramble,
    signed,
)
from tests.support.properties import examples
from tests.support.ranks import on_ranks

CPU = torch.device("cpu")
MASK = (1 << 32) - 1


def plain_bits(element: int, key: tuple[int, int]) -> int:
    """The hash in Python's integers, modulo 2^32."""
    x = (element ^ key[0]) & MASK
    x ^= x >> 16
    x = x * 0x7FEB352D & MASK
    x ^= x >> 15
    x = (x + key[1]) * 0x846CA68B & MASK
    return x ^ (x >> 16)


def noise(count: int, seed: int = 0) -> torch.Tensor:
    return noise_of(count, 0, noise_key(seed, 1, 0), CPU)


@settings(max_examples=examples(25))
@given(
    value=st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: abs(x) > 2.0**-100),
    seed=st.integers(0, 2**31),
)
def test_rounding_gives_a_neighbour_and_its_mean_is_the_value(value: float, seed: int):
    """Over n draws the number that goes up is n f, within what chance explains.

    f is the place of the value between its two neighbours. By Bernstein's inequality the number is
    off by t or more with a probability of at most 2 exp(-t^2 / (2 (n f (1-f) + t / 3))): of 1e-9
    where t^2 = 43 (n f (1-f) + t / 3). For small f, where few go up, that is more than some
    standard errors.
    """
    n = 4096
    drawn = round_by_chance(torch.full((n,), value), noise(n, seed)).double()
    bits = torch.tensor(value).view(torch.int32)
    low = (bits & -(1 << 16)).view(torch.float32).double().item()
    high = ((bits & -(1 << 16)) + (1 << 16)).view(torch.float32).double().item()
    assert set(drawn.tolist()) <= {low, high}
    place = (value - low) / (high - low)
    limit = 43 / 6 + math.sqrt((43 / 6) ** 2 + 43 * n * place * (1 - place))
    assert abs((drawn == high).sum().item() - n * place) <= limit


@given(st.integers(-(2**15), 2**15 - 1), st.sampled_from([0, 1, 2**31 - 1]))
def test_what_bfloat16_can_hold_is_not_changed(upper: int, seed: int):
    value = torch.tensor([upper << 16], dtype=torch.int32).view(torch.float32)
    rounded = round_by_chance(value, noise(1, seed))
    assert torch.equal(rounded, value) or value.isnan()
    assert rounded.isnan().equal(value.isnan())


def test_no_bits_of_a_nan_become_a_number():
    """The upper half of 0x7FFFFFFF plus anything would turn over to -0."""
    worst = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for seed in range(20):
        assert round_by_chance(worst, noise(2, seed)).isnan().all()


def test_finite_numbers_are_rounded_in_place_alike():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 3
    expected = round_by_chance(values, noise(1000))
    assert torch.equal(round_finite(values, noise(1000)), expected)
    assert torch.equal(expected.bfloat16().float(), expected)


@settings(max_examples=examples(25))
@given(
    start=st.integers(0, 2**34), seed=st.integers(0, 2**32 - 1), step=st.integers(1, 10**6),
    parameter=st.integers(0, 999),
)  # fmt: skip
def test_the_bits_are_those_of_the_hash_in_plain_integers(start, seed, step, parameter):
    key = noise_key(seed, step, parameter)
    numbers = torch.arange(5, dtype=torch.int32) + signed(start)
    found = scramble(numbers.clone(), key)
    expected = [plain_bits(start + n, key) for n in range(5)]
    assert [value & MASK for value in found.tolist()] == expected
    # With room that is given, and without.
    assert torch.equal(scramble(numbers.clone(), key, torch.empty_like(numbers)), found)
    assert rounding.low_bits(found).tolist() == [value & 0xFFFF for value in expected]
    assert rounding.high_bits(found).tolist() == [value >> 16 for value in expected]
    third = [(value * 0x9E3779B1 & MASK) >> 16 for value in expected]
    assert rounding.other_bits(found).tolist() == third


def test_all_halves_are_even_and_neither_follows_the_other():
    """2^20 numbers in 256 bins: chi-squared of 255 degrees is below 400 but once in 10^8.

    Standard deviation 22.6. Products of two halves less their means, over their variances
    (2^16)^2 / 12, have a standard error of 2^-10 over 2^20 elements; so has an element with its
    neighbour, and with itself a step, a seed or a parameter later.
    """
    count = 1 << 20
    halves = []
    for key in (noise_key(7, 1, 0), noise_key(7, 2, 0), noise_key(8, 1, 0), noise_key(7, 1, 1)):
        bits = scramble(torch.arange(count, dtype=torch.int32), key)
        halves += [rounding.high_bits(bits), rounding.low_bits(bits), rounding.other_bits(bits)]
    for half in halves:
        counts = torch.bincount(half >> 8, minlength=256).double()
        expected = count / 256
        assert ((counts - expected).square() / expected).sum().item() < 400
    centred = torch.stack(halves).double() - (2**16 - 1) / 2
    correlation = centred @ centred.T / count / (2**32 / 12)
    off = correlation - torch.eye(len(halves))
    assert off.abs().max().item() < 6 * 2**-10
    neighbours = (centred[:, 1:] * centred[:, :-1]).mean(1) / (2**32 / 12)
    assert neighbours.abs().max().item() < 6 * 2**-10


def test_keys_differ_by_all_that_they_are_made_of():
    keys = {noise_key(s, n, p) for s in (1, 2) for n in (1, 2) for p in (0, 1)}
    assert len(keys) == 8
    assert all(-(2**31) <= word < 2**31 for key in keys for word in key)


def test_noise_begins_where_it_is_asked_to():
    key = noise_key(3, 5, 2)
    whole = noise_of(100, 0, key, CPU)
    assert torch.equal(noise_of(40, 60, key, CPU), whole[60:])
    # 2^32 elements on, the bits come again.
    assert torch.equal(noise_of(100, 1 << 32, key, CPU), whole)


# Shards ------------------------------------------------------------------------------------------


def _first_elements(rank: int) -> list[int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    found = []
    for rows, width in ((5, 3), (1, 4), (4, 1)):
        whole = torch.arange(float(rows * width)).view(rows, width)
        shard = distribute_tensor(whole, mesh, [Shard(0)])
        begin, local = first_element(shard), shard.to_local()
        # It is the number of the element, and here its value.
        assert local.numel() == 0 or local.flatten()[0].item() == begin
        found.append(begin)
    assert first_element(distribute_tensor(torch.ones(4, 2), mesh, [Replicate()])) == 0
    with pytest.raises(ValueError, match="not by rows"):
        first_element(distribute_tensor(torch.ones(4, 2), mesh, [Shard(1)]))
    return found


def test_a_shard_knows_its_first_element(tmp_path):
    """Five rows of 3 are three and two; one row is one and none."""
    assert on_ranks(_first_elements, tmp_path) == [[0, 0, 0], [9, 4, 2]]
