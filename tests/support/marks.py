"""A plugin with a judge that needs no model."""

import itertools
from collections.abc import Iterator, Sequence

from dpo_lightning.plugins import Prompt, register_scorer


@register_scorer("brevity")
def brevity(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
    return [-float(len(answer)) for answer in answers]


# Numbers of the calls of the judge below; a test sets it back.
calls: Iterator[int] = itertools.count(1)


@register_scorer("fickle")
def fickle(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
    """Marks once, and then fails."""
    if next(calls) > 1:
        raise RuntimeError("no more marks")
    return brevity(prompts, answers)
