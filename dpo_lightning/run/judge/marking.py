"""Marks of answers that are there already, and where those of a run are kept. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.judges import Judge, Judged, Mark
from dpo_lightning.evaluation.verdicts import judged_metrics, known, put_verdicts
from dpo_lightning.evaluation.win_rates import normal, paired_by_prompt, why_withheld, win_rate
from dpo_lightning.files import RESULT_FILE, read_json, write_json
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.run.judge.answered import EVALUATION_FILE, Answered
from dpo_lightning.settings.renamed import present_evaluation, present_result


def mark_answers(
    judge: Judge, own: Answered, other: Answered | None, *, show: ShowPhase = unshown
) -> tuple[Judged, Answered | None]:
    """The verdicts of a judge, and the others in the order of the answers.

    Args:
        judge: Judges them.
        own: The answers.
        other: Others to the same prompts, in any order; None: each answer by itself.
        show: Shows how far it is.

    Raises:
        UserError: If the judge fails, gives no verdict at all, or prompts have no other answer.
    """
    if other is None:
        marks, facts = judge.mark(own.prompts, own.texts, show=show)
        withheld = why_withheld(marks)
        notes = () if withheld is None else (withheld,)
        judged = Judged([None] * len(marks), marks, None, facts, notes)
    else:
        other = other.at(paired_by_prompt(own.owners, other.owners, key="--against"))
        judged = judge.compare(own.prompts, own.texts, other.texts, show=show)
    found = judged.wins if judged.marks is None else judged.marks
    if not known(found):
        why = judged.facts.get("last_error", "none of its replies could be read")
        raise UserError(f"the judge gave no verdict on {len(found)} answers: {why}")
    return judged, other


def summary(label: str, judged: Judged, own: Answered, other: Answered | None) -> dict[str, Any]:
    """The verdicts as the one object that ``--json`` prints.

    Args:
        label: The judge's.
        judged: Its verdicts.
        own: The answers.
        other: The others, in the same order.
    """
    marks, other_marks = judged.marks, judged.other_marks
    found: dict[str, Any] = {
        "judge": label,
        "answers": len(own.texts),
        "prompts": len({*own.owners}),
        **_mean_entries("mark", marks, own),
        **_mean_entries("against_mark", other_marks, own),
        **_win_entries(judged.wins if other is not None else None, own),
        "interval": "95% over prompts: normal of marks, Wilson's of the win rate, ties half",
        "length": _length(own),
        "against_length": None if other is None else _length(other),
        "length_unit": "characters",
        "cut_off": own.share_cut_off,
        "against_cut_off": None if other is None else other.share_cut_off,
        "counts": dict(judged.facts),
        "notes": [*own.notes, *(() if other is None else other.notes), *judged.notes],
    }
    nothing: list[Mark] = [None] * len(own.texts)
    rows = zip(own.prompts, marks or nothing, other_marks or nothing, judged.wins, strict=True)
    found["rows"] = [
        {"prompt": prompt, "mark": mark, "against_mark": other_mark, "win": win}
        for prompt, mark, other_mark, win in rows
    ]
    return found


def _mean_entries(name: str, marks: Sequence[Mark] | None, own: Answered) -> dict[str, Any]:
    may = marks is not None and why_withheld(marks) is None
    found = normal(marks, own.owners) if may and marks is not None else None
    return {name: found and found[0], f"{name}_interval": found and list(found[1])}


def _win_entries(wins: Sequence[Mark] | None, own: Answered) -> dict[str, Any]:
    may = wins is not None and why_withheld(wins) is None
    found = win_rate(wins, own.owners) if may and wins is not None else None
    return {"win_rate": found and found[0], "win_rate_interval": found and list(found[1])}


def _length(answers: Answered) -> float:
    return statistics.fmean(len(text.strip()) for text in answers.texts)


def keep_in_run(folder: Path, label: str, judged: Judged, owners: Sequence[str]) -> str | None:
    """Puts verdicts on a run's own answers into its files, as if the run had asked for them.

    Args:
        folder: The run's, which has finished.
        label: The judge's.
        judged: Its verdicts, in the order of the run's answers.
        owners: The prompt of each answer.

    Returns:
        The reason why they are not kept; None if they are.
    """
    evaluation = present_evaluation(read_json(folder / EVALUATION_FILE))
    result = present_result(read_json(folder / RESULT_FILE))
    if result.get("status") != "finished":
        return f"{folder}: the run has not finished, so the marks are shown but not saved"
    rows = evaluation["samples"]
    has = any(row.get(name) is not None for row in rows for name in ("win", "judge"))
    if has and evaluation.get("judge") != label:
        return (
            f"{folder}: it has marks of another judge, {evaluation.get('judge')}; these are "
            "shown but not saved"
        )
    put_verdicts(rows, judged)
    evaluation.pop("judge_failed", None)
    facts = {**judged.facts, "notes": list(judged.notes)}
    write_json(folder / EVALUATION_FILE, evaluation | {"judge": label, "judged": facts})
    metrics = {**_mapping(result.get("metrics")), **judged_metrics(judged, owners)}
    basis = {**_mapping(result.get("basis")), "judge": label}
    write_json(folder / RESULT_FILE, result | {"metrics": metrics, "basis": basis})
    return None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
