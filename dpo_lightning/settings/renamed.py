"""Names of before, of settings and of what files hold, and the ones they have by now. No torch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

RENAMED_KEYS = {"evaluation.scorer": "evaluation.judge"}
"""Old names of settings; each still does what the new one does, and is said once."""

RENAMED_METRICS = {
    "samples/score": "samples/judge",
    "samples/score_stderr": "samples/judge_stderr",
    "samples/reference_score": "samples/reference_judge",
    "samples/reference_score_stderr": "samples/reference_judge_stderr",
}
"""Old names of metrics."""

# Of evaluation.json, and of a row of its samples.
_ENTRIES = {"scorer": "judge"}
_OF_SAMPLE = {"score": "judge", "reference_score": "reference_judge"}


@functools.cache
def say_renamed(old: str, new: str) -> None:
    """Says once that a name is another one by now.

    Args:
        old: The name that was given.
        new: The name.
    """
    log.warning("%s was renamed to %s: using that", old, new)


def present_result(result: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a ``result.json`` of whatever age, with the names of metrics of now."""
    metrics = result.get("metrics")
    if not isinstance(metrics, dict):
        return dict(result)
    return {**result, "metrics": _renamed(metrics, RENAMED_METRICS)}


def present_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The content of an ``evaluation.json`` of whatever age, with the names of now."""
    found = _renamed(evaluation, _ENTRIES)
    samples = found.get("samples")
    if isinstance(samples, list):
        found["samples"] = [
            _renamed(row, _OF_SAMPLE) if isinstance(row, dict) else row for row in samples
        ]
    return found


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The entries under their present names; one that has its present name already stays."""
    found = {key: value for key, value in values.items() if key not in names}
    for old, new in names.items():
        if old in values:
            found.setdefault(new, values[old])
    return found
