"""A prompt with its ranked responses as text: what every row becomes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dpo_lightning.data.texts import ASSISTANT, HUMAN, Message, Text


@dataclass(frozen=True, slots=True)
class PreferenceGroup:
    """A prompt and its responses as text: K >= 2 of them best first, or one with a label.

    Attributes:
        prompt: A string, or the messages that every response follows.
        responses: The K responses, best first; tied ones in the order of the row; or a single one.
        ranks: Dense ranks of the responses, never decreasing; 1 is best, ties share a rank.
        weight: Weight of the group in the loss, finite and above 0.
        target_margin: The margin that the row asks for, or None.
        source: Origin of the row, ``file:line``.
        tools: Tools that the chat template is given, as a JSON list; empty where there are none.
        template_kwargs: The row's own variables of the chat template, as a JSON object with sorted
            keys; empty where there are none.
        form: What gave the order in the row: ``pair`` (chosen and rejected), ``responses`` (best
            first), ``ranks``, ``scores`` or ``better``; ``label`` where there is none; no part of
            what is trained on.
        moved: True if the row had its responses in another order.
        label: None where responses are compared. True or False where the group has one response
            and no partner: it is desirable, or undesirable.
    """

    prompt: Text
    responses: tuple[Text, ...]
    ranks: tuple[int, ...]
    weight: float
    target_margin: float | None
    source: str
    tools: str = ""
    template_kwargs: str = ""
    form: str = field(default="", compare=False, repr=False)
    moved: bool = field(default=False, compare=False, repr=False)
    label: bool | None = None

    @property
    def prompt_key(self) -> str:
        """The prompt as one string; groups that share it belong on one side of a split."""
        if isinstance(self.prompt, str):
            return f"s:{self.prompt}"
        messages = [
            (m.role, m.content, m.extra) if m.extra else (m.role, m.content) for m in self.prompt
        ]
        key: object = {"messages": messages, "tools": self.tools} if self.tools else messages
        return json.dumps(key, ensure_ascii=False)


def prompt_of_key(key: str) -> str | list[dict[str, Any]]:
    """The prompt that a ``prompt_key`` was made of, in the form that rows have.

    Example:
        >>> prompt_of_key("s:Hello"), prompt_of_key('[["user", "Hello"]]')
        ('Hello', [{'role': 'user', 'content': 'Hello'}])
    """
    if not key.startswith(("[", "{")):
        return key.removeprefix("s:")
    found = json.loads(key)
    messages = found["messages"] if isinstance(found, dict) else found
    return [Message(*message).for_template() for message in messages]


def conversation_of(prompt_key: str) -> str:
    """The beginning of a prompt, which all turns of its conversation have in common.

    It ends before the first answer that follows a question. The answers of a conversation that are
    rated one by one have prompts that begin each other; by this they are on one side of a split.

    Example:
        >>> conversation_of('[["user", "Hi"], ["assistant", "Hello"], ["user", "Why?"]]')
        '[["user", "Hi"]]'
    """
    if prompt_key.startswith(f"s:{HUMAN}"):
        return prompt_key.partition(ASSISTANT)[0]
    if not prompt_key.startswith(("[", "{")):
        return prompt_key
    found = json.loads(prompt_key)
    messages = found["messages"] if isinstance(found, dict) else found
    asked = False
    for place, (role, *_) in enumerate(messages):
        if role == "assistant" and asked:
            messages = messages[:place]
            break
        asked = asked or role == "user"
    return json.dumps(messages, ensure_ascii=False)


def as_turns(prompt: str, responses: Sequence[Text]) -> tuple[Text, tuple[Text, ...]]:
    """Strings as the turns of a user and an assistant."""
    turns = [(Message("assistant", r),) if isinstance(r, str) else r for r in responses]
    return (Message("user", prompt),), tuple(turns)


def turned(group: PreferenceGroup) -> PreferenceGroup:
    """A group of strings as one of turns."""
    assert isinstance(group.prompt, str)
    prompt, responses = as_turns(group.prompt, group.responses)
    return replace(group, prompt=prompt, responses=responses)
