"""Rows of messages written by a chat template, with a proof that all of each row is in the text.

What the template itself writes before a response's own first character belongs to the prompt. A
prompt that ends in an assistant's turn is continued, not closed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_lightning.data.conversations import (
    Chat,
    Fault,
    FaultyRow,
    ResponseName,
    has_python,
    left_out_fault,
    make_chat,
    messages_of,
    moved_fault,
    names_its_call,
    pieces_of,
    refused_fault,
)
from dpo_lightning.data.limits import Bounds, OutOfBounds
from dpo_lightning.data.pieces import (
    THOUGHTS,
    Piece,
    Visit,
    begins_with_tag,
    flatten,
    flatten_tools,
    tool_fields,
    unchanged,
)
from dpo_lightning.data.provenance import Marks, Skeleton, search
from dpo_lightning.data.rows import PreferenceGroup
from dpo_lightning.data.templates import RESERVED, TemplateOptions, render_chat, template_facts
from dpo_lightning.data.texts import Message, common_beginning
from dpo_lightning.errors import UserError

# Shapes that are kept; a file has a few, by the number of turns.
_MOST_SHAPES = 4096
_MOST_SKELETONS = 6

_ANSWER = Message("assistant", "answer")


@dataclass(frozen=True, slots=True)
class Rendered:
    """A row of messages as text.

    Attributes:
        texts: The prompt, and the prompt with each response.
        lead: What the template writes between the prompt's last string and a response.
        left_out: Fields of earlier turns that the template leaves out by design.
        unread: Variables of the row that the template does not read.
        empty: The responses without any text, by number.
    """

    texts: list[str]
    lead: str = ""
    left_out: frozenset[str] = frozenset()
    unread: frozenset[str] = frozenset()
    empty: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Shape:
    """Skeletons of conversations of one shape, and the form in which they are given.

    Attributes:
        skeletons: The newest last.
        text_arguments: True if arguments of calls are given as text; None where that is not tried.
    """

    skeletons: list[Skeleton] = field(default_factory=list)
    text_arguments: bool | None = None


class Renderer:
    """Writes rows of messages by a tokenizer's chat template.

    Who writes many enters :attr:`bounds` once for all.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        options: What the template is given beside the rows.
    """

    def __init__(self, tokenizer: Any, options: TemplateOptions) -> None:
        self._tokenizer = tokenizer
        self._options = options
        self.facts = template_facts(tokenizer.chat_template)
        self.bounds = Bounds()
        self._shapes: dict[tuple[Any, ...], _Shape] = {}

    def render(self, group: PreferenceGroup) -> Rendered:
        """Writes a row.

        Raises:
            FaultyRow: If the template refuses it, or leaves out a part.
            UserError: If the template takes too long.
        """
        if not self.bounds.is_entered:
            with self.bounds:
                return self.render(group)
        try:
            with self.bounds.piece:
                return self._render(group)
        except OutOfBounds as error:
            raise UserError(
                f"{group.source}: the chat template took {error} for a conversation of "
                f"{len(group.prompt) + 1} messages, so it was stopped; name another template with "
                "data.chat_template="
            ) from error

    def _render(self, group: PreferenceGroup) -> Rendered:
        assert not isinstance(group.prompt, str)
        kwargs, unread = self._kwargs(group)
        prompt = tuple(group.prompt)
        tools, before = flatten_tools(group.tools), flatten(prompt)
        full: list[str] = []
        leads: list[tuple[str, str]] = []
        left_out: set[str] = set()
        empty = set()
        for number, given in enumerate(group.responses):
            response = (Message("assistant", given),) if isinstance(given, str) else tuple(given)
            after = flatten(response)
            chat = make_chat(group, response, (tools, before, after), kwargs)
            name = ResponseName(number, len(group.responses))
            text, begin, lead = self._conversation(chat, name, left_out)
            full.append(text)
            if after.texts:
                leads.append((text[:begin], lead))
            else:
                empty.add(number)
        prompts = [head for head, _ in leads] or full
        text = common_beginning(prompts)
        lead = min((lead for _, lead in leads), key=len, default="")
        return Rendered(
            [text, *full], lead, frozenset(left_out), frozenset(unread), frozenset(empty)
        )

    def _kwargs(self, group: PreferenceGroup) -> tuple[dict[str, Any], set[str]]:
        """Variables of the template, and those of the row that it does not read."""
        own = json.loads(group.template_kwargs) if group.template_kwargs else {}
        if reserved := sorted(RESERVED & own.keys()):
            raise FaultyRow(
                Fault(
                    f"chat_template_kwargs.{reserved[0]}",
                    "no variable of a row: the program fills it",
                    f"chat_template_kwargs.{reserved[0]} is no variable of a row",
                    "take it out of the rows",
                )
            )
        unread = {name for name in own if name not in self.facts.variables}
        return {**self._options.kwargs, **own}, unread

    # One conversation ---------------------------------------------------------------------------

    def _conversation(
        self, chat: Chat, name: ResponseName, left_out: set[str]
    ) -> tuple[str, int, str]:
        """The text, the place where the response begins, and the template's text before it."""
        shape = self._shape(chat.shape)
        text = self._text(chat, shape, name)
        for skeleton in reversed(shape.skeletons):
            first = skeleton.first_slot(chat.own)
            begin = skeleton.begins(chat.texts, text, first)
            if begin is not None:
                self._account(chat, skeleton, name, left_out)
                back, lead = self._step_back(chat, skeleton, first)
                return text, max(0, begin - back), lead
        made = self._make_skeleton(chat, shape)
        if made is not None and made.begins(chat.texts, text, None) is not None:
            shape.skeletons = [*shape.skeletons[1 - _MOST_SKELETONS :], made]
            return self._conversation(chat, name, left_out)
        return self._by_search(chat, text, made, name, left_out)

    def _shape(self, key: tuple[Any, ...]) -> _Shape:
        if len(self._shapes) > _MOST_SHAPES:
            self._shapes.clear()
        return self._shapes.setdefault(key, _Shape())

    def _text(self, chat: Chat, shape: _Shape, name: ResponseName) -> str:
        """The conversation as the template writes it.

        Arguments of calls are given as an object, or as JSON text where the template wants that.
        """
        has_calls = any('"arguments"' in m.extra for m in (*chat.prompt, *chat.response))
        forms = (False, True) if has_calls else (False,)
        if shape.text_arguments is not None:
            forms = (shape.text_arguments,)
        refusal: Exception | None = None
        for form in forms:
            try:
                text = self._write(chat, unchanged, text_arguments=form)
            except (OutOfBounds, MemoryError):
                raise
            except Exception as error:  # jinja2 raises whatever a template chooses to raise
                refusal = refusal or error
                continue
            if form is False and len(forms) > 1 and has_python(chat, text):
                continue
            shape.text_arguments = form
            return text
        if refusal is None:
            return self._write(chat, unchanged, text_arguments=False)
        raise FaultyRow(refused_fault(chat, refusal)) from refusal

    def _write(self, chat: Chat, visit: Visit, *, text_arguments: bool) -> str:
        tools = tool_fields(json.loads(chat.tools), visit) if chat.tools else None
        messages = messages_of(chat, visit, text_arguments=text_arguments)
        return render_chat(
            self._tokenizer, messages, tools=tools, kwargs=chat.kwargs, day=self._options.date
        )

    def _make_skeleton(self, chat: Chat, shape: _Shape) -> Skeleton | None:
        """The skeleton of a conversation; None if it cannot be marked."""
        marks = Marks.for_texts(chat.texts)
        if marks is None:
            return None
        count = iter(range(len(chat.texts)))

        def mark(text: str, field: str, is_thought: bool) -> str:
            return marks.put(text, next(count))

        try:
            marked = self._write(chat, mark, text_arguments=bool(shape.text_arguments))
        except (OutOfBounds, MemoryError):
            raise
        except Exception:
            return None
        return marks.skeleton(marked, chat.texts)

    def _step_back(self, chat: Chat, skeleton: Skeleton, first: int | None) -> tuple[int, str]:
        """Characters before the response's first string that are its own, and the text before.

        A call has its own beginning, and so has a text that opens with a tag, as far as the
        template does not write the same before a plain answer.
        """
        if first is None:
            return 0, ""
        literal = skeleton.slots[first].literal
        head = chat.response[0]
        has_text = bool(head.content) and not head.content.isspace()
        if not (has_text and begins_with_tag(head.content)) and (
            has_text or THOUGHTS & json.loads(head.extra or "{}").keys()
        ):
            return 0, literal
        plain = self._plain_lead(chat)
        kept = common_beginning([literal, plain])
        return len(literal) - len(kept), kept

    def _plain_lead(self, chat: Chat) -> str:
        """The template's text before a plain answer to the same prompt."""
        before = chat.shape[1]
        size = chat.own.start
        texts = (*chat.texts[:size], _ANSWER.content)
        own = range(size, size + 1)
        after = flatten((_ANSWER,))
        shape = (chat.shape[0], before, after.shape, *chat.shape[3:])
        plain = Chat(
            chat.prompt, (_ANSWER,), chat.tools, chat.kwargs, chat.continued, texts, own, shape
        )
        kept = self._shape(plain.shape)
        if not kept.skeletons:
            skeleton = self._make_skeleton(plain, kept)
            if skeleton is None:
                return ""
            kept.skeletons.append(skeleton)
        skeleton = kept.skeletons[-1]
        first = skeleton.first_slot(own)
        return "" if first is None else skeleton.slots[first].literal

    # The account of the strings -----------------------------------------------------------------

    def _account(
        self, chat: Chat, skeleton: Skeleton, name: ResponseName, left_out: set[str]
    ) -> None:
        """Refuses the row if a string has no slot, or one before its turn."""
        if skeleton.in_order:
            return
        if len(skeleton.firsts) < len(chat.texts):
            missing = [n for n in range(len(chat.texts)) if n not in skeleton.firsts]
            self._miss(chat, missing, name, left_out)
        last = -1
        pieces = None
        for piece in skeleton.firsts:
            if piece < last:
                pieces = pieces or pieces_of(chat)
                own, other = pieces[piece], pieces[last]
                late = piece < chat.own.start <= last
                if -1 != own.message < other.message or late:
                    raise FaultyRow(moved_fault(chat, own, name))
            last = max(last, piece)

    def _miss(
        self, chat: Chat, missing: Sequence[int], name: ResponseName, left_out: set[str]
    ) -> None:
        """Notes thoughts of earlier turns that are left out by design, and refuses all else."""
        pieces = pieces_of(chat)
        for number in missing:
            piece = pieces[number]
            if self._ignored(piece) or names_its_call(chat, piece):
                continue
            if number not in chat.own and self._by_design(chat, piece):
                left_out.add(piece.field if piece.field != "content" else "<think>")
                continue
            raise FaultyRow(left_out_fault(chat, piece, name))

    def _ignored(self, piece: Piece) -> bool:
        if piece.message < 0:
            return "tools" in self._options.ignored
        key = piece.field.partition(".")[0].partition("[")[0]
        return f"messages.{key}" in self._options.ignored

    def _by_design(self, chat: Chat, piece: Piece) -> bool:
        """True if the template leaves a thought out because it is one of an earlier turn."""
        begun = chat.continued and piece.message == len(chat.prompt) - 1
        if not piece.is_thought or begun:
            return False
        names = ("think",) if piece.field == "content" else THOUGHTS
        return any(name in self.facts.text for name in names)

    def _by_search(
        self,
        chat: Chat,
        text: str,
        skeleton: Skeleton | None,
        name: ResponseName,
        left_out: set[str],
    ) -> tuple[str, int, str]:
        """The same by the strings alone, where a template does other things to marked ones."""
        found = search(chat.texts, text)
        written = set(found)
        if skeleton is not None:
            written &= {slot.piece for slot in skeleton.slots}
        missing = [n for n in range(len(chat.texts)) if n not in written]
        self._miss(chat, missing, name, left_out)
        begin = next((found[n] for n in chat.own if n in found), len(text))
        return text, begin, ""
