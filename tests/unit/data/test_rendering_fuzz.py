"""Any conversation by real templates: each string is in the text, or the row is named."""

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_lightning.data.conversations import FaultyRow
from tests.support.conversations import TEN, Talk, atoms, real_renderer, strings_given
from tests.support.properties import examples

_ROUNDS = 17
"""Conversations by a template in each example under the long profile; one under the usual."""


def check(name: str, seed: int) -> str:
    """Writes one conversation and counts; the kind of its end."""
    group = Talk(random.Random(seed)).group()
    try:
        rendered = real_renderer(name).render(group)
    except FaultyRow as error:
        named = (error.fault.field, error.fault.problem.startswith("the chat template "))
        return "named" if all(named) else "unnamed"
    prompt, *texts = rendered.texts
    noted = bool(rendered.left_out)
    for text, response in zip(texts, group.responses, strict=True):
        own = strings_given(response, "")
        assert text.startswith(prompt)
        # Of the response all is scored: nothing of it stands in the prompt.
        assert not own - atoms(text[len(prompt) :]), (name, seed)
        needed = strings_given(group.prompt, group.tools, thoughts=not noted)
        assert not needed + own - atoms(text), (name, seed)
    return "noted" if noted else "whole"


@settings(max_examples=examples(6))
@given(seed=st.integers(0, 2**40))
def test_each_string_is_in_the_text_or_the_row_is_named(seed):
    rounds = _ROUNDS if settings().max_examples > 100 else 1
    for number, name in enumerate(TEN * rounds):
        assert check(name, seed + number) != "unnamed"


def test_the_conversations_are_of_all_kinds():
    """All three ends are come to, so that the property says something."""
    ends = Counter(check(name, seed) for name in ("qwen3", "llama3") for seed in range(60))
    assert min(ends[end] for end in ("named", "noted", "whole")) >= 3, ends
