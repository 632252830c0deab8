"""Commands of the benchmarks' own packages that judge files of answers. No torch."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from dpo_lightning.data.questions import Format, Question

_ALPACA_SETS = frozenset(["helpful_base", "koala", "oasst", "selfinstruct", "vicuna"])
"""Values of ``dataset`` in AlpacaEval's evaluation set."""

_ARENA_FIRST = "arena-hard-v0.1"
"""Arena-Hard's first version, and the category of its questions since there is a second."""


def judge_commands(
    files: Sequence[Path],
    form: Format,
    questions: Sequence[Question],
    *,
    prompts: Path,
    of_sweep: bool,
) -> list[str]:
    """Command lines that have answers judged by the benchmark's own package.

    Args:
        files: Of answers.
        form: Their format.
        questions: What they answer.
        prompts: The file of these.
        of_sweep: True if they are of a sweep's trials, which get one leaderboard.
    """
    if form == "alpaca_eval":
        return [_alpaca(files, questions, prompts, of_sweep=of_sweep)]
    return _arena(files, questions) if form == "arena_hard" else []


def leaderboard_of(files: Sequence[Path]) -> Path:
    """The leaderboard that AlpacaEval writes about a sweep's answers."""
    return files[0].parent / "leaderboard.csv"


def _alpaca(
    files: Sequence[Path], questions: Sequence[Question], prompts: Path, *, of_sweep: bool
) -> str:
    typed = [_as_typed(path) for path in files]
    more, what = _compared_with(questions, prompts)
    if not of_sweep:
        return shlex.join(["alpaca_eval", "--model_outputs", *typed, *more]) + what
    # Its make_leaderboard would take one call, and ends in an error of its own (0.6.6). By name:
    # other files of answers beside these would be judged, and paid for, too.
    board = ["--precomputed_leaderboard", _as_typed(leaderboard_of(files))]
    call = f'alpaca_eval --model_outputs "$f" {shlex.join([*board, *more])}'
    return f"for f in {shlex.join(typed)}; do {call}; done{what}"


def _compared_with(questions: Sequence[Question], prompts: Path) -> tuple[list[str], str]:
    """Words about what answers are compared with, and a remark; none for its own questions."""
    if all(question.row.get("dataset") in _ALPACA_SETS for question in questions):
        return [], ""
    # It has neither answers to other questions nor their difficulties, by which it controls length.
    metric = ["--fn_metric", "get_winrate", "--sort_by", "win_rate"]
    answered = all(isinstance(question.row.get("output"), str) for question in questions)
    if prompts.suffix == ".json" and answered:
        return ["--reference_outputs", _as_typed(prompts), *metric], ""
    remark = "  # REFERENCE.json: other answers to the prompts, which `generate` of a model writes"
    return ["--reference_outputs", "REFERENCE.json", *metric], remark


def _as_typed(path: Path) -> str:
    """A path for its command line, which reads words as Python and takes # for a comment."""
    text = str(path)
    return json.dumps(text, ensure_ascii=False) if "#" in text else text


def _arena(files: Sequence[Path], questions: Sequence[Question]) -> list[str]:
    before = any("question_id" in q.row and "uid" not in q.row for q in questions)
    first = before or any(q.row.get("category") == _ARENA_FIRST for q in questions)
    bench = _ARENA_FIRST if first else "arena-hard-v2.0"
    clone = "a clone of arena-hard-auto" + (" from before April 2025" if before else "")
    settings = "config/judge_config.yaml" if before else f"config/{bench}.yaml"
    names = ", ".join(path.stem for path in files)
    copied = shlex.join(["cp", *map(str, files), f"data/{bench}/model_answer/"])
    lines = [f"{copied}  # in {clone}, with {names} in model_list of {settings}"]
    if before or not first:
        judge = "python gen_judgment.py"
    else:
        judge = f"python gen_judgment.py --setting-file {settings}"
    categories = sorted({str(q.row["category"]) for q in questions if "category" in q.row})
    if before or not categories:
        return [*lines, f"{judge} && python show_result.py"]
    of = f" --benchmark {bench}" if first else ""
    shown = [f"python show_result.py{of} --category {shlex.quote(c)}" for c in categories]
    return [*lines, " && ".join([judge, *shown])]
