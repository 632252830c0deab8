"""Files of answers, field by field as the benchmarks' own loaders read them."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.data.questions import Format, read_questions
from dpo_lightning.run.answering.formats import Written, file_of, style


def written(folder: Path, form: Format, rows: list[dict[str, Any]], *texts: str) -> list[Written]:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    questions = read_questions(path, form)
    return [Written(q, text, len(text)) for q, text in zip(questions, texts, strict=True)]


def test_keys_are_carried_through_in_lines(tmp_path):
    rows = [{"id": 3, "prompt": "ä", "tags": ["x"]}, {"prompt": [{"role": "user", "content": "b"}]}]
    answers = written(tmp_path, "jsonl", rows, "one\ntwo", "")
    lines = file_of(answers, "jsonl", "mine").decode().splitlines()
    assert [json.loads(line) for line in lines] == [
        {**rows[0], "response": "one\ntwo"},
        {**rows[1], "response": ""},
    ]


def test_alpaca_eval_reads_a_list_of_flat_objects(tmp_path):
    """Its loader takes the suffix .json, one list for a table of columns, one generator in all.

    Rows are merged with the reference's by instruction, so that it is as it was.
    """
    rows = [
        {"instruction": "Say it", "output": "of the reference", "generator": "gpt", "dataset": "h"},
        {"instruction": "And that"},
    ]
    answers = written(tmp_path, "alpaca_eval", rows, "it", "that")
    found = json.loads(file_of(answers, "alpaca_eval", "beta-0.1"))
    assert found == [
        {"instruction": "Say it", "output": "it", "generator": "beta-0.1", "dataset": "h"},
        {"instruction": "And that", "output": "that", "generator": "beta-0.1", "dataset": "own"},
    ]


def test_arena_hard_reads_lines_by_uid(tmp_path):
    """Its judge takes messages[-1]["content"]["answer"]; style control all numbers of metadata."""
    row = {"uid": "a1", "category": "hard_prompt", "subcategory": "s", "prompt": "Why?"}
    [answer] = written(tmp_path, "arena_hard", [row], "# So\n- **this**\n```\n- code\n```")
    [line] = file_of([answer], "arena_hard", "mine").decode().splitlines()
    found = json.loads(line)
    assert {key: found[key] for key in row} == row
    assert found["model"] == "mine"
    assert found["messages"][0] == {"role": "user", "content": "Why?"}
    assert found["messages"][-1] == {"role": "assistant", "content": {"answer": answer.text}}
    assert isinstance(found["ans_id"], str)
    assert found["ans_id"]
    assert isinstance(found["tstamp"], float)
    metadata = found["metadata"]
    assert metadata["token_len"] == answer.tokens
    sums = [v if isinstance(v, int) else sum(v.values()) for v in metadata.values()]
    assert list(metadata) == ["token_len", "header_count", "list_count", "bold_count"]
    assert sums[1:] == [1, 1, 1]


def test_arena_hard_of_before_reads_lines_by_question_id(tmp_path):
    row = {"question_id": "q", "category": "c", "cluster": "x", "turns": [{"content": "Why?"}]}
    [answer] = written(tmp_path, "arena_hard", [row], "So.")
    found = json.loads(file_of([answer], "arena_hard", "mine"))
    assert {key: found[key] for key in row} == row
    assert found["model_id"] == "mine"
    assert found["choices"] == [{"index": 0, "turns": [{"content": "So.", "token_len": 3}]}]
    assert {"answer_id", "tstamp", "conv_metadata"} <= set(found)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("### a\n###### b\n#no", {"h3": 1, "h6": 1}),
        ("1. a\n 2. b\n* c\n+ d", {"ordered": 2, "unordered": 2}),
        ("**a** __b__ **c\nd**", {"**": 1, "__": 1}),
        ("```\n# a\n1. b\n```", {}),
    ],
)
def test_marks_of_style(text, counts):
    found = {name: n for group in style(text).values() for name, n in group.items() if n}
    assert found == counts
