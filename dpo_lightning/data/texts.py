"""The texts of a row, strings or lists of messages: their checks and their common beginning."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

# Roles whose turns are given to the policy: a response never begins with one of them.
GIVEN_ROLES = frozenset({"system", "developer", "user", "tool"})

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""Beginnings of turns in dialogues that are one text, as in Anthropic's hh-rlhf."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60
_SHORT.maxlevel = 2


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Its role, as the chat template is given it.
        content: Its text.
        extra: Further fields for the chat template (``tool_calls``, ``reasoning_content``,
            ``name``), as a JSON object with sorted keys; empty where there are none.
    """

    role: str
    content: str
    extra: str = ""

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        return message | json.loads(self.extra) if self.extra else message


Text: TypeAlias = str | tuple[Message, ...]


class RowError(Exception):
    """A row that is no preference group: the field at fault and what was found there."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem


def show(value: object) -> str:
    """A short form of any value, on one line that can be printed."""
    # null, true and false are what the file says.
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    return _SHORT.repr(value)


def printable(text: str) -> str:
    """Escapes everything in a text that would break the line it is printed on."""
    return text if text.isprintable() else repr(text)[1:-1]


def typed_name(name: str) -> str:
    """A name as it is typed inside the quotes of a setting, with quotes of its own where needed.

    Example:
        >>> typed_name("chosen-model 2"), typed_name("a,b")
        ('chosen-model 2', '"a,b"')
    """
    if re.fullmatch(r"[A-Za-z_][\w.@/-]*( [\w.@/-]+)*", name, re.ASCII) and (
        name.lower() not in ("null", "true", "false", "nan", "inf")
    ):
        return name
    escaped = name.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(escaped)}"'


def list_names(names: Iterable[object]) -> str:
    """Names for a message, quoted; a long list is cut."""
    names = list(names)
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (", ".join(map(show, names[:12])) or "nothing") + more


def describe(value: object) -> str:
    """Describes a value by its kind, in the words of JSON."""
    if value is None or isinstance(value, bool):
        return show(value)
    if isinstance(value, int | float):
        return f"the number {show(value)}"
    if isinstance(value, str):
        return f"the text {show(value)}"
    if isinstance(value, dict):
        return f"an object of {list_names(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return f"a {type(value).__name__}"


def split_strings(texts: Sequence[str]) -> tuple[str, list[str], bool]:
    """Splits strings into their common beginning and the rest of each.

    Dialogues of ``Human:`` and ``Assistant:`` are split where the last common answer begins.

    Returns:
        The common beginning, the rests, and whether the texts are such dialogues.
    """
    common = common_beginning(texts)
    at = common.rfind(ASSISTANT) if common.startswith(HUMAN) else -1
    # A space belongs to the word that follows it, for tokenizers as for readers.
    prompt = common[: at + len(ASSISTANT)] if at >= 0 else common.rstrip()
    return prompt, [text[len(prompt) :] for text in texts], at >= 0


def split_messages(
    lists: Sequence[tuple[Message, ...]], labels: Sequence[str]
) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """Splits conversations into their common beginning and the rest of each.

    A rest is never empty and begins with an answer, so that the prompt ends before the last common
    answer when the conversations differ in a later question.

    Args:
        lists: The conversations.
        labels: Their places in the row, for errors.

    Raises:
        RowError: If the conversations differ before the first answer.
    """
    first, *others = lists
    size, limit = 0, min(map(len, lists)) - 1
    while size < limit and all(other[size] == first[size] for other in others):
        size += 1
    while size and any(messages[size].role in GIVEN_ROLES for messages in lists):
        size -= 1
    if not size:
        raise RowError(labels[0], f"no prompt: {_difference(lists, labels)}")
    return first[:size], [messages[size:] for messages in lists]


def _difference(lists: Sequence[tuple[Message, ...]], labels: Sequence[str]) -> str:
    """The first message in which conversations differ that should begin alike."""
    first = lists[0]
    for other, label in zip(lists[1:], labels[1:], strict=True):
        for at, (one, two) in enumerate(zip(first, other, strict=False)):
            if one != two:
                shown = [f"{show(m.role)} says {show(m.content)}" for m in (one, two)]
                return (
                    "the conversations have no common beginning: in "
                    f"{labels[0]}[{at}] {shown[0]}, and in {label}[{at}] {shown[1]}"
                )
    return "the responses are conversations that begin with an answer"


def common_beginning(texts: Sequence[str]) -> str:
    """The longest text that all of these begin with; empty for none."""
    # The smallest and the largest have no longer a beginning in common than all of them.
    first, last = min(texts, default=""), max(texts, default="")
    # By bisection: slices compare at the speed of C.
    low, high = 0, min(len(first), len(last))
    while low < high:
        middle = (low + high + 1) // 2
        if first[low:middle] == last[low:middle]:
            low = middle
        else:
            high = middle - 1
    return first[:low]


def check_text(text: str, label: str) -> str:
    """Returns the text if it is Unicode: JSON can spell one half of a character."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise RowError(label, f"lone surrogate {half} at character {error.start + 1}") from None
    return text
