"""Facts of a finished run, for the card of what is shared of it."""

from __future__ import annotations

from dpo_lightning.run.card import CardFacts
from dpo_lightning.run.share.words import Exported

# Entries of result.json and config.yaml that a card tells of.
_RESULT = ("beta", "loss", "seed", "step", "metrics", "data", "model", "command")
_SETTINGS = ("model", "data", "peft", "reference", "optimizer")


def card_facts(exported: Exported) -> CardFacts | None:
    """The facts of an export's run; None where no run is there to tell of.

    Args:
        exported: The export.
    """
    result, settings = exported.result(), exported.settings()
    if exported.run is None or not ({*_RESULT} <= {*result} and {*_SETTINGS} <= {*settings}):
        return None
    return CardFacts(exported.run.resolve().name, result, settings)
