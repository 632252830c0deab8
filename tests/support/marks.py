"""A plugin with a judge that needs no model."""

from dpo_lightning.plugins import register_scorer


@register_scorer("brevity")
def brevity(prompts: list[str], answers: list[str]) -> list[float]:
    return [-float(len(answer)) for answer in answers]
