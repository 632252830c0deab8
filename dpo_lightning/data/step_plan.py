"""Assignment of the groups of a step to ranks and micro-batches, and their order in an epoch."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from dpo_lightning.data.greedy import pack_costs


def plan_step(
    costs: Sequence[int], *, world_size: int, micro_batch_tokens: int, equal_counts: bool = False
) -> list[list[list[int]]]:
    """Shares the groups of one step out over ranks and micro-batches.

    The longest group goes first, to the rank with the fewest tokens so far, so that no two ranks
    differ by more than the longest group. Within a rank they are packed into few micro-batches and
    then shared out evenly over as many, as far as the budget allows. A group over the budget gets a
    micro-batch of its own. The result depends on the arguments alone.

    Args:
        costs: Tokens of each group of the step.
        world_size: Number of ranks.
        micro_batch_tokens: Most tokens of a micro-batch.
        equal_counts: True if all ranks are to have as many micro-batches, for strategies whose
            ranks meet in every forward pass: some are split, and a rank with too few groups gets
            empty ones.

    Returns:
        For each rank a list of micro-batches, each a list of indices into ``costs`` in ascending
        order. A rank without groups has no micro-batches, or empty ones with ``equal_counts``.

    Example:
        >>> plan_step([5, 9, 4, 2], world_size=2, micro_batch_tokens=9)
        [[[1], [3]], [[0, 2]]]
    """
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    shares = _share_out(order, costs, world_size)
    plan = [_micro_batches(share, costs, micro_batch_tokens) for share in shares]
    if equal_counts:
        count = max(map(len, plan))
        plan = [_split_up(micro_batches, costs, count) for micro_batches in plan]
    return [[sorted(micro) for micro in micro_batches] for micro_batches in plan]


def _share_out(order: Sequence[int], costs: Sequence[int], parts: int) -> list[list[int]]:
    """Each in turn to the part with the least so far."""
    shares: list[list[int]] = [[] for _ in range(parts)]
    loads = [(0, part) for part in range(parts)]
    for i in order:
        load, part = heapq.heappop(loads)
        shares[part].append(i)
        heapq.heappush(loads, (load + costs[i], part))
    return shares


def _micro_batches(share: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Few micro-batches, as even as the budget allows: never more than first-fit needs."""
    packed = pack_costs(share, costs, budget, first_fit=True)
    for count in range(max(1, -(-sum(costs[i] for i in share) // budget)), len(packed) + 1):
        even = _share_out(share, costs, count)
        if all(len(micro) == 1 or sum(costs[i] for i in micro) <= budget for micro in even):
            return even
    return packed


def _split_up(micro_batches: list[list[int]], costs: Sequence[int], count: int) -> list[list[int]]:
    """The same groups in ``count`` micro-batches: the largest are split, then empty ones follow."""
    found = [*micro_batches]
    while len(found) < count:
        splittable = [micro for micro in found if len(micro) > 1]
        if not splittable:
            found.append([])
            continue
        largest = max(splittable, key=lambda micro: sum(costs[i] for i in micro))
        found.remove(largest)
        found += _share_out(largest, costs, 2)
    return found


def epoch_order(n: int, *, seed: int, epoch: int) -> list[int]:
    """The order of ``n`` groups in an epoch: a function of the seed and the epoch alone."""
    return [int(i) for i in np.random.default_rng([seed, epoch]).permutation(n)]
