"""Sample of the held-out groups: by the rows alone, even over prompts, one inside the other."""

import random
from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.held_out import LOTS, choose_evaluated, lot_of
from dpo_lightning.data.tokens import TokenGroup
from tests.support.properties import examples
from tests.support.reference_caches import pair


def group(key: str, number: int = 0) -> TokenGroup:
    return replace(pair((1, 2), (3, number), (4, 0)), prompt_key=key)


def content(groups: list[TokenGroup], most: int) -> Counter[tuple[str, bytes]]:
    """The chosen groups, as what they hold."""
    chosen = choose_evaluated(groups, most)
    taken = groups if chosen is None else [groups[number] for number in chosen]
    return Counter((own.prompt_key, own.responses[0].tobytes()) for own in taken)


def test_all_are_taken_where_there_are_no_more():
    groups = [group(str(i)) for i in range(5)]
    assert choose_evaluated(groups, None) is None
    assert choose_evaluated(groups, 5) is None
    assert choose_evaluated([], 1) is None
    chosen = choose_evaluated(groups, 4)
    assert chosen is not None
    assert len(chosen) == 4


def test_the_lowest_lots_are_taken():
    """Prompts with one group each: the sample is the lowest hashes, named in the rows' order."""
    groups = [group(f"prompt {i}") for i in range(40)]
    lots = {number: lot_of(own.prompt_key) for number, own in enumerate(groups)}
    assert len({*lots.values()}) == 40
    assert all(0 <= lot < LOTS for lot in lots.values())
    lowest = sorted(lots, key=lots.__getitem__)[:7]
    assert choose_evaluated(groups, 7) == sorted(lowest)


def test_a_lot_is_that_of_blake2b():
    """BLAKE2b of 64 bits of "s:Hi", as `printf s:Hi | b2sum -l 64` prints it."""
    assert lot_of("s:Hi") == 0x82F4B89C3A496EC1


def test_groups_of_one_prompt_are_spread_over_all_lots():
    """Groups k of 100 stand at L + k/100 of all lots: a fifth of all lots has 20, or one beside.

    So a sample of 60 out of three prompts' 300 has 19 to 21 of each, wherever their lots are.
    """
    groups = [group(key, number) for key in ("a", "b", "c") for number in range(100)]
    chosen = choose_evaluated(groups, 60)
    assert chosen is not None
    found = Counter(groups[number].prompt_key for number in chosen)
    assert found.total() == 60
    assert all(19 <= count <= 21 for count in found.values())


@settings(max_examples=examples(30))
@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 9)), max_size=30),
    st.integers(1, 30),
    st.integers(0, 30),
    st.randoms(use_true_random=False),
)
def test_any_sample_is_of_its_size_whatever_the_order_and_in_every_larger_one(
    rows, most, more, draw: random.Random
):
    groups = [group(key, number) for key, number in rows]
    found = content(groups, most)
    assert found.total() == min(most, len(groups))
    shuffled = [*groups]
    draw.shuffle(shuffled)
    assert content(shuffled, most) == found
    assert found <= content(groups, most + more)
