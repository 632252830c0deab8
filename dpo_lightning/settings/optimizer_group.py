"""The ``optimizer`` group: options of plugins' optimizers, and its part of a run's identity.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from dpo_lightning.plugins import OPTIMIZERS, SHARED_SETTINGS
from dpo_lightning.settings.conduct import OptimizerConfig

_COMMON = {item.name: item for item in dataclasses.fields(OptimizerConfig)}


def optimizer_options(optimizer: OptimizerConfig) -> dict[str, Any]:
    """The options of the optimizer that is chosen; the package's own have none.

    Args:
        optimizer: The group, of the schema of :func:`optimizer_schema`.
    """
    entry = OPTIMIZERS.get(optimizer.name)
    return {} if entry is None else {key: getattr(optimizer, key) for key in entry.schema}


def own_optimizer_settings(optimizer: dict[str, Any]) -> dict[str, Any]:
    """The group as plain values, without the options of optimizers that are not used.

    What other optimizers there are is no part of an experiment.
    """
    entry = OPTIMIZERS.get(optimizer["name"])
    own = () if entry is None else entry.schema
    return {key: value for key, value in optimizer.items() if key in _COMMON or key in own}


def optimizer_problems(optimizer: OptimizerConfig) -> Iterator[str]:
    """Yields what is wrong with the options, and with settings that the optimizer never reads.

    Args:
        optimizer: The group, of the schema of :func:`optimizer_schema`.

    Yields:
        One clause per problem.
    """
    name, entry = optimizer.name, OPTIMIZERS.get(optimizer.name)
    schema = {} if entry is None else entry.schema
    for item in dataclasses.fields(optimizer):
        value = getattr(optimizer, item.name)
        typed = f"optimizer.{item.name}={value}"
        if item.name in schema:
            if not schema[item.name].accepts(value):
                yield f"{typed}: optimizer={name} takes {schema[item.name].expected()}"
        elif item.name not in _COMMON and value != item.default:
            takers = [f"optimizer={o}" for o in OPTIMIZERS if item.name in OPTIMIZERS[o].schema]
            yield (
                f"{typed}: optimizer={name} has no such option; leave it out, or use "
                f"{' or '.join(takers)}"
            )
    if entry is None:
        return
    default = OptimizerConfig()
    for key in (*SHARED_SETTINGS, "stochastic_rounding"):
        if key not in _COMMON or key in entry.shared:
            continue
        value = getattr(optimizer, key)
        if value != getattr(default, key):
            typed = f"optimizer.{key}={str(value).replace(' ', '')}"
            yield f"{typed}: optimizer={name} never reads it; leave it out"
