"""Files of answers, in the fields of the benchmarks that judge them. No torch."""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpo_lightning.data.questions import Format, Question

SUFFIXES: dict[Format, str] = {"jsonl": ".jsonl", "alpaca_eval": ".json", "arena_hard": ".jsonl"}
"""Suffix of a file of answers; the benchmarks tell its content by it."""


@dataclass(frozen=True, slots=True)
class Written:
    """An answer as it is written.

    Attributes:
        question: What it answers.
        text: Its text.
        tokens: Its tokens, by the policy's tokenizer.
    """

    question: Question
    text: str
    tokens: int


def file_of(answers: Sequence[Written], form: Format, generator: str) -> bytes:
    """The content of a file of answers.

    Args:
        answers: In the order of the prompts.
        form: Its format.
        generator: Name of the policy, by which a leaderboard lists it.
    """
    now = time.time()
    rows = [_ROWS[form](answer, generator, now) for answer in answers]
    if form == "alpaca_eval":
        return f"{json.dumps(rows, ensure_ascii=False, indent=2)}\n".encode()
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows).encode()


def _plain(answer: Written, generator: str, now: float) -> dict[str, Any]:
    return {**answer.question.row, "response": answer.text}


def _alpaca(answer: Written, generator: str, now: float) -> dict[str, Any]:
    row = dict(answer.question.row)
    own = {"instruction": row["instruction"], "output": answer.text, "generator": generator}
    # The evaluation set brings answers of its own reference, which these take the place of.
    return {**row, **own, "dataset": row.get("dataset", "own")}


def _arena(answer: Written, generator: str, now: float) -> dict[str, Any]:
    row = answer.question.row
    if "uid" not in row:
        return _arena_before(answer, generator, now)
    asked = row["prompt"] if "prompt" in row else row["turns"][0]["content"]
    given = asked if isinstance(asked, list) else [{"role": "user", "content": asked}]
    return {
        **row,
        "ans_id": uuid.uuid4().hex,
        "model": generator,
        "messages": [*given, {"role": "assistant", "content": {"answer": answer.text}}],
        "tstamp": now,
        "metadata": {"token_len": answer.tokens} | style(answer.text),
    }


def _arena_before(answer: Written, generator: str, now: float) -> dict[str, Any]:
    """The same for the benchmark's first version."""
    return {
        **answer.question.row,
        "answer_id": uuid.uuid4().hex,
        "model_id": generator,
        "choices": [{"index": 0, "turns": [{"content": answer.text, "token_len": answer.tokens}]}],
        "tstamp": now,
        "conv_metadata": {"token_len": answer.tokens} | style(answer.text),
    }


_ROWS: Mapping[Format, Callable[[Written, str, float], dict[str, Any]]] = {
    "jsonl": _plain,
    "alpaca_eval": _alpaca,
    "arena_hard": _arena,
}

_CODE = re.compile(r"```[^`]*```")


def style(text: str) -> dict[str, dict[str, int]]:
    r"""Counts of headings, list items and bold texts outside of code, for a control of style.

    Args:
        text: An answer in Markdown.

    Example:
        >>> style("# A\n- one\n- **two**")["list_count"]
        {'ordered': 0, 'unordered': 2}
    """
    bare = _CODE.sub("", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, bare, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }
