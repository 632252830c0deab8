"""Answers with marks, and rounds made of them."""

import functools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_lightning.data.marked import MarkedPrompt
from dpo_lightning.run.rounds.files import RoundFacts
from tests.support.models import byte_tokenizer

tokenizer_of_bytes = functools.cache(byte_tokenizer)


def ids_of(tokenizer: Any, text: str, *, special: bool) -> Any:
    ids = tokenizer(text, add_special_tokens=special)["input_ids"]
    return np.array(ids if special else [*ids, tokenizer.eos_token_id], dtype=np.int32)


def marked_prompt(
    prompt: Any,
    answers: Sequence[str],
    marks: Sequence[float | None],
    *,
    tools: str = "",
    source: str = "given.jsonl:1",
) -> MarkedPrompt:
    """A prompt, a text or messages of role and content, with its answers as bytes."""
    tokenizer = tokenizer_of_bytes()
    if isinstance(prompt, str):
        key, text = f"s:{prompt}", prompt
    else:
        messages = [[message["role"], message["content"]] for message in prompt]
        whole: Any = {"messages": messages, "tools": tools} if tools else messages
        key = text = json.dumps(whole, ensure_ascii=False)
    return MarkedPrompt(
        prompt_key=key,
        prompt=ids_of(tokenizer, text, special=True),
        answers=tuple(ids_of(tokenizer, answer, special=False) for answer in answers),
        texts=tuple(answers),
        marks=tuple(marks),
        source=source,
    )


def facts_of(**changes: Any) -> RoundFacts:
    values: dict[str, Any] = {
        "round": 1,
        "step": 0,
        "policy": "ab" * 16,
        "judge": "mine.length",
        "groups": "ranking",
        "noise": "none",
        "min_margin": 0.0,
        "temperature": 1.0,
        "seed": 5,
        "answers": 4,
        "dropped": {},
    }
    return RoundFacts(**(values | changes))
