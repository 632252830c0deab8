"""A plugin with a judge that needs no model."""

from collections.abc import Sequence

from dpo_lightning.plugins import Prompt, register_scorer


@register_scorer("brevity")
def brevity(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
    return [-float(len(answer)) for answer in answers]
