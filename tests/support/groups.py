"""Token groups made by hand."""

import numpy as np

from dpo_lightning.data.tokens import TokenGroup


def ids(*values):
    return np.array(values, dtype=np.int32)


def token_group(key="q", number=0):
    return TokenGroup(
        prompt=ids(1, 2),
        responses=(ids(3, 0), ids(4, 5, 0)),
        ranks=(1, 2),
        weight=1.0,
        source=f"rows.jsonl:{number}",
        prompt_key=key,
    )


def group(prompt: int, *responses: int) -> TokenGroup:
    """A group of the given numbers of tokens, drawn at random."""
    draw = np.random.default_rng(prompt)
    ids = [draw.integers(3, 200, n).astype(np.int32) for n in (prompt, *responses)]
    return TokenGroup(ids[0], tuple(ids[1:]), tuple(range(1, len(ids))), 1.0, "f:1", "key")
