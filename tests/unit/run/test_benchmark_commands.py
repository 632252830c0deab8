"""Commands of the benchmarks' packages; that they work is in ``test_benchmark_loaders``."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.data.questions import Format, read_questions
from dpo_lightning.run.answering.benchmarks import judge_commands


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Commands about files of answers to some rows, of which each is a line of shell."""
    monkeypatch.chdir(tmp_path)

    def find(form: Format, files: list[str], *rows: dict[str, Any], name: str = "") -> list[str]:
        prompts = Path(name or {"alpaca_eval": "set.json"}.get(form, "set.jsonl"))
        lines = "".join(f"{json.dumps(row)}\n" for row in rows)
        prompts.write_text(json.dumps(rows) if prompts.suffix == ".json" else lines)
        found = judge_commands(
            [Path(file) for file in files],
            form,
            read_questions(prompts, form),
            prompts=prompts,
            of_sweep=len(files) > 1,
        )
        for line in found:
            assert subprocess.run(["sh", "-nc", line], check=False).returncode == 0, line
        return found

    return find


OWN = {"instruction": "a", "dataset": "koala", "output": "of the reference"}
OTHER = {"instruction": "a", "output": "mine"}


def test_alpaca_eval_judges_a_run_or_each_trial_of_a_sweep(commands):
    assert commands("alpaca_eval", ["out/a b.json"], OWN) == [
        "alpaca_eval --model_outputs 'out/a b.json'"
    ]
    assert commands("alpaca_eval", ["out/a b.json", "out/c.json"], OWN) == [
        "for f in 'out/a b.json' out/c.json; do alpaca_eval --model_outputs \"$f\" "
        "--precomputed_leaderboard out/leaderboard.csv; done"
    ]


def test_a_path_that_its_command_line_would_cut_off_is_quoted(commands):
    """It reads words as Python, in which # begins a comment."""
    [command] = commands("alpaca_eval", ["a#1/b.json"], OWN)
    assert command == "alpaca_eval --model_outputs '\"a#1/b.json\"'"


def test_other_questions_bring_what_they_are_compared_with(commands):
    metric = "--fn_metric get_winrate --sort_by win_rate"
    [command] = commands("alpaca_eval", ["a.json"], OWN, OTHER)
    assert command == f"alpaca_eval --model_outputs a.json --reference_outputs set.json {metric}"
    for rows, name in (([OTHER, {"instruction": "b"}], "set.json"), ([OTHER], "set.jsonl")):
        [command] = commands("alpaca_eval", ["a.json"], *rows, name=name)
        assert f"--reference_outputs REFERENCE.json {metric}  # REFERENCE.json: " in command
    [command] = commands("alpaca_eval", ["x/a.json", "x/b.json"], OTHER)
    assert command.endswith(f"leaderboard.csv --reference_outputs set.json {metric}; done")


def test_arena_hard_judges_by_its_version_and_categories(commands):
    row = {"uid": "1", "prompt": "p", "category": "hard_prompt"}
    files = ["m.jsonl", "n.jsonl"]
    clone = "in a clone of arena-hard-auto"
    assert commands("arena_hard", files, row, row | {"category": "creative_writing"}) == [
        f"cp m.jsonl n.jsonl data/arena-hard-v2.0/model_answer/  # {clone}, with m, n in "
        "model_list of config/arena-hard-v2.0.yaml",
        "python gen_judgment.py && python show_result.py --category creative_writing && "
        "python show_result.py --category hard_prompt",
    ]
    first = "arena-hard-v0.1"
    assert commands("arena_hard", ["m.jsonl"], row | {"category": first}) == [
        f"cp m.jsonl data/{first}/model_answer/  # {clone}, with m in model_list of "
        f"config/{first}.yaml",
        f"python gen_judgment.py --setting-file config/{first}.yaml && "
        f"python show_result.py --benchmark {first} --category {first}",
    ]
    before = {"question_id": "1", "turns": [{"content": "p"}], "category": first}
    assert commands("arena_hard", ["m.jsonl"], before) == [
        f"cp m.jsonl data/{first}/model_answer/  # {clone} from before April 2025, with m in "
        "model_list of config/judge_config.yaml",
        "python gen_judgment.py && python show_result.py",
    ]


def test_plain_lines_have_no_judge(commands):
    assert commands("jsonl", ["a.jsonl"], {"prompt": "p"}) == []
