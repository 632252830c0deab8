"""Token ids within the limit: which part gives way, and which responses can still be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Ranked = list[tuple[list[int], int]]
"""Token ids of responses with their ranks."""


class Lengths(NamedTuple):
    """Longest prompt + response in tokens, what gives way above it, and what the model takes.

    Attributes:
        max_length: Of the longest response.
        truncation: ``drop``, ``prompt`` or ``response``.
        positions: Most tokens that the model takes; None where it has no limit, or none is known.
    """

    max_length: int
    truncation: str
    positions: int | None = None


def shortened(
    prompt_ids: list[int], kept: Ranked, bos: int | None, limits: Lengths, *, alone: bool = False
) -> tuple[list[int], Ranked, list[str]] | str:
    """Prompt and responses within the limit and what was changed, or why the group is dropped.

    Args:
        prompt_ids: Token ids of the prompt.
        kept: Those of the responses, with their ranks.
        bos: The id that a prompt keeps at its beginning; None for none.
        limits: The limit.
        alone: True if there is one response, which has a label and no partner.
    """
    max_length, truncation, _ = limits
    excess = len(prompt_ids) + max(len(ids) for ids, _ in kept) - max_length
    if excess <= 0:
        return prompt_ids, kept, []
    if truncation == "drop":
        return "too_long"
    if truncation == "prompt":
        first = 1 if prompt_ids[0] == bos and len(prompt_ids) > 1 else 0
        if len(prompt_ids) - excess <= first:
            return "too_long"
        prompt_ids = prompt_ids[:first] + prompt_ids[first + excess :]
        return prompt_ids, kept, ["truncated_prompt"]
    cut = _cut(kept, max(0, max_length - len(prompt_ids)))
    if not usable(cut, alone=alone):
        return "too_long" if alone else "nothing_to_compare"
    whole = all(response in kept for response in cut)
    return prompt_ids, cut, [] if whole else ["truncated_response"]


def _cut(responses: Sequence[tuple[list[int], int]], length: int) -> list[tuple[list[int], int]]:
    """Cuts responses to ``length`` and keeps the best of those that became the same."""
    cut: list[tuple[list[int], int]] = []
    for ids, rank in responses:
        short = ids[:length]
        if short and not any(short == other for other, _ in cut):
            cut.append((short, rank))
    return cut


def comparable(responses: Sequence[tuple[list[int], int]]) -> bool:
    """True if any two of the (different) responses are strictly ranked."""
    return len({rank for _, rank in responses}) > 1


def usable(responses: Sequence[tuple[list[int], int]], *, alone: bool) -> bool:
    """True if they can be trained on: two that are strictly ranked, or one that has a label."""
    return bool(responses) if alone else comparable(responses)
