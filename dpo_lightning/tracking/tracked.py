"""A run as its loggers know it, as values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """A run as its loggers know it.

    Attributes:
        name: Its name.
        folder: Its folder.
        config: The resolved settings.
        facts: What tells runs apart in a plot: ``model``, ``loss``, ``beta``, ``lr``, ``seed``.
        earlier: Folder of the run that it goes on with exactly; None where it is another one.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    facts: Mapping[str, Any]
    earlier: Path | None = None


COLUMNS = (
    *("eval/rewards/accuracies", "eval/logratios/margins", "controlled/expected_reward"),
    *("eval/label_gain", "controlled/kl_policy_reference", "samples/kl"),
)
"""Metrics that runs are compared by; each is free of beta."""

_SHORT = {
    "accuracy": ("eval/rewards/accuracies",),
    "margin": ("eval/logratios/margins",),
    "reward": ("controlled/expected_reward", "samples/judge"),
    "kl": ("controlled/kl_policy_reference", "samples/kl"),
}
"""Short names of what a plot over runs shows, and the metrics that they are the first of."""


def summary_of(facts: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
    """A run as one row of a table: its facts, short names free of beta, all of its metrics.

    Args:
        facts: As in :class:`TrackedRun`.
        metrics: The last value of every metric.
    """
    short = {
        name: metrics[found]
        for name, others in _SHORT.items()
        if (found := next((other for other in others if other in metrics), None)) is not None
    }
    return {**metrics, **short, **facts}


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by dotted key, as they are typed.

    Args:
        config: The settings, sections in sections.
        prefix: Key of the section, with its dot.
    """
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain(value: Any) -> Any:
    """A value that a table of settings takes: a number, a text or a truth value.

    Args:
        value: Of a setting.
    """
    return value if isinstance(value, str | int | float | bool) else str(value)


def measured_last(summary: Mapping[str, Any], names: set[str]) -> dict[str, float]:
    """Metrics of the run as a whole that no row has.

    Args:
        summary: Values that stand for the run.
        names: Metrics that rows have.
    """
    return {
        name: value
        for name, value in summary.items()
        if "/" in name and name not in names and isinstance(value, int | float)
    }
