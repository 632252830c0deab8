"""Greedy packing: the one loop beside each of the loops that it stands for, written out."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.greedy import pack, pack_costs
from tests.support.properties import examples

costs = st.lists(st.integers(0, 12), max_size=30)
budgets = st.integers(1, 30)


def first_fit(order, costs, budget):
    """Puts each item into the first part with room."""
    parts, room = [], []
    for i in order:
        for place, left in enumerate(room):
            if costs[i] <= left:
                parts[place].append(i)
                room[place] -= costs[i]
                break
        else:
            parts.append([i])
            room.append(budget - costs[i])
    return parts


def next_fit(order, costs, budget):
    """Puts each item into the last part, if that has room."""
    parts, room = [], 0
    for i in order:
        if not parts or costs[i] > room:
            parts.append([])
            room = budget
        parts[-1].append(i)
        room -= costs[i]
    return parts


@settings(max_examples=examples(200))
@given(costs, budgets, st.randoms(use_true_random=False))
def test_costs_are_packed_as_by_the_loops_written_out(costs, budget, random):
    order = list(range(len(costs)))
    random.shuffle(order)
    assert pack_costs(order, costs, budget) == next_fit(order, costs, budget)
    assert pack_costs(order, costs, budget, first_fit=True) == first_fit(order, costs, budget)


@settings(max_examples=examples(200))
@given(costs, budgets)
def test_all_are_packed_in_their_order_and_only_one_alone_is_over_the_budget(costs, budget):
    for fits_first in (False, True):
        parts = pack_costs(range(len(costs)), costs, budget, first_fit=fits_first)
        assert sorted(i for part in parts for i in part) == list(range(len(costs)))
        assert all(part == sorted(part) for part in parts)
        assert all(len(part) == 1 or sum(costs[i] for i in part) <= budget for part in parts)


def test_what_a_part_holds_need_not_be_a_sum():
    """By hand: at most twice the widest. 4 alone; 3 with 1 (2 x 3 <= 6); 3, 1, 1 would be 9."""

    def join(load, width):
        count, widest = load[0] + 1, max(load[1], width)
        return (count, widest) if count * widest <= 6 else None

    assert pack([4, 3, 1, 1, 1], start=lambda width: (1, width), join=join) == [
        *([4], [3, 1], [1, 1]),
    ]
    assert pack([], start=lambda width: (1, width), join=join) == []
