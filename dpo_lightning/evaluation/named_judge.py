"""The judge that settings name: a function, a reward model or a language model. No torch.

A reward model is loaded by :mod:`scorers`, when it is named.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.judges import Judge, Mark, MarkingJudge
from dpo_lightning.evaluation.rubric import read_mark
from dpo_lightning.plugins import SCORERS, Prompt, ScoreFunction, find_scorer
from dpo_lightning.settings.judging import JudgeSettings


def make_judge(
    settings: JudgeSettings,
    *,
    reward_model: Callable[[str], ScoreFunction] | None = None,
    may_miss: bool = False,
) -> Judge:
    """The judge that the settings name, checked as far as it can be beforehand.

    Args:
        settings: Its settings.
        reward_model: Loads one by folder or hub id; None: it is looked at and not loaded.
        may_miss: True if a function or a reward model may leave answers without a mark, as an
            endpoint may.

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
    return MarkingJudge(partial(checked_marks, name, function, may_miss=may_miss))


def is_function(settings: JudgeSettings) -> bool:
    """True if the judge is a function of a plugin."""
    return settings.endpoint is None and find_scorer(settings.name, settings.plugins) is not None


def judge_identity(settings: JudgeSettings) -> dict[str, Any]:
    """All that can be known of a judge that its marks depend on, but for an endpoint's.

    Of a function it is the file that has it, and not what that imports; of a reward model in a
    folder the names, sizes and times of its files.

    Args:
        settings: Those of a function or a reward model.
    """
    function = find_scorer(settings.name, settings.plugins)
    if function is None:
        folder = Path(settings.name)
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        stats = [(path.name, path.stat()) for path in files if path.is_file()]
        found = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
        return {"model": settings.name, "files": found}
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
        code = None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()
    except (TypeError, OSError):
        code = None  # such as an object that is called, or a function that was never in a file
    return {"function": settings.name, "code": code}


def checked_marks(
    name: str,
    function: ScoreFunction,
    prompts: Sequence[Prompt],
    answers: Sequence[str],
    *,
    may_miss: bool = False,
) -> list[Mark]:
    """Marks of a function, of which each has to be a finite number.

    Args:
        name: The judge's, for messages.
        function: Marks them.
        prompts: Of the answers.
        answers: To be marked.
        may_miss: True if what is no finite number is no mark, instead of an error; a text is then
            read like a reply, such as ``Score: 7/10``.

    Raises:
        UserError: If it fails, or gives something else.
    """
    try:
        given = list(function(list(prompts), list(answers)))
        marks = [_mark_of(value) if may_miss else float(value) for value in given]
    except UserError:
        raise
    except Exception as error:  # the user's own code
        raise UserError(f"evaluation.judge={name}: {type(error).__name__}: {error}") from error
    if len(marks) != len(answers):
        raise UserError(
            f"evaluation.judge={name}: {len(marks)} marks for {len(answers)} answers; it takes a "
            "list of prompts and a list of answers and returns a number for each"
        )
    if not may_miss and not all(mark is not None and math.isfinite(mark) for mark in marks):
        raise UserError(f"evaluation.judge={name}: a mark is not finite")
    return marks


def _mark_of(value: Any) -> Mark:
    """A function's value as a mark; None where it is none."""
    if value is None:
        return None
    if isinstance(value, str):
        return read_mark(value, bounded=False)
    number = float(value)
    return number if math.isfinite(number) else None


def _check_is_model(name: str, plugins: Sequence[str]) -> None:
    if plugins and "/" not in name and not Path(name).exists():
        known = ", ".join(sorted(SCORERS)) or "none"
        raise UserError(
            f"evaluation.judge={name}: no plugin registers it (registered: {known}); it may be "
            f"{plugins[0]}.<function>, or a folder or hub id of a reward model"
        )
