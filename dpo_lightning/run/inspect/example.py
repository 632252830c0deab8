"""One group token by token: its prompt, and the scored tokens of each response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dpo_lightning.data.tokens import TokenGroup

MOST_TOKENS = 400
"""Tokens of a prompt, or of a response, that are shown; of a prompt its last ones."""

# Longest character in bytes, each of which may be a token.
_BYTES = 4
_BROKEN = "\ufffd"


def example_of(group: TokenGroup, tokenizer: Any, *, number: int) -> dict[str, Any]:
    """A group as texts of its tokens.

    Args:
        group: The group.
        tokenizer: The tokenizer.
        number: Its place among the training groups, from 1.

    Returns:
        ``number``, ``source``, ``label`` (None where responses are compared), ``prompt`` and
        ``responses``; of each its ``length`` in tokens, how many of them are ``left_out``, and
        ``tokens``: ``ids`` (several where only together they are text), ``text`` and ``special``. A
        response has its ``rank`` too.
    """
    prompt = group.prompt.tolist()
    return {
        "number": number,
        "source": group.source,
        "label": group.label,
        "prompt": _part(prompt, prompt[-MOST_TOKENS:], tokenizer),
        "responses": [
            {"rank": rank, **_part(ids.tolist(), ids.tolist()[:MOST_TOKENS], tokenizer)}
            for ids, rank in zip(group.responses, group.ranks, strict=True)
        ],
    }


def _part(ids: Sequence[int], shown: Sequence[int], tokenizer: Any) -> dict[str, Any]:
    special = frozenset(tokenizer.all_special_ids)
    return {
        "length": len(ids),
        "left_out": len(ids) - len(shown),
        "tokens": [
            {"ids": own, "text": text, "special": any(i in special for i in own)}
            for own, text in pieces(shown, tokenizer)
        ],
    }


def pieces(ids: Sequence[int], tokenizer: Any) -> Iterator[tuple[list[int], str]]:
    """Yields tokens with their texts, which together are the text of all.

    A token's text depends on the one before it, such as the space of a word; and a character may
    be several tokens, which then come as one.

    Args:
        ids: Token ids.
        tokenizer: The tokenizer.
    """

    def decode(part: Sequence[int]) -> str:
        return str(
            tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    before = read = 0
    for end in range(1, len(ids) + 1):
        known, now = decode(ids[before:read]), decode(ids[before:end])
        is_part = now.endswith(_BROKEN) and end < len(ids) and end - read < _BYTES
        if is_part:
            continue
        own = list(ids[read:end])
        yield own, now[len(known) :] if now.startswith(known) else decode(own)
        before, read = read, end
