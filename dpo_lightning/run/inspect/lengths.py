"""Lengths of groups in tokens: histograms, length bias, and what truncation takes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_lightning.data.groups import PreferenceGroup
from dpo_lightning.data.templates import TemplateOptions
from dpo_lightning.data.tokens import TokenGroup, tokenize_groups

_BARS = 12
# More than any text has.
_WHOLE = 1 << 40


def lengths_of(groups: Sequence[TokenGroup]) -> dict[str, Any]:
    """Lengths of prompts, responses and whole groups, in tokens.

    Args:
        groups: The groups that are used.
    """
    return {
        "prompt": summary([len(group.prompt) for group in groups]),
        "response": summary([len(ids) for group in groups for ids in group.responses]),
        "group": summary([group.tokens for group in groups]),
    }


def summary(lengths: Sequence[int]) -> dict[str, Any] | None:
    """Mean, quantiles and a histogram of whole numbers; None of none.

    Args:
        lengths: The numbers, none below 0.
    """
    if not lengths:
        return None
    values = np.asarray(lengths)
    return {
        "count": len(values),
        "min": int(values.min()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "p95": float(np.percentile(values, 95)),
        "max": int(values.max()),
        "histogram": _histogram(values),
    }


def _histogram(values: npt.NDArray[Any]) -> list[dict[str, int]]:
    """Bars of one width, a round number, from the smallest to the largest; ``to`` is left out."""
    low, high = int(values.min()), int(values.max())
    width = _round_up((high - low + 1) / _BARS)
    first = low // width
    counts = np.bincount(values // width - first)
    return [
        {"from": (first + bar) * width, "to": (first + bar + 1) * width, "count": int(count)}
        for bar, count in enumerate(counts)
    ]


def _round_up(number: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, and so on."""
    power = 1
    while 10 * power < number:
        power *= 10
    return next(step * power for step in (1, 2, 5, 10) if step * power >= number)


def length_bias(groups: Iterable[TokenGroup]) -> dict[str, Any]:
    """Share of the strictly ranked pairs whose better response is longer, and the difference.

    Args:
        groups: The groups that are trained on.

    Returns:
        ``pairs``, ``chosen_longer``, ``rejected_longer``, ``equal`` (counts), ``share`` of the
        first among all pairs, and ``mean_difference``, chosen minus rejected in tokens; the last
        two are None without a pair.
    """
    differences = [
        len(better) - len(worse)
        for group in groups
        for better, rank in zip(group.responses, group.ranks, strict=True)
        for worse, other in zip(group.responses, group.ranks, strict=True)
        if rank < other
    ]
    longer = sum(difference > 0 for difference in differences)
    shorter = sum(difference < 0 for difference in differences)
    count = len(differences)
    return {
        "pairs": count,
        "chosen_longer": longer,
        "rejected_longer": shorter,
        "equal": count - longer - shorter,
        "share": longer / count if count else None,
        "mean_difference": sum(differences) / count if count else None,
    }


def truncation(
    rows: Sequence[PreferenceGroup],
    used: Iterable[TokenGroup],
    tokenizer: Any,
    *,
    max_length: int,
    how: str,
    options: TemplateOptions | None,
) -> dict[str, Any]:
    """Groups and tokens that ``data.max_length`` takes.

    Only rows that may have lost something are written as tokens once more, whole: those that are
    not used, and those that are just as long as is allowed.

    Args:
        rows: The rows that were read, of all sources.
        used: The groups that are left of them.
        tokenizer: The tokenizer, with the run's chat template.
        max_length: Longest prompt + response.
        how: ``data.truncation``.
        options: Options of the chat template.

    Returns:
        ``max_length``, ``how``, ``whole`` (lengths of prompt + longest response of all rows that
        compare responses, before truncation); ``groups_cut`` and ``tokens_cut`` of those that
        stay, ``groups_dropped`` and ``tokens_dropped`` of those that go for their length.
    """
    left: dict[str, list[TokenGroup]] = defaultdict(list)
    for group in used:
        left[group.source].append(group)
    suspects: list[tuple[PreferenceGroup, TokenGroup | None]] = []
    lengths: list[int] = []
    for row in rows:
        kept = left[row.source].pop(0) if left[row.source] else None
        if kept is None or _longest(kept) >= max_length:
            suspects.append((row, kept))
        else:
            lengths.append(_longest(kept))
    counts = dict.fromkeys(("groups_cut", "tokens_cut", "groups_dropped", "tokens_dropped"), 0)
    whole: dict[str, list[TokenGroup]] = defaultdict(list)
    again = [row for row, _ in suspects]
    for group in tokenize_groups(
        again, tokenizer, max_length=_WHOLE, truncation="drop", options=options
    ).groups:
        whole[group.source].append(group)
        lengths.append(_longest(group))
    for row, kept in suspects:
        full = whole[row.source].pop(0) if whole[row.source] else None
        if full is None or _longest(full) <= max_length:
            continue  # it went for something else, or is just as long as it may be
        kind = "dropped" if kept is None else "cut"
        counts[f"groups_{kind}"] += 1
        counts[f"tokens_{kind}"] += full.tokens - (0 if kept is None else kept.tokens)
    return {"max_length": max_length, "how": how, "whole": summary(lengths), **counts}


def _longest(group: TokenGroup) -> int:
    """Tokens of the prompt with the longest response."""
    return len(group.prompt) + max(map(len, group.responses))
