"""The ``loss`` group as an objective, and its part of a run's identity. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from dpo_lightning.objectives.objective import ObjectiveSettings
from dpo_lightning.objectives.registry import losses_with_options
from dpo_lightning.settings.schema import LossConfig


def objective_settings(loss: LossConfig) -> ObjectiveSettings:
    """The objective that the settings describe.

    Args:
        loss: The group, of the schema of :func:`loss_schema`.

    Returns:
        Its options are those of its losses, and what was set of the others, to be complained of.
    """
    terms = dict(loss.terms) or {loss.name: 1.0}
    entries = losses_with_options()
    own = {
        key: getattr(loss, key) for name in terms if name in entries for key in entries[name].schema
    }
    stray = {
        item.name: getattr(loss, item.name)
        for item in dataclasses.fields(loss)
        if item.name not in _COMMON
        and item.name not in own
        and getattr(loss, item.name) != item.default
    }
    return ObjectiveSettings(
        terms=terms,
        options=own | stray,
        f_divergence=loss.f_divergence,
        f_alpha=loss.f_alpha,
        ld_alpha=loss.ld_alpha,
        wpo=loss.wpo,
        rpo_alpha=loss.rpo_alpha,
    )


_COMMON = frozenset(item.name for item in dataclasses.fields(LossConfig))


def own_loss_settings(loss: dict[str, Any]) -> dict[str, Any]:
    """The ``loss`` group as plain values, without the options of losses that are not used.

    What other losses there are, a plugin's among them, is no part of an experiment.
    """
    names = loss["terms"] or {loss["name"]: 1.0}
    entries = losses_with_options()
    own = {key for name in names if name in entries for key in entries[name].schema}
    return {key: value for key, value in loss.items() if key in _COMMON or key in own}
