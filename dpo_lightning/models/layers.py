"""Entries of a config that may be another in each layer, such as the size of a head."""

from __future__ import annotations

from typing import Any


def layer_values(config: Any, name: str) -> list[int]:
    """The different values of an entry over all layers, ascending; none where it is not set.

    Args:
        config: A transformers config of text.
        name: The entry.
    """
    try:
        values = [getattr(config, name, None)]
    except RuntimeError:
        # transformers gives no value for all where layers differ.
        values = [getattr(layer, name, None) for layer in config.per_layer_config]
    flat = [v for value in values for v in (value if isinstance(value, list | tuple) else [value])]
    return sorted({int(value) for value in flat if isinstance(value, int) and value})


def largest(config: Any, *names: str) -> int | None:
    """The largest value of the first of some entries that is set; None where none is.

    Args:
        config: A transformers config of text.
        *names: What families call it.
    """
    for name in names:
        values = layer_values(config, name)
        if values:
            return values[-1]
    return None
