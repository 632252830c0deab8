"""The command ``generate``: prompts in, answers of one policy or of a sweep's trials out."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from dpo_lightning.data.questions import Question, carried_for_the_model, read_questions
from dpo_lightning.files import write_whole
from dpo_lightning.run.answering.benchmarks import judge_commands, leaderboard_of
from dpo_lightning.run.answering.formats import Written, file_of
from dpo_lightning.run.beta_path import place_of
from dpo_lightning.run.framed import answer_alone, print_answer, said_help, writing
from dpo_lightning.run.guard import guarded
from dpo_lightning.settings.program import typed
from dpo_lightning.sweeps.generate.request import Request, read_request
from dpo_lightning.sweeps.generate.targets import (
    Target,
    Targets,
    facts_of,
    find_targets,
    kept_from_before,
    refuse_existing,
)

_HELP = """\
usage: {program} RUN prompts.jsonl [--output FILE] [--format FORMAT] [settings]
       {program} SWEEP prompts.jsonl [--output FOLDER] [--format FORMAT] [settings]

Answers prompts by a trained policy. RUN is a run's folder, a folder with a model or a LoRA
adapter, or a hub id. Of a SWEEP every trial that finished answers, in a file named as the trial.

  --format FORMAT       jsonl: {{"prompt": …}} in, the same with a "response" out; alpaca_eval and
                        arena_hard: the questions and the answers of these benchmarks
  --output FILE         of a sweep a folder; default outputs/answers/<prompts>/<name>
  --name NAME           of the policy in the answers; default the run's
  --prompts chat|text   strings as a user's turn through the chat template, or as they are; default
                        text for jsonl, chat for benchmarks if the model has a template
  --temperature T       default 1; 0 takes the likeliest token
  --top-p P             draw from the likeliest tokens that have this share; default 1, all
  --max-new-tokens N    longest answer; default 256 for jsonl, 2048 alpaca_eval, 4096 arena_hard
  --seed N              default 1; an answer depends on it and on its own prompt alone
  --at-beta BETA        answer as the policy would at another beta: on the way from the reference
  --reference MODEL     for --at-beta, where a model alone is named
  --overwrite           replace files that are there
  --json                print one object about what was written, and all else on stderr

How answers were drawn stands beside them in FILE.settings.yaml. Settings may be plugins, those of
generation, evaluation.batch_size, data.chat_template and its options, and of trainer accelerator,
devices, precision and threads."""


def main(argv: Sequence[str] | None = None) -> int:
    """Writes answers of trained policies to a file of prompts.

    Args:
        argv: The policy, the prompts, flags and settings; None takes the process's own.

    Returns:
        0, or 2 where the words, the policy or the prompts are wrong.
    """
    return guarded(_main, list(sys.argv[1:] if argv is None else argv))


def _main(argv: list[str]) -> int:
    if said_help(argv, _HELP, "generate"):
        return 0
    request = read_request(argv)
    with answer_alone():
        found = generate(request)
    print_answer(found, as_json=request.as_json, show=_show)
    return 0


def _show(found: Mapping[str, Any]) -> None:
    for entry in found["files"]:
        print(f"answers   {entry['path']}")


def generate(request: Request) -> dict[str, Any]:
    """Writes the files, and says what is in them.

    Args:
        request: The command line.

    Raises:
        UserError: If a policy cannot answer, a prompt cannot be read, or a file is there already.
    """
    questions = read_questions(request.prompts, request.form)
    carried = carried_for_the_model(questions, request.form)
    if carried:
        _say(f"carried through and not given to the model: {', '.join(carried)}")
    targets = find_targets(request)
    places = [_place_of(request, target) for target in targets.own]
    facts = [facts_of(request, t, lam) for t, lam in zip(targets.own, places, strict=True)]
    kept = [
        targets.of_sweep and not request.overwrite and kept_from_before(target, own)
        for target, own in zip(targets.own, facts, strict=True)
    ]
    if not request.overwrite:
        refuse_existing([t for t, is_kept in zip(targets.own, kept, strict=True) if not is_kept])
    for name, status in targets.skipped:
        _say(f"{name}: skipped: the trial is {status} and has no policy")
    entries = []
    for target, lam, own, is_kept in zip(targets.own, places, facts, kept, strict=True):
        if is_kept:
            _say(f"{target.generator}: skipped: the same answers exist")
            entries.append(_entry(target, {"kept": True}))
            continue
        counts = _answer(request, target, questions, lam, own)
        entries.append(_entry(target, {"kept": False} | counts))
    return _result(request, targets, entries, questions)


def _place_of(request: Request, target: Target) -> float:
    if request.at_beta is None:
        return 1.0
    subject = target.subject
    return place_of(
        request.at_beta, subject.config, trained=subject.trained_beta, flag="--at-beta="
    )


def _entry(target: Target, more: Mapping[str, Any]) -> dict[str, Any]:
    paths = {"path": str(target.path), "settings": str(target.settings_path)}
    return {"generator": target.generator, "run": target.name, **paths, **more}


def _result(
    request: Request,
    targets: Targets,
    entries: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
) -> dict[str, Any]:
    files = [target.path for target in targets.own]
    commands = judge_commands(
        files, request.form, questions, prompts=request.prompts, of_sweep=targets.of_sweep
    )
    for command in commands:
        _say(f"judge     {command}")
    if commands and targets.of_sweep and request.form == "alpaca_eval":
        marks = f"{request.name} --marks {leaderboard_of(files)}"
        _say(f"then      {' '.join(typed('report'))} {marks}")
    if request.form == "alpaca_eval" and any(q.row.get("input") for q in questions):
        _say("AlpacaEval's own judges see no input; write it into the instruction")
    return {
        "files": list(entries),
        "skipped": [{"trial": name, "status": status} for name, status in targets.skipped],
        "judge": commands,
    }


def _answer(
    request: Request,
    target: Target,
    questions: Sequence[Question],
    lam: float,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Answers all prompts by one policy, and writes its two files."""
    # Here, because it imports torch: by now every setting is checked.
    from dpo_lightning.evaluation.keyed import Sampling
    from dpo_lightning.run.answering.answerer import answering
    from dpo_lightning.tracking.phases import Phases

    draws = request.draws
    sampling = Sampling(draws.temperature, draws.top_p, draws.max_new_tokens, draws.seed)
    with answering(target.subject) as answerer:
        chat = _as_chat(request, questions, has_template=answerer.has_template)
        own = [question.as_chat() for question in questions] if chat else questions
        prompts = answerer.encode(own)
        _say(f"{target.generator}: {len(prompts):,} answers")
        found = answerer.answer(prompts, sampling, lam=lam, show=Phases.on_stderr())
    written = [Written(q, a.text, a.tokens) for q, a in zip(questions, found, strict=True)]
    cut = sum(answer.cut_off for answer in found)
    if cut and not target.subject.speaks_of_weather:
        _say(
            f"{target.generator}: {cut} of {len(found)} answers were cut off at the limit; "
            "raise --max-new-tokens"
        )
    counts = {
        "answers": len(found),
        "cut_off": cut,
        "mean_tokens": sum(answer.tokens for answer in found) / len(found),
    }
    recorded = {**facts, "through_template": any(not q.is_text for q in own), **counts}
    text = yaml.safe_dump(recorded, sort_keys=False, allow_unicode=True)
    with writing(target.path):
        target.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(target.path, file_of(written, request.form, target.generator))
        write_whole(target.settings_path, text.encode())
    return counts


def _as_chat(request: Request, questions: Sequence[Question], *, has_template: bool) -> bool:
    """True if strings go through the chat template, which is said."""
    if not any(question.is_text for question in questions):
        return False
    chat = request.mode == "chat" or (
        request.mode is None and request.form != "jsonl" and has_template
    )
    if chat:
        _say("prompts go through the chat template as a user's turn (--prompts text: as they are)")
    elif has_template:
        _say("prompts are given as they are (--prompts chat: as a user's turn, by the template)")
    return chat


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
