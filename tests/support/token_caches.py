"""Token caches of groups with a template."""

import numpy as np

from dpo_lightning.data.rows import PreferenceGroup
from dpo_lightning.data.texts import Message
from dpo_lightning.data.token_cache import tokenize_once

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def group(prompt, *responses, ranks=None, weight=1.0, source="f:1") -> PreferenceGroup:
    ranks = ranks or tuple(range(1, len(responses) + 1))
    return PreferenceGroup(prompt, responses, ranks, weight, None, source)


GROUPS = [
    group("Add 1.", " 2", " 3", source="f:1"),
    group("far too long " * 20, " a", " b", source="f:2"),
    group((Message("user", "Hi é"),), "you", "me", "nobody", ranks=(1, 2, 2), source="f:3"),
    group("same", " x", " x", source="f:4"),
    group("Add 1.", " 2", " 4", weight=2.5, source="f:5"),
]


def tokens(folder, tokenizer, groups=GROUPS, *, max_length=60, truncation="drop", options=None):
    return tokenize_once(
        groups,
        tokenizer,
        max_length=max_length,
        truncation=truncation,
        folder=folder,
        options=options,
    )


def same(one, other) -> bool:
    assert (one.dropped, one.changed, one.notes) == (other.dropped, other.changed, other.notes)
    assert len(one.groups) == len(other.groups)
    for a, b in zip(one.groups, other.groups, strict=True):
        assert np.array_equal(a.prompt, b.prompt)
        assert len(a.responses) == len(b.responses)
        assert all(map(np.array_equal, a.responses, b.responses))
        assert (a.ranks, a.weight, a.target_margin, a.source, a.prompt_key) == (
            *(b.ranks, b.weight, b.target_margin, b.source),
            b.prompt_key,
        )
        assert a.prompt.dtype == b.prompt.dtype == np.int32
    return True
