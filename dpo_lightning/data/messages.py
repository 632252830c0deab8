"""Messages of rows: their roles, contents, and what else a chat template is given of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from dpo_lightning.data.fields import (
    FieldAccount,
    UnusedField,
    holds_text,
    is_empty,
    may_be_for_the_model,
)
from dpo_lightning.data.texts import (
    Message,
    RowError,
    Text,
    check_text,
    describe,
    show,
)

ROLES = {
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys(
        ("assistant", "model", "gpt", "ai", "bot", "chatbot", "chatgpt", "function_call"),
        "assistant",
    ),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(
        ("tool", "function", "observation", "function_response", "tool_response"), "tool"
    ),
}
"""Names that people give to roles, and the names that chat templates know."""

# Fields that templates know; the check of what was rendered finds those that one does not.
_TEXT_FIELDS = (
    *("name", "tool_call_id", "tool_name", "reasoning_content", "reasoning", "thinking"),
    *("tool_plan",),
)

_MESSAGE_KEYS = (("role", "content"), ("role", "tool_calls"), ("from", "value"))
_AS_TEXT = re.compile(r"""\s*(\[\s*)?\{\s*["'](role|content|from|value)["']\s*:""")
# Python needs minutes for a nesting that JSON refuses at once.
_LONGEST_REPR = 1 << 20


class MessageReader:
    """Reads texts and messages of rows.

    Args:
        account: Takes note of what is inferred and of what is not read.
        null_is_absent: Nulls inside of what a template is given were added by a table.
    """

    def __init__(self, account: FieldAccount, *, null_is_absent: bool) -> None:
        self._account = account
        self._null_is_absent = null_is_absent

    def text(self, value: object, label: str) -> Text:
        """Checks a text of any kind.

        Args:
            value: A string, a message, or a list of messages; or these as JSON text.
            label: Place of the value in the row, for errors.

        Raises:
            RowError: If the value is anything else.
        """
        if isinstance(value, str):
            found = self._messages_in(value, label)
            if found is None:
                return check_text(value, label)
            self._account.said["json"] += 1
            value = found
        if isinstance(value, dict) and ("role" in value or "from" in value):
            return (self.message(value, label),)
        if isinstance(value, list):
            if not value:
                raise RowError(label, "an empty list, expected at least one message")
            return tuple([self.message(item, f"{label}[{i}]") for i, item in enumerate(value)])
        raise RowError(label, f"{describe(value)}, expected a text or a list of messages")

    def message(self, value: object, label: str) -> Message:
        """Checks one message, ``{"role", "content"}`` or ``{"from", "value"}``."""
        if not isinstance(value, dict):
            raise RowError(label, f"{describe(value)}, expected an object of 'role', 'content'")
        keys = ("role", "content")
        # In a table every message has every key.
        turn = value.get("role") is None and value.get("content") is None
        if turn and (value.get("from") is not None or ("from" in value and "value" in value)):
            keys = ("from", "value")
        role = self._role(value, label, keys[0])
        extra = self._extra(value, label, keys)
        content = self._content(value, label, keys[1], has_more=bool(extra))
        if keys[0] == "from" and value["from"].strip().lower() == "function_call":
            content, extra = self._called(content, extra, label)
        return Message(role, content, _written(extra, label))

    def _role(self, value: Mapping[str, object], label: str, key: str) -> str:
        place = f"{label}.{key}"
        if key not in value:
            raise RowError(place, f"missing; there is {describe(value)}")
        role = value[key]
        if not isinstance(role, str):
            raise RowError(place, f"{describe(role)}, expected a text")
        check_text(role, place)
        if not role.strip():
            raise RowError(place, "an empty text, expected the name of a role")
        known = ROLES.get(role.strip().lower())
        if known is None:
            if key == "from":
                names = ", ".join(ROLES)
                raise RowError(place, f"{show(role)}, expected one of {names}")
            return role
        if known != role and key == "role":
            self._account.roles[role, known] += 1
        return known

    def _content(self, value: Mapping[str, object], label: str, key: str, *, has_more: bool) -> str:
        place = f"{label}.{key}"
        content = value.get(key)
        if content is None and has_more:
            return ""  # such as beside a tool call
        if key not in value:
            raise RowError(place, f"missing; there is {describe(value)}")
        if isinstance(content, dict):
            content = [content]
        if isinstance(content, list):
            self._account.said["parts"] += 1
            return "".join([self._part(part, f"{place}[{i}]") for i, part in enumerate(content)])
        if not isinstance(content, str):
            raise RowError(place, f"{describe(content)}, expected a text")
        return check_text(content, place)

    def _part(self, part: object, place: str) -> str:
        """The text of one part of a content; of other kinds there are none."""
        if isinstance(part, str):
            return check_text(part, place)
        if not isinstance(part, dict):
            raise RowError(place, f"{describe(part)}, expected a part with a text")
        kind = part.get("type") or "text"
        if kind not in ("text", "input_text", "output_text"):
            raise RowError(place, f"a part of type {show(kind)}; models are given text alone")
        text = part.get("text")
        if not isinstance(text, str):
            raise RowError(f"{place}.text", f"{describe(text)}, expected a text")
        for key, item in part.items():
            if key in ("type", "text") or is_empty(item):
                continue
            name = f"messages.content.{key}"
            if self._account.ignores(name):
                continue
            if holds_text(item) and may_be_for_the_model(key):
                raise UnusedField(f"{place}.{key}", name)
            self._account.unread[name] += 1
        return check_text(text, place)

    def _extra(
        self, value: Mapping[str, object], label: str, keys: tuple[str, str]
    ) -> dict[str, Any]:
        """Further fields for the template."""
        extra: dict[str, Any] = {}
        for key, item in value.items():
            if key in keys or is_empty(item):
                continue
            name, place = f"messages.{key}", f"{label}.{key}"
            if self._account.ignores(name):
                continue
            if key == "tool_calls":
                extra[key] = [*extra.get(key, []), *self.calls(item, place)]
            elif key == "function_call":
                extra["tool_calls"] = [*extra.get("tool_calls", []), *self.calls([item], place)]
                self._account.said["function_call"] += 1
            elif key in _TEXT_FIELDS:
                if not isinstance(item, str):
                    raise RowError(place, f"{describe(item)}, expected a text")
                extra[key] = item
            elif may_be_for_the_model(key) and holds_text(item):
                raise UnusedField(place, name)
            else:
                self._account.unread[name] += 1
        return extra

    def calls(self, value: object, place: str) -> list[dict[str, Any]]:
        """Tool calls in one form: ``{"type": "function", "function": {"name", "arguments"}}``."""
        value = parsed(value, place)
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            raise RowError(place, f"{describe(value)}, expected a list of tool calls")
        return [self._call(call, f"{place}[{i}]") for i, call in enumerate(value)]

    def _call(self, call: object, place: str) -> dict[str, Any]:
        call = parsed(call, place)
        if not isinstance(call, dict):
            raise RowError(place, f"{describe(call)}, expected an object of 'name', 'arguments'")
        call = {key: item for key, item in call.items() if item is not None}
        if "function" in call:
            function = parsed(call["function"], f"{place}.function")
        else:
            function = {key: call.pop(key) for key in ("name", "arguments") if key in call}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(place, f"{describe(function)}, expected 'name' and 'arguments'")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            # Templates write arguments out as JSON: a text would be quoted twice.
            arguments = _object_or_text(arguments)
        elif self._null_is_absent:
            arguments = without_nulls(arguments)
        function = {key: item for key, item in function.items() if item is not None}
        if arguments is not None:
            function["arguments"] = arguments
        return {"type": "function", **call, "function": function}

    def _called(
        self, content: str, extra: dict[str, Any], label: str
    ) -> tuple[str, dict[str, Any]]:
        """The turn of a function call, whose text is the call."""
        try:
            found = json.loads(content)
            calls = self.calls(found, label)
        except (ValueError, RecursionError, RowError):
            return content, extra
        self._account.said["function_call"] += 1
        return "", {**extra, "tool_calls": [*calls, *extra.get("tool_calls", [])]}

    def tools(self, value: object, label: str) -> str:
        """The tools of a row as a JSON list; empty where there are none."""
        value = parsed(value, label)
        if isinstance(value, dict):
            value = [value]
        if not isinstance(value, list):
            raise RowError(label, f"{describe(value)}, expected a list of tools")
        tools = []
        for index, item in enumerate(value):
            tool = parsed(item, f"{label}[{index}]")
            if not isinstance(tool, dict) or not tool:
                raise RowError(f"{label}[{index}]", f"{describe(tool)}, expected an object")
            tool = without_nulls(tool) if self._null_is_absent else dict(tool)
            for holder in (tool, tool.get("function")):
                if isinstance(holder, dict) and isinstance(holder.get("parameters"), str):
                    holder["parameters"] = _object_or_text(holder["parameters"])
            if "name" in tool and "function" not in tool and "type" not in tool:
                tool = {"type": "function", "function": tool}
            tools.append(tool)
        return _dumped(tools, label) if tools else ""

    def template_kwargs(self, value: object, label: str) -> str:
        """A row's own variables of the chat template as a JSON object; empty without any."""
        value = parsed(value, label)
        if not isinstance(value, dict):
            raise RowError(label, f"{describe(value)}, expected an object")
        return _written(without_nulls(value) if self._null_is_absent else value, label)

    def _messages_in(self, text: str, label: str) -> object:
        """The messages that a text spells out as JSON, or as Python prints them."""
        if _AS_TEXT.match(text) is None:
            return None
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = _python_value(text, label)
        # Other JSON is what a model was asked for.
        return found if _are_messages(found) else None


def _are_messages(value: object) -> bool:
    """True if a value has the keys of a message, or is a list of such."""
    items = value if isinstance(value, list) else [value]
    return bool(items) and all(
        isinstance(item, dict) and any(set(keys) <= item.keys() for keys in _MESSAGE_KEYS)
        for item in items
    )


def _python_value(text: str, label: str) -> object:
    try:
        if len(text) > _LONGEST_REPR:
            raise ValueError("too long")
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise RowError(
            label,
            f"the text {show(text)} looks like messages and is neither JSON nor Python's form "
            "of them; write them as JSON",
        ) from None


def parsed(value: object, label: str) -> object:
    """The content of a JSON text; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RowError(label, f"{describe(value)}, expected JSON") from None


def without_nulls(value: Any) -> Any:
    """A value without the nulls in its objects, at any depth that Python reads."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


def _object_or_text(text: str) -> object:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, dict) else text


def _written(fields: dict[str, Any], label: str) -> str:
    # The order of what is inside is the user's: templates write it out.
    return _dumped(dict(sorted(fields.items())), label) if fields else ""


def _dumped(value: object, label: str) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise RowError(label, f"cannot be written as JSON: {str(error)[:80]}") from None
    return check_text(text, label)
