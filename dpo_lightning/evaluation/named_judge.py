"""The judge that settings name: a function, a reward model or a language model. No torch.

A reward model is loaded by :mod:`scorers`, when it is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.judges import Judge, MarkingJudge
from dpo_lightning.plugins import SCORERS, Prompt, ScoreFunction, find_scorer
from dpo_lightning.settings.judging import JudgeSettings


def make_judge(
    settings: JudgeSettings, *, reward_model: Callable[[str], ScoreFunction] | None = None
) -> Judge:
    """The judge that the settings name, checked as far as it can be beforehand.

    Args:
        settings: Its settings.
        reward_model: Loads one by folder or hub id; None: it is looked at and not loaded.

    Raises:
        UserError: If there is no such function or model.
    """
    if settings.endpoint is not None:
        # Here, so that a run that asks nobody does not pay for an HTTP client.
        from dpo_lightning.evaluation.endpoint_judge import EndpointJudge

        return EndpointJudge(settings.endpoint, cache=settings.cache)
    name = settings.name
    function = find_scorer(name, settings.plugins)
    if function is None:
        _check_is_model(name, settings.plugins)
        assert reward_model is not None, "a reward model needs torch"
        function = reward_model(name)
    return MarkingJudge(partial(checked_marks, name, function))


def is_function(settings: JudgeSettings) -> bool:
    """True if the judge is a function of a plugin."""
    return settings.endpoint is None and find_scorer(settings.name, settings.plugins) is not None


def checked_marks(
    name: str, function: ScoreFunction, prompts: Sequence[Prompt], answers: Sequence[str]
) -> list[float]:
    """Marks of a function, of which each has to be a finite number.

    Args:
        name: The judge's, for messages.
        function: Marks them.
        prompts: Of the answers.
        answers: To be marked.

    Raises:
        UserError: If it fails, or gives something else.
    """
    try:
        marks = [float(value) for value in function(list(prompts), list(answers))]
    except UserError:
        raise
    except Exception as error:  # the user's own code
        raise UserError(f"evaluation.judge={name}: {type(error).__name__}: {error}") from error
    if len(marks) != len(answers):
        raise UserError(
            f"evaluation.judge={name}: {len(marks)} marks for {len(answers)} answers; it takes a "
            "list of prompts and a list of answers and returns a number for each"
        )
    if not all(map(math.isfinite, marks)):
        raise UserError(f"evaluation.judge={name}: a mark is not finite")
    return marks


def _check_is_model(name: str, plugins: Sequence[str]) -> None:
    if plugins and "/" not in name and not Path(name).exists():
        known = ", ".join(sorted(SCORERS)) or "none"
        raise UserError(
            f"evaluation.judge={name}: no plugin registers it (registered: {known}); it may be "
            f"{plugins[0]}.<function>, or a folder or hub id of a reward model"
        )
