"""The way of each string through a chat template: found, changed or left out, and where it begins.

A conversation is written once with a mark before and behind each of its strings. What comes out is
a skeleton: the template's own text with slots for the strings. Conversations of one shape share it,
and a rendering that is the skeleton with the conversation's own strings in it is proven to hold
each of them, in its place. Comparing costs little beside tokenizing; writing all twice would not.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Encode = Callable[[str], str]

# Planes for private use: no text has them but such as draw their own icons.
_BASES = (0x100000, 0xF0000)
_PLANE = 0xFFFE
_ESCAPED = re.compile(r"\\U00([0-9a-fA-F]{6})|\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})", re.I)
# Enough of a template's text to tell its whitespace from a string's own.
_SOME = 16
_SWITCHES = ("/no_think", "/think")


def _as_is(text: str) -> str:
    return text


def _json(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def _without_switches(text: str) -> str:
    """A text without the words that turn thinking on and off, which templates take out."""
    for switch in _SWITCHES:
        text = text.replace(switch, "")
    return text


_ENCODINGS: tuple[Encode, ...] = (
    _as_is,
    _json,
    lambda text: json.dumps(text)[1:-1],
    lambda text: _json(_json(text)),
    lambda text: json.dumps(json.dumps(text)[1:-1])[1:-1],
    lambda text: repr(text)[1:-1],
    _quoted,
    lambda text: _quoted(text).replace("\n", "\\n"),
    html.escape,
    _without_switches,
)
"""Ways in which templates write a string; each is read back as the same by the model's user."""


def normal(text: str) -> str:
    """A text without its whitespace, which templates strip and change."""
    return "".join(text.split())


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a string in a skeleton.

    Attributes:
        literal: The template's own text before it.
        normal: The same without whitespace.
        piece: The number of the string.
        encode: The way in which it is written.
    """

    literal: str
    normal: str
    piece: int
    encode: Encode


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A template's own text for conversations of one shape, with slots for their strings.

    Attributes:
        slots: In the order of the text; a string may have several, or none.
        tail: The template's text after the last.
        pieces: Number of strings.
        firsts: The number of the first slot of each string that has one.
        in_order: True if each string has a slot, and the first slots stand in the strings' order.
    """

    slots: tuple[Slot, ...]
    tail: str
    pieces: int
    firsts: dict[int, int]
    in_order: bool

    def first_slot(self, pieces: range) -> int | None:
        """The number of the first slot of any of these strings."""
        return min([self.firsts[n] for n in pieces if n in self.firsts], default=None)

    def begins(self, texts: Sequence[str], rendered: str, slot: int | None) -> int | None:
        """The place where a slot begins, if the rendering is the skeleton with these strings.

        Args:
            texts: The strings of the conversation.
            rendered: The conversation as the template writes it.
            slot: A slot; None asks for the end.

        Returns:
            A place in the rendering; None if that is anything else.
        """
        found = self._exactly(texts, rendered, slot)
        return self._but_for_whitespace(texts, rendered, slot) if found is None else found

    def _exactly(self, texts: Sequence[str], rendered: str, wanted: int | None) -> int | None:
        at, found = 0, len(rendered)
        for number, slot in enumerate(self.slots):
            if not rendered.startswith(slot.literal, at):
                return None
            at += len(slot.literal)
            if number == wanted:
                found = at
            length = _length_at(rendered, at, texts[slot.piece], slot.encode)
            if length is None:
                return None
            at += length
        return found if rendered[at:] == self.tail else None

    def _but_for_whitespace(
        self, texts: Sequence[str], rendered: str, wanted: int | None
    ) -> int | None:
        parts: list[str] = []
        before = None
        for number, slot in enumerate(self.slots):
            parts.append(slot.normal)
            if number == wanted:
                before = sum(map(len, parts))
            parts.append(normal(slot.encode(texts[slot.piece])))
        parts.append(normal(self.tail))
        if normal(rendered) != "".join(parts):
            return None
        if wanted is None or before is None:
            return len(rendered)
        place, slot = place_of(rendered, before), self.slots[wanted]
        text = texts[slot.piece]
        own = text[: len(text) - len(text.lstrip())]
        kept = own and rendered[:place].endswith(slot.literal[-_SOME:] + own)
        return place - len(own) if kept else place


def _length_at(rendered: str, at: int, text: str, encode: Encode) -> int | None:
    """Length of a string that stands at a place, written in any way, or stripped."""
    written = encode(text)
    if rendered.startswith(written, at):
        return len(written)
    for other in _ENCODINGS:
        written = other(text)
        for form in (written, written.strip()):
            if rendered.startswith(form, at):
                return len(form)
    return None


def place_of(text: str, count: int) -> int:
    """The place of the character before which there are so many that are no whitespace."""
    for match in re.finditer(r"\S+", text):
        length = match.end() - match.start()
        if count < length:
            return match.start() + count
        count -= length
    return len(text)


@dataclass(frozen=True, slots=True)
class Marks:
    """Characters that stand before and behind each string; no string of the conversation has them.

    Attributes:
        base: The first of them.
    """

    base: int

    @classmethod
    def for_texts(cls, texts: Sequence[str]) -> Marks | None:
        """Marks for these strings; None where there are too many, or their characters are used."""
        if 2 * len(texts) > _PLANE:
            return None
        whole = "".join(texts)
        if whole.isascii():
            return cls(_BASES[0])
        for base in _BASES:
            if not re.search(f"[{chr(base)}-{chr(base + _PLANE)}]", whole):
                return cls(base)
        return None

    def put(self, text: str, piece: int) -> str:
        """A string between its marks."""
        return chr(self.base + 2 * piece) + text + chr(self.base + 2 * piece + 1)

    def skeleton(self, marked: str, texts: Sequence[str]) -> Skeleton:
        """The skeleton that a marked rendering shows.

        A string of which a part is missing, or that was changed, has no slot.
        """
        if "\\" in marked:
            marked = _ESCAPED.sub(self._unescaped, marked)
        parts = re.split(f"([{chr(self.base)}-{chr(self.base + _PLANE)}])", marked)
        slots: list[Slot] = []
        literal, at = parts[0], 1
        while at < len(parts):
            piece, is_end = divmod(ord(parts[at]) - self.base, 2)
            inner = parts[at + 1]
            whole = not is_end and at + 2 < len(parts) and ord(parts[at + 2]) == ord(parts[at]) + 1
            encode = _encoding(inner, texts[piece]) if whole and piece < len(texts) else None
            if encode is None:
                literal += inner
                at += 2
                continue
            slots.append(Slot(literal, normal(literal), piece, encode))
            literal = parts[at + 3]
            at += 4
        firsts: dict[int, int] = {}
        for number, slot in enumerate(slots):
            firsts.setdefault(slot.piece, number)
        in_order = list(firsts) == list(range(len(texts)))
        return Skeleton(tuple(slots), literal, len(texts), firsts, in_order)

    def _unescaped(self, match: re.Match[str]) -> str:
        whole, high, low = match.groups()
        if whole is not None:
            code = int(whole, 16)
        else:
            code = 0x10000 + ((int(high, 16) - 0xD800) << 10) + (int(low, 16) - 0xDC00)
        return chr(code) if self.base <= code <= self.base + _PLANE else match.group()


def _encoding(inner: str, text: str) -> Encode | None:
    """The way in which a template wrote a text; None if it is another text."""
    bare = normal(inner)
    for encode in _ENCODINGS:
        written = encode(text)
        if written == inner or normal(written) == bare:
            return encode
    return None


def search(texts: Sequence[str], rendered: str) -> dict[int, int]:
    """Strings found in a rendering by their text alone, in order, each behind the one before.

    Returns:
        The place of each that was found.
    """
    bare, at = normal(rendered), 0
    found: dict[int, int] = {}
    for piece, text in enumerate(texts):
        places = [(bare.find(part, at), part) for e in _ENCODINGS if (part := normal(e(text)))]
        here = [(place, len(part)) for place, part in places if place >= 0]
        if here:
            place, length = min(here)
            found[piece] = place_of(rendered, place)
            at = place + length
    return found
