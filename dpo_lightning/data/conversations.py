"""One conversation of a row, the messages that a template is given of it, and faults of the two."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from dpo_lightning.data.pieces import (
    Flat,
    Piece,
    Visit,
    message_fields,
    tool_fields,
    unchanged,
)
from dpo_lightning.data.rows import PreferenceGroup
from dpo_lightning.data.texts import Message, show


@dataclass(frozen=True, slots=True)
class Fault:
    """A reason against a row of messages.

    Attributes:
        field: The place in the row, such as ``prompt[0].content``.
        problem: The fault found there.
        cause: The same without what is of this row alone; rows of one cause have one remedy.
        remedy: The settings that would help.
    """

    field: str
    problem: str
    cause: str
    remedy: str


class FaultyRow(Exception):
    """A row that the template does not take, or not all of."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.problem)
        self.fault = fault


class Chat(NamedTuple):
    """One conversation: a prompt with one response.

    Attributes:
        prompt: The messages before the response.
        response: The messages of it.
        tools: Tools, as JSON.
        kwargs: The template's variables.
        continued: True if the first message of the response goes on with the last of the prompt.
        texts: All strings: of the tools, the prompt, the response.
        own: The numbers of the response's.
        shape: All but the strings.
    """

    prompt: tuple[Message, ...]
    response: tuple[Message, ...]
    tools: str
    kwargs: dict[str, Any]
    continued: bool
    texts: tuple[str, ...]
    own: range
    shape: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class ResponseName:
    """The name of a response, in the words of the row.

    Attributes:
        number: Its number, best first.
        count: Number of responses.
    """

    number: int
    count: int

    def __str__(self) -> str:
        """Chosen or rejected where there are two, and no number where there is one."""
        if self.count == 1:
            return "response"
        if self.count == 2:
            return ("chosen", "rejected")[self.number]
        return f"responses[{self.number}]"


def make_chat(
    group: PreferenceGroup,
    response: tuple[Message, ...],
    flats: tuple[Flat, Flat, Flat],
    kwargs: dict[str, Any],
) -> Chat:
    """A row's prompt with one of its responses.

    Args:
        group: The row.
        response: The messages of the response.
        flats: Tools, prompt and response as shapes and strings.
        kwargs: The template's variables.
    """
    prompt = tuple(m for m in group.prompt if isinstance(m, Message))
    tools, before, after = flats
    last = prompt[-1]
    continued = last.role == response[0].role == "assistant" and '"tool_calls"' not in last.extra
    start = len(tools.texts) + len(before.texts)
    options = group.template_kwargs
    return Chat(
        prompt=prompt,
        response=response,
        tools=group.tools,
        kwargs=kwargs,
        continued=continued,
        texts=tools.texts + before.texts + after.texts,
        own=range(start, start + len(after.texts)),
        shape=(tools.shape, before.shape, after.shape, options, continued),
    )


def messages_of(chat: Chat, visit: Visit, *, text_arguments: bool) -> list[dict[str, Any]]:
    """The messages for a template, with each of their pieces visited."""
    fields = [
        message_fields(message, visit, text_arguments=text_arguments)
        for message in (*chat.prompt, *chat.response)
    ]
    if not chat.continued:
        return fields
    at = len(chat.prompt)
    begun, rest = fields[at - 1], fields[at]
    merged = {**begun, **rest}
    for key in begun.keys() & rest.keys() - {"role"}:
        if isinstance(begun[key], str) and isinstance(rest[key], str):
            merged[key] = begun[key] + rest[key]
    return [*fields[: at - 1], merged, *fields[at + 1 :]]


def pieces_of(chat: Chat) -> list[Piece]:
    """The strings of a conversation with their places, in the order of their numbers."""
    found: list[Piece] = []

    def collector(message: int) -> Visit:
        def collect(text: str, field: str, is_thought: bool) -> str:
            found.append(Piece(text, message, field, is_thought))
            return text

        return collect

    if chat.tools:
        tool_fields(json.loads(chat.tools), collector(-1))
    for number, message in enumerate((*chat.prompt, *chat.response)):
        message_fields(message, collector(number), text_arguments=False)
    return found


def has_python(chat: Chat, text: str) -> bool:
    """True if arguments came out as Python writes a dictionary, and not as JSON."""
    found: list[dict[str, Any]] = []

    def look(value: Any) -> None:
        if isinstance(value, dict):
            arguments = value.get("arguments")
            if isinstance(arguments, dict) and arguments:
                found.append(arguments)
            for item in value.values():
                look(item)
        elif isinstance(value, list):
            for item in value:
                look(item)

    look(messages_of(chat, unchanged, text_arguments=False))
    return any(repr(arguments) in text for arguments in found)


def names_its_call(chat: Chat, piece: Piece) -> bool:
    """True if a tool's turn names the call that it answers, as its id does: that tells nothing."""
    messages = (*chat.prompt, *chat.response)
    if piece.message < 0 or piece.field != "name" or messages[piece.message].role != "tool":
        return False
    calls = [m for m in messages[: piece.message] if '"tool_calls"' in m.extra]
    return bool(calls) and json.dumps(piece.text) in calls[-1].extra


# Faults -----------------------------------------------------------------------------------------


def _place(chat: Chat, piece: Piece, where: ResponseName) -> tuple[str, str]:
    """A piece's place in the row, and the role of its message."""
    if piece.message < 0:
        return piece.field, "tools"
    if piece.message < len(chat.prompt):
        return f"prompt[{piece.message}].{piece.field}", chat.prompt[piece.message].role
    at = piece.message - len(chat.prompt)
    return f"{where}[{at}].{piece.field}", chat.response[at].role


def left_out_fault(chat: Chat, piece: Piece, where: ResponseName) -> Fault:
    """A string that is not in the text."""
    place, role = _place(chat, piece, where)
    key = piece.field.partition(".")[0].partition("[")[0]
    name = f"messages.{key}"
    of = f"{show(key)} of the role {show(role)}"
    remedy = "name a template that writes it with data.chat_template="
    if piece.message < 0:
        of, name = "'tools'", "tools"
    elif piece.is_thought and key == "content":
        of = f"a thought in {of}"
    if name != "messages.content":
        remedy += f", or leave it out with 'data.ignore_fields=[{name}]'"
    return Fault(
        place,
        f"the chat template leaves out {show(piece.text)} ({of})",
        f"the chat template leaves out {of}",
        remedy,
    )


def moved_fault(chat: Chat, piece: Piece, where: ResponseName) -> Fault:
    """A string that stands behind one of a later message."""
    place, role = _place(chat, piece, where)
    if chat.continued and piece.message == len(chat.prompt) - 1:
        of = "the answer that the prompt has begun behind a thought or a call of the response"
        return Fault(
            place,
            f"the chat template writes {of}",
            f"the chat template writes {of}",
            "give the thought or the call with the begun answer, or begin none",
        )
    return Fault(
        place,
        f"the chat template writes {show(piece.text)} of the role {show(role)} behind a later turn",
        f"the chat template writes the role {show(role)} behind a later turn",
        "name another template with data.chat_template=, or reorder the messages",
    )


def refused_fault(chat: Chat, error: Exception) -> Fault:
    """A conversation that the template has an error for."""
    said = " ".join(str(error).split()) or type(error).__name__
    roles = ", ".join(m.role for m in (*chat.prompt, *chat.response))
    return Fault(
        "prompt",
        f"the chat template refuses a conversation with the roles {roles}: {said}",
        f"the chat template refuses conversations: {said}",
        "name another template with data.chat_template=",
    )
