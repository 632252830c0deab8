"""Conversations by the seed, real chat templates, and a count of strings that knows neither."""

import importlib.util
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from dpo_lightning.data.records import Message, PreferenceGroup
from dpo_lightning.data.rendering import Renderer
from dpo_lightning.data.templates import TemplateOptions
from tests.support.tokens import BEGIN, END, make_tokenizer

TEN = (
    *("qwen3", "qwen2_5", "llama3", "llama3_2", "deepseek_r1_distill"),
    *("gemma", "gemma4", "gptoss", "glm4moe", "lfm2"),
)
"""Templates some of which drop roles, fields, calls or thoughts."""

LETTERS = "жщюэяфъ"
"""Letters that no template writes: a message of one of them is told from the template's text."""

_WORDS = [f"q{a}{b}x{c}" for a in "zvkj" for b in "zvkj" for c in "zv"]
_ATOM = re.compile(rf"q[zvkj]{{2}}x[zv]|[{LETTERS}]")
_BETWEEN = ["", ".", '"', "'", "\\", "\n", "<b>", "{", "}"]


def trl_template(name: str) -> str:
    """A chat template of the installed TRL, which is not imported."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
    return (folder / f"{name}.jinja").read_text(encoding="utf-8")


def chat_tokenizer(template: str) -> Any:
    """A tokenizer of bytes with a chat template; another one each time."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer, bos_token=BEGIN, eos_token=END
    )
    tokenizer.chat_template = template
    return tokenizer


@lru_cache
def real_renderer(name: str) -> Renderer:
    """The renderer of a template of TRL."""
    return Renderer(chat_tokenizer(trl_template(name)), TemplateOptions())


def message(role: str, content: str, **extra: Any) -> Message:
    """A message with further fields."""
    return Message(role, content, json.dumps(extra, sort_keys=True) if extra else "")


def a_call(name: str, arguments: Any) -> dict[str, Any]:
    """A call of a tool as messages have it."""
    return {"id": "c0", "type": "function", "function": {"name": name, "arguments": arguments}}


class Talk:
    """Rows of any content by a random number generator."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def _word(self) -> str:
        return self._rng.choice(_WORDS)

    def text(self) -> str:
        """One letter, a word or several, often with whitespace around."""
        rng = self._rng
        kind = rng.random()
        if kind < 0.2:
            return rng.choice(LETTERS)
        words = 1 if kind < 0.5 else rng.randint(1, 5)
        text = " ".join(self._word() + rng.choice(_BETWEEN) for _ in range(words))
        return rng.choice(["", " ", "\n"]) + text + rng.choice(["", " ", "\n\n"])

    def _call(self) -> dict[str, Any]:
        values = [self.text(), 5, True, {"a": self.text()}, [self.text()]]
        count = self._rng.randint(0, 2)
        arguments = {self._word(): self._rng.choice(values) for _ in range(count)}
        given = self._rng.choice([arguments, json.dumps(arguments)])
        return a_call(self._word(), given)

    def _answer(self) -> Message:
        rng, content = self._rng, self.text()
        extra: dict[str, Any] = {}
        if rng.random() < 0.15:
            extra[rng.choice(["reasoning_content", "thinking", "reasoning"])] = self.text()
        elif rng.random() < 0.15:
            content = f"<think>\n{self.text()}\n</think>\n\n{content}"
        if rng.random() < 0.15:
            extra["tool_calls"] = [self._call() for _ in range(rng.randint(1, 2))]
            content = rng.choice(["", content])
        return message("assistant", content, **extra)

    def _turn(self, role: str) -> Message:
        if role == "assistant":
            return self._answer()
        named = {"name": self._word()} if self._rng.random() < 0.05 else {}
        return message(role, self.text(), **named)

    def _tools(self) -> str:
        if self._rng.random() > 0.15:
            return ""
        properties = {self._word(): {"type": "string", "description": self.text()}}
        function = {
            "name": self._word(),
            "description": self.text(),
            "parameters": {"type": "object", "properties": properties, "required": []},
        }
        return json.dumps([{"type": "function", "function": function}])

    def group(self) -> PreferenceGroup:
        """A row of messages: roles, thoughts, calls and tools in many places."""
        rng = self._rng
        roles = [rng.choice(["system", "developer"])] if rng.random() < 0.3 else []
        roles.append("user")
        for _ in range(rng.randint(0, 2)):
            roles += ["assistant", rng.choice(["user", "user", "tool"])]
        if rng.random() < 0.1:
            roles.append(rng.choice(["assistant", "human", "user"]))
        prompt = tuple(self._turn(role) for role in roles)
        responses = tuple((self._answer(),) for _ in range(2))
        return PreferenceGroup(prompt, responses, (1, 2), 1.0, None, "f:1", self._tools())


# The count ----------------------------------------------------------------------------------------


def atoms(text: str) -> Counter[str]:
    """Words and letters of a text that only rows have."""
    return Counter(_ATOM.findall(text))


def _strings(value: Any, *, own_keys: bool = False) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item, own_keys=own_keys)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "arguments":
                given = json.loads(item) if isinstance(item, str) else item
                yield from _strings(given, own_keys=True)
                continue
            if own_keys:
                yield key
            yield from _strings(item, own_keys=own_keys or key == "properties")


def strings_given(
    messages: tuple[Message, ...], tools: str, *, thoughts: bool = True
) -> Counter[str]:
    """Words and letters that a conversation has, each as often as it has it.

    Args:
        messages: The conversation; a name of a tool's turn is not counted, which repeats its call.
        tools: Tools, as JSON.
        thoughts: False leaves out what was thought before an answer.
    """
    found = Counter[str]()
    for part in _strings(json.loads(tools) if tools else []):
        found += atoms(part)
    for turn in messages:
        fields = {"content": turn.content, **(json.loads(turn.extra) if turn.extra else {})}
        if turn.role == "tool":
            fields.pop("name", None)
        if not thoughts:
            fields["content"] = fields["content"].rpartition("</think>")[2]
            for key in ("reasoning_content", "thinking", "reasoning"):
                fields.pop(key, None)
        for part in _strings(fields):
            found += atoms(part)
    return found
