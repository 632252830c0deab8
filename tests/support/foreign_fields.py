"""Rows and messages with fields of every kind, each text in them told apart by a tag."""

import json
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from dpo_lightning.data.fields import FieldAccount
from dpo_lightning.data.groups import PreferenceGroup

COLUMNS = (
    *("system", "tools", "chat_template_kwargs", "input", "context", "documents", "images"),
    *("reasoning_content", "question", "messages", "history", "session_id", "source", "note"),
    *("promt", "system_prompt", "name", "weight", "ranks", "metadata", "", "model"),
)
KEYS = (
    *("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "images", "audio"),
    *("id", "weight", "function_call", "from", "value", "text", "prefix", "documents", "timestamp"),
)
ROLES = ("system", "user", "assistant", "tool", "human", "model", "developer", "User", "critic")

WORDS = ("a", "Hi there", "no", "{", "[1]", "é", "two\nlines", "{'role': 'x'}", "<think>")


class Maker:
    """Makes rows; the same ones of the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def row(self) -> dict[str, Any]:
        """A row in a form that is read, with up to two foreign columns."""
        pick = self._random.choice
        texts = pick([self._word, self._conversation])
        row: dict[str, Any] = {"chosen": texts(), "rejected": texts()}
        if pick([True, False, False]):
            row = {"responses": [self._word() for _ in range(pick([2, 3]))]}
        if pick([True, True, True, False]):
            row["prompt"] = pick([self._word, self._messages])()
        known = {
            "tools": self._tools,
            "system": self._word,
            "messages": self._messages,
            "chat_template_kwargs": lambda: {"enable_thinking": pick([True, "yes", None])},
        }
        foreign = self._random.sample(COLUMNS, pick([0, 1, 1, 2]))
        made = {name: self._field(known.get(name)) for name in foreign} | row
        return _tagged(made, as_json=pick([True, False]))

    def row_of(self, columns: Collection[str]) -> dict[str, Any]:
        """A row of the given columns, with values of any kind that one of them may have."""
        kinds = (self._word, self._messages, self._conversation, self._value, self._answers)
        made = {name: self._random.choice(kinds)() for name in columns}
        for name in self._random.sample(COLUMNS, 1):
            made.setdefault(name, self._value())
        return _tagged(made, as_json=False)

    def _answers(self) -> Any:
        keys = ("answer", "rank", "response", "overall_score", "messages", "tools", "note")
        number = self._random.choice([1, 2.0, None])
        values = (self._word, lambda: number, self._messages)
        return [
            {key: self._random.choice(values)() for key in keys}
            for _ in range(self._random.randrange(3))
        ]

    def _field(self, own: Callable[[], Any] | None) -> Any:
        return own() if own is not None and self._random.random() < 0.7 else self._value()

    def _word(self) -> str:
        return self._random.choice(WORDS)

    def _value(self, depth: int = 2) -> Any:
        kind = self._random.randrange(8 if depth else 5)
        if kind < 3:
            return self._word()
        if kind == 3:
            return None
        if kind == 4:
            return self._random.choice([True, 0, 3, -1.5])
        if kind == 5:
            return [self._value(depth - 1) for _ in range(self._random.randrange(3))]
        names = self._random.sample(["type", "text", "x", "function", "name"], 2)
        return {name: self._value(depth - 1) for name in names}

    def _call(self) -> Any:
        call = {"name": self._word(), "arguments": {"what": self._value(), "n": self._value(0)}}
        return self._random.choice(
            [call, {"type": "function", "id": self._word(), "function": call}]
        )

    def _tools(self) -> Any:
        return [
            {"name": self._word(), "description": self._word(), "parameters": self._value()}
            for _ in range(self._random.randrange(3))
        ]

    def _content(self) -> Any:
        kind = self._random.randrange(8)
        if kind == 0:
            return None
        if kind == 1:
            return [{"type": "text", "text": self._word(), "cache": self._value()}, self._word()]
        return self._word()

    def _message(self, roles: Sequence[str]) -> dict[str, Any]:
        known = {"tool_calls": lambda: [self._call()], "function_call": self._call}
        texts = ("tool_call_id", "name", "reasoning_content", "thinking")
        known |= dict.fromkeys(texts, self._word)
        foreign = self._random.sample(KEYS, self._random.choice([0, 0, 1, 2]))
        message = {name: self._field(known.get(name)) for name in foreign}
        return {**message, "role": self._random.choice(roles), "content": self._content()}

    def _messages(self) -> list[dict[str, Any]]:
        return [self._message(ROLES) for _ in range(self._random.randrange(1, 4))]

    def _conversation(self) -> list[dict[str, Any]]:
        return [self._message(("assistant", "model", "gpt"))]


def _tagged(row: dict[str, Any], *, as_json: bool) -> dict[str, Any]:
    """The row with a tag in every text but roles and types; tools as JSON text, if wanted."""
    count = 0

    def tag(value: Any, key: str) -> Any:
        nonlocal count
        if isinstance(value, dict):
            return {name: tag(item, name) for name, item in value.items()}
        if isinstance(value, list):
            return [tag(item, key) for item in value]
        if isinstance(value, str) and key not in ("role", "type", "from"):
            count += 1
            return f"{value}\u00a7{count}\u00a7"
        return value

    tagged = {name: tag(value, name) for name, value in row.items()}
    if as_json and isinstance(tagged.get("tools"), list):
        tagged["tools"] = json.dumps(tagged["tools"])
    return tagged


def _texts(value: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each tag in a row, with the names of the fields that it stands in."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, (*names, name))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, names)
    elif isinstance(value, str):
        for tag in value.split("\u00a7")[1::2]:
            yield names, f"\u00a7{tag}\u00a7"


def lost(row: dict[str, Any], group: PreferenceGroup, account: FieldAccount) -> list[str]:
    """Texts of a row that are neither in its group nor in a field that is named."""
    written = [group.tools, group.template_kwargs]
    for text in (group.prompt, *group.responses):
        if isinstance(text, str):
            # A prompt that was found in the responses may end inside a tag.
            written.append(str(group.prompt) + text)
        else:
            written += [part for message in text for part in (message.content, message.extra)]
    whole = "\n".join(written)
    named = {*account.unread, *account.told}
    found = []
    for names, tag in _texts(row, ()):
        known = {names[0], *(f"messages.{name}" for name in names[1:])}
        known |= {f"messages.content.{name}" for name in names[2:]}
        if tag not in whole and not named & known:
            found.append(f"{'.'.join(names)}: {tag}")
    return found
