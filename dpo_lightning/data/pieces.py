"""The strings of a conversation that a chat template has to write, each with its place.

A string is one piece, but for what templates look for: the tags around a thought, and a tag at
either end. They stay outside, so that what a template does about them it does with marked strings
too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from dpo_lightning.data.texts import Message

THOUGHTS = frozenset({"reasoning_content", "reasoning", "thinking", "thought", "thoughts"})
"""Fields of a message that hold what was thought before the answer."""

_THOUGHT = r"(?:[a-z]+:)?(?:think|thinking|thoughts?|reason|reasoning|scratchpad|analysis)"
# All begin with one of three characters, which is what makes the search fast.
_TAG = re.compile(
    rf"([<\[◁](?:/?{_THOUGHT}>|(?<=\[)/?THINK\]|(?<=◁)/?think▷|\|(?:START|END)_THINKING\|>"
    r"|\|/?think\|>|\|channel>(?:thought|analysis)?|channel\|>))"
)
_LEADING = re.compile(r"\s*<[^<>\s]{1,40}>")
_TRAILING = re.compile(r"<[^<>\s]{1,40}>\s*$")
_OPENING = frozenset("<[◁")
_CLOSING = re.compile(
    rf"</{_THOUGHT}>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>|<\|/think\|>|<channel\|>"
)

# What ties a call to its answer or names a kind is no text for the model.
_LINKS = frozenset({"id", "tool_call_id", "type", "index"})

# Words of JSON Schema whose values are words of JSON Schema, or repeat what stands elsewhere.
_SCHEMA_WORDS = frozenset(
    {"type", "format", "required", "title", "strict", "$schema", "$id", "$ref"}
    | {"additionalProperties"}
)


class Piece(NamedTuple):
    """A string, and its place.

    Attributes:
        text: The string.
        message: The number of its message; -1 for the tools.
        field: Its place in the message, such as ``tool_calls[0].function.name``.
        is_thought: True if it was thought before an answer.
    """

    text: str
    message: int
    field: str
    is_thought: bool


Visit = Callable[[str, str, bool], str]
"""Takes a string, its field and whether it is a thought, and gives what shall stand for it."""


def _is_plain(text: str) -> bool:
    return "<" not in text and "[" not in text and "◁" not in text


def unchanged(text: str, field: str, is_thought: bool) -> str:
    """The string itself."""
    return text


def with_content(text: str, field: str, visit: Visit, *, is_thought: bool = False) -> str:
    """A string with each of its pieces visited."""
    if visit is unchanged or not text or text.isspace():
        return text
    if _is_plain(text):
        return visit(text, field, is_thought)
    parts = _split(text)
    last = max((i for i, part in enumerate(parts) if _CLOSING.search(part)), default=-1)
    return "".join(
        part if i % 2 or not part.strip() else visit(part, field, is_thought or i < last)
        for i, part in enumerate(parts)
    )


def _split(text: str) -> list[str]:
    """A string as text, tag, text, and so on."""
    parts = _TAG.split(text)
    if leading := _LEADING.match(parts[0]):
        parts[:1] = ["", leading.group(), parts[0][leading.end() :]]
    last = parts[-1]
    if last.rstrip().endswith(">") and (trailing := _TRAILING.search(last, last.rfind("<"))):
        parts[-1:] = [last[: trailing.start()], trailing.group(), ""]
    return parts


def begins_with_tag(text: str) -> bool:
    """True if a string's first own character is a tag's."""
    bare = text.lstrip()
    return bare[:1] in _OPENING and (_TAG.match(bare) or _LEADING.match(bare)) is not None


def message_fields(message: Message, visit: Visit, *, text_arguments: bool) -> dict[str, Any]:
    """A message for a template with each of its pieces visited.

    Args:
        message: The message.
        visit: Gives what stands for a piece.
        text_arguments: True if the arguments of a call are given as JSON text.
    """
    fields: dict[str, Any] = {"role": message.role}
    fields["content"] = with_content(message.content, "content", visit)
    if message.extra:
        fields |= extra_fields(json.loads(message.extra), visit, text_arguments=text_arguments)
    return fields


def extra_fields(extra: dict[str, Any], visit: Visit, *, text_arguments: bool) -> dict[str, Any]:
    """The further fields of a message, as :func:`message_fields`."""
    return {
        key: value
        if key in _LINKS
        else _walk(value, key, visit, key in THOUGHTS, text_arguments=text_arguments)
        for key, value in extra.items()
    }


def _walk(
    value: Any, field: str, visit: Visit, is_thought: bool = False, *, text_arguments: bool = False
) -> Any:
    if isinstance(value, str):
        return with_content(value, field, visit, is_thought=is_thought)
    if isinstance(value, list):
        return [
            _walk(item, f"{field}[{i}]", visit, is_thought, text_arguments=text_arguments)
            for i, item in enumerate(value)
        ]
    if not isinstance(value, dict):
        return value
    fields = {}
    for key, item in value.items():
        at = f"{field}.{key}"
        if key == "arguments":
            fields[key] = _arguments(item, at, visit, as_text=text_arguments)
        elif key in _LINKS:
            fields[key] = item
        else:
            fields[key] = _walk(item, at, visit, is_thought, text_arguments=text_arguments)
    return fields


def _arguments(value: Any, field: str, visit: Visit, *, as_text: bool) -> Any:
    """Arguments of a call: what JSON text of an object says counts, and not how it is written."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            return with_content(value, field, visit)
        value = parsed
    marked = _values(value, field, visit)
    return json.dumps(marked, ensure_ascii=False) if as_text else marked


def _values(value: Any, field: str, visit: Visit) -> Any:
    """Any JSON value of which the keys are the row's own, too."""
    if isinstance(value, str):
        return visit(value, field, False) if value.strip() else value
    if isinstance(value, list):
        return [_values(item, f"{field}[{i}]", visit) for i, item in enumerate(value)]
    if isinstance(value, dict):
        # In the order in which templates sort them: marks keep it so.
        ordered = sorted(value, key=lambda key: (key.lower(), key))
        visited = {
            key: (
                visit(key, f"{field}.{key}", False) if key.strip() else key,
                _values(value[key], f"{field}.{key}", visit),
            )
            for key in ordered
        }
        return dict(visited[key] for key in value)
    return value


def tool_fields(tools: Any, visit: Visit) -> Any:
    """Tools for a template with each of their names and descriptions visited."""
    return _tool(tools, "tools", visit)


def _tool(value: Any, field: str, visit: Visit) -> Any:
    if isinstance(value, str):
        return visit(value, field, False) if value.strip() else value
    if isinstance(value, list):
        return [_tool(item, f"{field}[{i}]", visit) for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    names: dict[str, str] = {}
    if isinstance(value.get("properties"), dict):
        own = sorted(value["properties"], key=lambda name: (name.lower(), name))
        names = {name: visit(name, f"{field}.{name}", False) for name in own if name.strip()}
    fields: dict[str, Any] = {}
    for key, item in value.items():
        at = f"{field}.{key}"
        if key == "properties" and isinstance(item, dict):
            fields[key] = {
                names.get(name, name): _tool(of, f"{at}.{name}", visit) for name, of in item.items()
            }
        elif key == "required" and isinstance(item, list):
            fields[key] = [
                names.get(name, name) if isinstance(name, str) else name for name in item
            ]
        else:
            fields[key] = item if key in _SCHEMA_WORDS else _tool(item, at, visit)
    return fields


class Flat(NamedTuple):
    """A part of a conversation as its shape and its pieces.

    Attributes:
        shape: All of it but the pieces; parts of one shape are written alike.
        texts: The pieces' strings.
    """

    shape: str
    texts: tuple[str, ...]


def flatten_message(message: Message) -> Flat:
    """A message as shape and strings."""
    content = message.content
    if content and not message.extra and _is_plain(content) and not content.isspace():
        return Flat(f"={message.role}", (content,))
    texts: list[str] = []
    fields = message_fields(message, _collector(texts), text_arguments=False)
    return Flat(json.dumps(fields, ensure_ascii=False), tuple(texts))


def flatten(messages: Sequence[Message]) -> Flat:
    """Messages as one shape and all their strings."""
    flats = [flatten_message(message) for message in messages]
    return Flat(
        "\x1e".join([flat.shape for flat in flats]),
        tuple([text for flat in flats for text in flat.texts]),
    )


@lru_cache(maxsize=256)
def flatten_tools(tools: str) -> Flat:
    """Tools, a JSON list, as shape and strings."""
    texts: list[str] = []
    fields = tool_fields(json.loads(tools), _collector(texts)) if tools else None
    return Flat(json.dumps(fields, ensure_ascii=False), tuple(texts))


def _collector(texts: list[str]) -> Visit:
    def collect(text: str, field: str, is_thought: bool) -> str:
        texts.append(text)
        return f"\x1f{len(texts)}"

    return collect
