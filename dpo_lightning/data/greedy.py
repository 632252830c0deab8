"""Items packed one after the other into parts, each of which has room for some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Load = TypeVar("Load")


def pack(
    items: Iterable[Item],
    *,
    start: Callable[[Item], Load],
    join: Callable[[Load, Item], Load | None],
    first_fit: bool = False,
) -> list[list[Item]]:
    """Puts each item into a part with room for it, else into a new one, which takes any.

    Args:
        items: In the order in which they are packed.
        start: Returns the load of a part that holds an item alone.
        join: Returns the load of a part with one more item; None where it has no room for it.
        first_fit: True puts the item into the oldest part with room; else only the newest part is
            asked, and neighbours stay together.

    Example:
        >>> sizes = [3, 2, 2, 1]
        >>> def join(load, i):
        ...     return load + sizes[i] if load + sizes[i] <= 4 else None
        >>> pack(range(4), start=sizes.__getitem__, join=join)
        [[0], [1, 2], [3]]
        >>> pack(range(4), start=sizes.__getitem__, join=join, first_fit=True)
        [[0, 3], [1, 2]]
    """
    parts: list[list[Item]] = []
    loads: list[Load] = []
    for item in items:
        for place in range(0 if first_fit else max(0, len(parts) - 1), len(parts)):
            load = join(loads[place], item)
            if load is not None:
                parts[place].append(item)
                loads[place] = load
                break
        else:
            parts.append([item])
            loads.append(start(item))
    return parts


def pack_costs(
    order: Iterable[int], costs: Sequence[int], budget: int, *, first_fit: bool = False
) -> list[list[int]]:
    """Packs indices into parts whose costs add up to the budget at most, unless one is alone.

    Args:
        order: Indices, in the order in which they are packed.
        costs: Cost of each.
        budget: Most of a part.
        first_fit: As in :func:`pack`.
    """

    def join(load: int, i: int) -> int | None:
        load += costs[i]
        return load if load <= budget else None

    return pack(order, start=costs.__getitem__, join=join, first_fit=first_fit)
