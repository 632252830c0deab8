"""Files of answers in the hands of AlpacaEval's own package: its loader, command line, leaderboard.

It needs alpaca_eval, which the environment of the launchers has. The judge is one of its own that
asks nobody: it prefers the second answer, which is ours, and two equal answers are a draw.
"""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning.data.questions import Question, read_questions
from dpo_lightning.run.answering.benchmarks import judge_commands, leaderboard_of
from dpo_lightning.run.answering.formats import Written, file_of
from dpo_lightning.sweeps.report.marks import read_marks
from dpo_lightning.sweeps.report.read import read_sweep
from tests.support.sweep_folders import write_trial

pytestmark = pytest.mark.launchers

JUDGE = """\
second:
  prompt_template: second/prompt.txt
  fn_completions: test_completions
  completions_kwargs: {model_name: none, value: "the second"}
  fn_completion_parser: regex_parser
  completion_parser_kwargs: {outputs_to_match: {1: first, 2: second}}
  is_randomize_output_order: false
"""

ROWS = [
    {"instruction": "Sag «ä»\nund 7", "output": "ä7", "generator": "gpt", "rank": 1},
    {"instruction": "And that", "output": "that", "generator": "gpt", "rank": 2},
]


def run(words: list[str], folder: Path, path: str = os.environ["PATH"]) -> str:
    done = subprocess.run(
        words,
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def judge(command: str, folder: Path, *more: str) -> str:
    """Output of a command line, where the package has a judge that costs nothing."""
    own = folder / "judges" / "second"
    own.mkdir(parents=True)
    (own / "configs.yaml").write_text(JUDGE)
    (own / "prompt.txt").write_text("{instruction} {output_1} {output_2}")
    program = folder / "bin" / "alpaca_eval"
    program.parent.mkdir()
    real = Path(sys.executable).with_name("alpaca_eval")
    added = shlex.join(["--annotators_config", str(own), *more])
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(str(real))} "$@" {added}\n')
    program.chmod(0o755)
    return run(["sh", "-ec", command], folder, f"{program.parent}:{os.environ['PATH']}")


def asked(folder: Path, rows: list[dict[str, object]]) -> list[Question]:
    path = folder / "set.json"
    path.write_text(json.dumps(rows))
    return read_questions(path, "alpaca_eval")


def write(path: Path, questions: list[Question], *texts: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    answers = [Written(q, text, len(text)) for q, text in zip(questions, texts, strict=True)]
    path.write_bytes(file_of(answers, "alpaca_eval", path.stem))
    return path


def test_its_loader_reads_what_was_written(tmp_path):
    path = write(tmp_path / "beta-0.1.json", asked(tmp_path, ROWS), "“7”\n\\n", "")
    code = (
        "import sys; from alpaca_eval.utils import load_or_convert_to_dataframe as load;"
        "print(load(sys.argv[1]).to_json(orient='records'))"
    )
    found = json.loads(run([sys.executable, "-c", code, str(path)], tmp_path).splitlines()[-1])
    assert found == [
        {**ROWS[0], "output": "“7”\n\\n", "generator": "beta-0.1", "dataset": "own"},
        {**ROWS[1], "output": "", "generator": "beta-0.1", "dataset": "own"},
    ]


def test_a_sweep_is_judged_and_its_numbers_come_back(tmp_path):
    """One of two answers is the reference's own: (0.5 + 1) / 2 of the comparisons are won.

    A file beside them that is no trial's is not judged.
    """
    questions = asked(tmp_path, ROWS)
    files = [
        write(tmp_path / "my answers" / "beta-0.1.json", questions, "ä7", "mine"),
        write(tmp_path / "my answers" / "beta-1.json", questions, "other", "mine"),
    ]
    write(tmp_path / "my answers" / "foreign.json", questions, "x", "y")
    prompts = tmp_path / "set.json"
    [command] = judge_commands(files, "alpaca_eval", questions, prompts=prompts, of_sweep=True)
    judge(command, tmp_path)
    for beta in ("0.1", "1"):
        write_trial(tmp_path / "sweep", f"beta-{beta}", f"beta={beta}")
    marks = read_marks(leaderboard_of(files), read_sweep(tmp_path / "sweep"))
    assert (marks.unmatched, marks.without) == ((), ())
    assert {name: own["win_rate"] for name, own in marks.trials.items()} == {
        "beta-0.1": 75.0,
        "beta-1": 100.0,
    }


def test_a_run_of_its_own_questions_needs_no_more_words(tmp_path):
    """An entry that is added here alone keeps it from downloading its reference answers."""
    rows = [row | {"dataset": "koala"} for row in ROWS]
    path = write(tmp_path / "it#1" / "beta-1.json", asked(tmp_path, rows), "a", "b")
    short = path.relative_to(tmp_path)
    questions = read_questions(tmp_path / "set.json", "alpaca_eval")
    [command] = judge_commands(
        [short], "alpaca_eval", questions, prompts=Path("set.json"), of_sweep=False
    )
    assert command == "alpaca_eval --model_outputs '\"it#1/beta-1.json\"'"
    more = ("--reference_outputs", "set.json", "--fn_metric", "get_winrate")
    shown = judge(command, tmp_path, *more, "--sort_by", "win_rate")
    assert shown.splitlines()[-1].split() == ["beta-1", "100.00", "0.00", "2", "1"]
    assert (path.parent / "leaderboard.csv").is_file()
