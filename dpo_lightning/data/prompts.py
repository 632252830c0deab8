"""The prompt of a row: given, or found in its responses; with its system message and its tools."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_lightning.data.fields import (
    FieldAccount,
    holds_text,
    is_empty,
    is_heavy,
    may_be_the_prompt,
    texts_of,
)
from dpo_lightning.data.groups import as_turns
from dpo_lightning.data.messages import MessageReader
from dpo_lightning.data.texts import (
    GIVEN_ROLES,
    Message,
    RowError,
    Text,
    describe,
    list_names,
    show,
    split_messages,
    split_strings,
    typed_name,
)


class ShapeError(RowError):
    """A row's columns are not those of a preference row.

    Attributes:
        reason: The problem without the columns of this one row.
        remedy: What to do, where it is known.
    """

    def __init__(self, field: str, reason: str, row: Iterable[str], remedy: str = "") -> None:
        more = remedy or f"the row has {list_names(row)}; data.columns maps other names"
        super().__init__(field, f"{reason}; {more}")
        self.reason = reason
        self.remedy = remedy


class PromptFinder:
    """Finds prompts, and brings them and the responses to one form.

    Args:
        names: Our field names to the names of the columns, one each; empty for none.
        reads: Further columns that are used or hidden.
        messages: Reads texts and messages.
        account: Takes note of what was inferred.
        missing: Word for a column that is not there.

    Attributes:
        was_text: True if the last row's prompt and responses are strings, the prompt given.
    """

    def __init__(
        self,
        names: Mapping[str, Any],
        *,
        reads: Collection[str],
        messages: MessageReader,
        account: FieldAccount,
        missing: str,
    ) -> None:
        self.was_text = False
        self._names = names
        self._prompt: str = names["prompt"]
        self._reads = reads
        self._messages = messages
        self._account = account
        self._missing = missing

    def join(
        self, row: Mapping[str, object], texts: Sequence[Text], labels: Sequence[str]
    ) -> tuple[Text, Sequence[Text]]:
        """Finds the prompt, and brings it and the responses to one form."""
        implicit = self._prompt not in row
        self.was_text = False
        prompt: Text = ""
        if not implicit:
            prompt = self._messages.text(row[self._prompt], self._prompt)
        strings = [text for text in texts if isinstance(text, str)]
        lists = [text for text in texts if not isinstance(text, str)]
        if strings and lists:
            kind = type(texts[0])
            odd = next(i for i, text in enumerate(texts) if not isinstance(text, kind))
            forms = ("a string", "messages") if kind is str else ("messages", "a string")
            raise RowError(labels[odd], f"{forms[1]}, but {labels[0]} is {forms[0]}")
        if lists:
            if not implicit:
                return self._follow(prompt, lists, labels)
            self._check_no_prompt(row, labels, any_text=False, known=lists)
            self._check_several(row, texts)
            self._account.said["messages"] += 1
            return split_messages(lists, labels)
        if not isinstance(prompt, str):
            self._check_apart(prompt, strings)
            return prompt, [(Message("assistant", text),) for text in strings]
        if not implicit:
            if prompt and all(text.startswith(prompt) for text in strings):
                self._account.said["begins_with_prompt"] += 1
            self.was_text = True
            return prompt, strings
        prompt, rests, dialogue = split_strings(strings)
        self._check_no_prompt(row, labels, any_text=not dialogue, known=())
        self._check_several(row, texts)
        if not prompt:
            reason = f"{self._missing}, and the responses have no common beginning for a prompt"
            raise ShapeError(self._prompt or "prompt", reason, row)
        self._account.said["dialogue" if dialogue else "string"] += 1
        return prompt, rests

    def _check_apart(self, prompt: Sequence[Message], answers: Sequence[str]) -> None:
        """Raises a RowError if a prompt ends with one of its own answers."""
        last = prompt[-1]
        known = {answer.strip() for answer in answers}
        if last.role == "assistant" and last.content.strip() and last.content.strip() in known:
            raise RowError(
                f"{self._prompt}[{len(prompt) - 1}]",
                f"{show(last.content)}, which is a response of this row; end the prompt before it",
            )

    def _check_several(self, row: Mapping[str, object], texts: Sequence[Text]) -> None:
        """Raises a RowError if there is one response: it does not say where its prompt ends."""
        if len(texts) == 1:
            reason = f"{self._missing}, and one response does not say where its prompt ends"
            remedy = (
                "give the prompt in a column of its own, or a whole conversation as 'messages', "
                "the last answer of which has the label"
            )
            raise ShapeError(self._prompt or "prompt", reason, row, remedy)

    def _check_no_prompt(
        self,
        row: Mapping[str, object],
        labels: Sequence[str],
        *,
        any_text: bool,
        known: Sequence[tuple[Message, ...]],
    ) -> None:
        """Raises a RowError if a column may be the prompt, which is taken from the responses.

        Args:
            row: The row.
            labels: The responses' columns, or their items.
            any_text: A column of any name may be it, if its text has more than a word.
            known: Conversations that may hold what the column says.
        """
        own = {label.partition("[")[0] for label in labels}
        own |= {str(self._names[field]) for field in ("system", "tools", "chat_template_kwargs")}
        own |= {*own, *self._reads}
        said = {message.content.strip() for messages in known for message in messages}
        for column, value in row.items():
            if column in own or not holds_text(value) or is_heavy(column):
                continue
            # Of a long text any part will do; of a name there is one word.
            found = texts_of(value)
            words = any(" " in item for item in found)
            meant = may_be_the_prompt(column) and not found <= said
            if (meant or (any_text and words)) and not self._account.ignores(column):
                remedy = (
                    f"map it with 'data.columns={{prompt: {typed_name(column)}}}', or leave it out "
                    f"with 'data.ignore_fields=[{typed_name(column)}]'"
                )
                reason = f"{self._missing}, and {show(column)} may be it"
                raise ShapeError(self._prompt or "prompt", reason, row, remedy)

    def given(
        self, row: Mapping[str, object], prompt: Text, responses: Sequence[Text], used: set[str]
    ) -> tuple[Text, Sequence[Text], str, str]:
        """Puts the system message, the input and the tools of a row to its prompt."""
        names = self._names
        extra = {
            field: row[names[field]]
            for field in ("input", "system", "tools", "chat_template_kwargs")
            if names[field] in row
        }
        used.update(names[field] for field in extra)
        if not is_empty(extra.get("input")):
            prompt = self._with_input(extra["input"], prompt, names["input"])
        tools = kwargs = ""
        if not is_empty(extra.get("tools")):
            tools = self._messages.tools(extra["tools"], names["tools"])
        if isinstance(prompt, str) and self.was_text and ("system" in extra or tools):
            prompt, responses = as_turns(prompt, responses)
            self.was_text = False
            self._account.said["turns"] += 1
        is_text = isinstance(prompt, str)
        if not is_empty(extra.get("system")):
            prompt = self._with_system(extra["system"], prompt, names["system"])
        if not is_empty(extra.get("chat_template_kwargs")):
            label = names["chat_template_kwargs"]
            kwargs = self._messages.template_kwargs(extra["chat_template_kwargs"], label)
            if is_text and kwargs:
                raise RowError(label, "is for messages, and the prompt is a text")
        if is_text and tools:
            raise RowError(names["tools"], "is for messages, and the row has no prompt of its own")
        return prompt, responses, tools, kwargs

    def _with_input(self, value: object, prompt: Text, label: str) -> Text:
        """The prompt with a text behind it, on a line of its own."""
        text = self._messages.text(value, label) if isinstance(value, str) else value
        if not isinstance(text, str):
            raise RowError(label, f"{describe(value)}, expected a text")
        if not isinstance(prompt, str):
            *before, last = prompt
            if last.role != "user":
                raise RowError(label, f"is to follow a prompt that ends with {show(last.role)}")
            return (*before, replace(last, content=f"{last.content}\n{text}"))
        if not self.was_text:
            raise RowError(label, "is to follow a prompt, and the row has none of its own")
        return f"{prompt}\n{text}" if prompt else text

    def _with_system(self, value: object, prompt: Text, label: str) -> Text:
        if not isinstance(value, str):
            raise RowError(label, f"{describe(value)}, expected a text")
        content = self._messages.text(value, label)
        if not isinstance(content, str):
            raise RowError(label, "messages, expected a text")
        if isinstance(prompt, str):
            raise RowError(label, "a system message, and the row has no prompt of its own")
        systems = [message.content for message in prompt if message.role == "system"]
        if systems and content.strip() in {text.strip() for text in systems}:
            return prompt
        if systems:
            raise RowError(
                label,
                f"{describe(value)}, and the prompt has a system message of its own "
                f"({show(systems[0])}); leave one out",
            )
        return (Message("system", content), *prompt)

    def _follow(
        self, prompt: Text, lists: Sequence[tuple[Message, ...]], labels: Sequence[str]
    ) -> tuple[tuple[Message, ...], Sequence[tuple[Message, ...]]]:
        """Takes an explicit prompt out of responses that may or may not repeat it."""
        answers = not any(messages[0].role in GIVEN_ROLES for messages in lists)
        if isinstance(prompt, str):
            if answers:
                return (Message("user", prompt),), lists
            lead, rests = split_messages(lists, labels)
            if not any(m.role == "user" and m.content.strip() == prompt.strip() for m in lead):
                raise RowError(
                    self._prompt,
                    f"{show(prompt)}, which is not among the messages that the responses begin "
                    "with (an empty name in data.columns hides a column)",
                )
            self._account.said["repeated"] += 1
            return lead, rests
        size = len(prompt)
        if all(messages[:size] == prompt for messages in lists):
            rests = [messages[size:] for messages in lists]
            if not all(rests):
                raise RowError(labels[rests.index(())], "nothing after the prompt's messages")
            self._account.said["repeated"] += 1
            if any(rest[0].role in GIVEN_ROLES for rest in rests):
                lead, rests = split_messages(rests, labels)
                prompt += lead
            return prompt, rests
        if answers:
            self._check_apart(prompt, [messages[0].content for messages in lists])
            return prompt, lists
        odd = next(i for i, messages in enumerate(lists) if messages[0].role in GIVEN_ROLES)
        raise RowError(
            labels[odd],
            f"begins with a message of {show(lists[odd][0].role)}, expected the assistant's or, in "
            "every response, all messages of the prompt first",
        )
