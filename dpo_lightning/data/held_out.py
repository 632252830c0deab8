"""Sample of the held-out groups that an evaluation sees, decided by the rows alone.

Each prompt has a lot, a number that a hash makes of its text. The sample is the groups of the
lowest lots: the same whatever the order of the rows, the seed and the split; a larger sample holds
a smaller one. The reference's blocks are in the order of the lots too, so that a sample is in few.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from dpo_lightning.data.tokens import TokenGroup

LOTS = 1 << 64
"""Lots are below this."""


def lot_of(prompt_key: str) -> int:
    """The lot of a prompt.

    Args:
        prompt_key: Identifies its text.
    """
    text = prompt_key.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def choose_evaluated(groups: Sequence[TokenGroup], most: int | None) -> list[int] | None:
    """Numbers of the groups that an evaluation sees, ascending; None where it sees all.

    Args:
        groups: The held-out groups.
        most: Size of the sample; None is all.
    """
    return None if most is None or len(groups) <= most else sorted(in_lots(groups)[:most])


def within_tokens(groups: Sequence[TokenGroup], costs: Sequence[int], budget: float) -> list[int]:
    """Numbers of the first groups by their lots that have no more tokens together, ascending.

    Args:
        groups: Those to choose from.
        costs: Tokens of each.
        budget: Most tokens of the sample.
    """
    chosen, spent = [], 0
    for number in in_lots(groups):
        spent += costs[number]
        if spent > budget:
            break
        chosen.append(number)
    return sorted(chosen)


def in_lots(groups: Sequence[TokenGroup]) -> list[int]:
    """Numbers of groups in the order of their lots: each beginning of it is a sample.

    Groups of one prompt are spread evenly over all lots, from the prompt's on. So each group comes
    in with the same probability, and of many prompts with many groups each has its share.

    Args:
        groups: The held-out groups.
    """
    of_prompt: dict[str, list[int]] = defaultdict(list)
    for number, group in enumerate(groups):
        of_prompt[group.prompt_key].append(number)
    lots: list[tuple[int, int]] = []
    for key, numbers in of_prompt.items():
        first, count = lot_of(key), len(numbers)
        if count > 1:
            numbers.sort(key=lambda number: _content(groups[number]))
        lots += [
            ((first + place * LOTS // count) % LOTS, number) for place, number in enumerate(numbers)
        ]
    return [number for _, number in sorted(lots)]


def _content(group: TokenGroup) -> tuple[object, ...]:
    """All of a group but its place, to sort by."""
    responses = [own.tobytes() for own in group.responses]
    own = (responses, group.ranks, group.weight, group.target_margin, group.confidence)
    return own if group.label is None else (*own, group.label)
