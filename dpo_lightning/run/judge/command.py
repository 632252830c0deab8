"""The command ``judge``: its words, the judge, what is printed. torch for a reward model alone."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.judges import Judge
from dpo_lightning.evaluation.named_judge import is_function, make_judge
from dpo_lightning.processes.phases import ShowPhase
from dpo_lightning.run.framed import answer_alone, print_answer, said_help
from dpo_lightning.run.guard import guarded
from dpo_lightning.run.judge.answered import Answered, answers_of_run, read_answers
from dpo_lightning.run.judge.marking import keep_in_run, mark_answers, summary
from dpo_lightning.run.words import Grammar, Words, read_words
from dpo_lightning.settings.compose import compose_one
from dpo_lightning.settings.folders import cache_folder
from dpo_lightning.settings.judging import ENDPOINT_KEYS, JudgeSettings, judge_settings
from dpo_lightning.settings.recorded import SETTINGS_FILE
from dpo_lightning.settings.schema import Config

_HELP = """\
usage: {program} --answers FILE|RUN [--against FILE] [--json] evaluation.judge=… [settings]

Judges answers that exist already. FILE has a line of JSON for each, {{"prompt", "response"}},
as `generate` writes them; RUN is the folder of a run, whose own answers are judged beside its
reference's, by its own judge if none is named, and whose files keep the verdicts.

  --answers  the answers
  --against  others to the same prompts: both are judged, and there is a win rate
  --json     print one object, and all else on stderr

Settings may be plugins=, evaluation.judge= and its others, evaluation.batch_size=,
reference.cache_dir=, trainer.accelerator= and trainer.threads=."""

GRAMMAR = Grammar(
    "judge",
    flags=("--answers", "--against"),
    switches=("--json",),
    settings=(
        *("plugins", "evaluation.judge", *(f"evaluation.{key}" for key in ENDPOINT_KEYS)),
        *("evaluation.batch_size", "reference.cache_dir", "trainer.accelerator", "trainer.threads"),
    ),
    others="nothing else has to do with judging",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a judge's verdicts on answers.

    Args:
        argv: Flags and settings; None takes the process's own.

    Returns:
        0, or 2 where the words, the answers or the judge are wrong.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if said_help(argv, _HELP, "judge"):
        return 0
    words = read_words(argv, GRAMMAR)
    with answer_alone(), _told():
        found = _judge(words)
    print_answer(found, as_json="--json" in words.switches, show=_show)
    return 0


@contextlib.contextmanager
def _told() -> Any:
    """Lines about questions and their price, on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("dpo_lightning.evaluation")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _judge(words: Words) -> dict[str, Any]:
    if words.names:
        raise UserError(f"{words.names[0]}: put the answers behind --answers")
    answers, against = words.one("--answers"), words.one("--against")
    if answers is None:
        raise UserError("--answers is missing: give a file of JSON lines, or a run's folder")
    return _judged(
        Path(answers).expanduser(),
        None if against is None else Path(against).expanduser(),
        words.settings,
    )


def _judged(answers: Path, against: Path | None, settings: Sequence[str]) -> dict[str, Any]:
    is_run = answers.is_dir()
    base: list[str] = []
    if is_run:
        recorded = answers / SETTINGS_FILE
        if not recorded.is_file():
            raise UserError(
                f"--answers={answers}: no {SETTINGS_FILE} there, so it is no run's folder; "
                "name one, or a file of JSON lines"
            )
        base = ["--config", str(recorded)]
    config = compose_one([*base, *settings])
    judge = judge_settings(config, cache=cache_folder(config.reference.cache_dir))
    if judge is None:
        raise UserError(
            "evaluation.judge=null sets no judge; name a plugin's function, a reward model or "
            "endpoint"
        )
    own, other = _answers(answers, against, is_run=is_run)
    # Here, because drawing bars takes a moment to import.
    from dpo_lightning.tracking.phases import Phases

    show = Phases.on_stderr()
    judged, other = mark_answers(_make(config, judge, show), own, other, show=show)
    found = summary(judge.name, judged, own, other)
    found["kept_in"] = None
    if is_run and against is None:
        why_not = keep_in_run(answers, judge.name, judged, own.owners)
        if why_not is None:
            found["kept_in"] = str(answers)
        else:
            found["notes"].append(why_not)
    return found


def _answers(
    answers: Path, against: Path | None, *, is_run: bool
) -> tuple[Answered, Answered | None]:
    own, other = (
        answers_of_run(answers) if is_run else (read_answers(answers, flag="--answers"), None)
    )
    if against is not None:
        other = read_answers(against, flag="--against")
    return own, other


def _make(config: Config, settings: JudgeSettings, show: ShowPhase) -> Judge:
    """The judge; torch is imported for a reward model alone."""
    if settings.endpoint is not None or is_function(settings):
        return make_judge(settings)
    from dpo_lightning.memory.hardware import decide_hardware
    from dpo_lightning.run.inputs import prefer_cache_without_network
    from dpo_lightning.run.prepare import choose_judge

    prefer_cache_without_network(config)
    hardware = decide_hardware(config.trainer, half_weights=False)
    judge = choose_judge(config, hardware, judges=True, show=show)
    assert judge is not None
    return judge


def _show(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"judge: {found['judge']}", title_justify="left")
    for name in ("", "answers", "against"):
        table.add_column(name, justify="left" if not name else "right")
    marks = (_with_interval(found, name) for name in ("mark", "against_mark"))
    table.add_row("mark", *marks)
    table.add_row("win rate", _with_interval(found, "win_rate"), "")
    for name in ("length", "cut_off"):
        cells = (_cell(found[key]) for key in (name, f"against_{name}"))
        unit = f", {found['length_unit']}" if name == "length" else ""
        table.add_row(f"{name.replace('_', ' ')}{unit}", *cells)
    Console().print(table)
    print(f"{found['answers']} answers to {found['prompts']} prompts; {found['interval']}")
    for note in found["notes"]:
        print(note)
    if found["kept_in"]:
        print(f"kept in the files of {found['kept_in']}")


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _with_interval(found: Mapping[str, Any], name: str) -> str:
    value, ends = found[name], found[f"{name}_interval"]
    if value is None or ends is None:
        return "–"
    return f"{value:.3g} ({ends[0]:.3g} to {ends[1]:.3g})"
