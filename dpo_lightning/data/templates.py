"""Chat templates: a plain one, the variables and the date that they are given, one rendering."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from transformers.utils import chat_template_utils

from dpo_lightning.data.dates import DEFAULT_DATE
from dpo_lightning.errors import UserError

# Named and exported with the tokenizer when a model brings no chat template of its own.
PLAIN_CHAT_TEMPLATE = (
    "{%- if bos_token is defined and bos_token %}{{ bos_token }}{% endif -%}"
    "{%- for message in messages -%}"
    "{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}"
    "{{ '\\n\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}"
)

RESERVED = frozenset(
    {
        *("messages", "tools", "conversation", "add_generation_prompt", "continue_final_message"),
        *("chat_template", "strftime_now", "tokenize", "padding", "truncation", "max_length"),
        *("return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
        "sanitize_control_tokens",
    }
)
"""Variables of a template that come from the rows or from the program, never from settings."""

_DATE = "strftime_now"
_PROGRAM = frozenset({"bos_token", "eos_token", "unk_token", "pad_token", "raise_exception"})
_MARKUP = re.compile(r"{%-?\s*(end)?generation\s*-?%}")


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """Options of a chat template, beside the rows.

    Attributes:
        kwargs: Its variables, such as ``enable_thinking``; those of a row go over them.
        date: The day that it is told, ``YYYY-MM-DD``.
        ignored: Columns and ``messages.<key>`` that may be left out.
    """

    kwargs: Mapping[str, Any] = field(default_factory=dict)
    date: str = DEFAULT_DATE
    ignored: frozenset[str] = frozenset()

    def key(self) -> str:
        """Text that differs where tokens may differ."""
        return json.dumps([dict(self.kwargs), self.date, sorted(self.ignored)], sort_keys=True)


@dataclass(frozen=True, slots=True)
class TemplateFacts:
    """Facts of a template's own text.

    Attributes:
        text: All of it.
        variables: Variables that it reads.
        options: Those of them that settings can give.
        dated: True if it asks for the date.
    """

    text: str
    variables: frozenset[str]
    options: tuple[str, ...]
    dated: bool


def template_facts(template: str | Mapping[str, str] | None) -> TemplateFacts:
    """The facts of a tokenizer's ``chat_template``, which may be several by name.

    Raises:
        UserError: If it is no Jinja template, or draws at random.
    """
    if template is None:
        return TemplateFacts("", frozenset(), (), dated=False)
    return _facts(template if isinstance(template, str) else "\n".join(template.values()))


@lru_cache(maxsize=8)
def _facts(text: str) -> TemplateFacts:
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        tree = environment.parse(_MARKUP.sub("", text))
    except TemplateError as error:
        raise UserError(
            f"the chat template is no Jinja template: {' '.join(str(error).split())}; fix it, or "
            "name another with data.chat_template="
        ) from error
    found = frozenset(meta.find_undeclared_variables(tree))
    names = list(tree.find_all(nodes.Name))
    filters = {node.name for node in tree.find_all(nodes.Filter)}
    if drawn := ({"random"} & filters) | ({"lipsum"} & {name.name for name in names}):
        raise UserError(
            f"the chat template draws at random ({', '.join(sorted(drawn))}), so that no two runs "
            "would have the same tokens; name another with data.chat_template="
        )
    # One that the template sets itself is an option only where it asks whether it was given.
    asked = {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name == "defined" and isinstance(test.node, nodes.Name)
    }
    free = found - {name.name for name in names if name.ctx == "store"} | (asked & found)
    options = tuple(sorted(free - RESERVED - _PROGRAM))
    return TemplateFacts(text, found, options, dated=_DATE in found)


def check_kwargs(kwargs: Mapping[str, Any], facts: TemplateFacts, *, key: str) -> None:
    """Refuses variables that the template does not read, or that are not settings'.

    Args:
        kwargs: The variables.
        facts: The template's.
        key: The setting that they are of.

    Raises:
        UserError: Naming the first of them.
    """
    for name in kwargs:
        if name in RESERVED:
            raise UserError(
                f"{key}.{name}: comes from the rows or from the program, not from settings; "
                "leave it out"
            )
        if name not in facts.variables:
            raise UserError(
                f"{key}.{name}: the chat template reads no such variable; it reads "
                f"{', '.join(facts.options) or 'none but the messages'}"
            )


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    day: str = DEFAULT_DATE,
) -> str:
    """A conversation as the tokenizer's chat template writes it, the same on all days.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        messages: The conversation.
        tools: Tools that the template is given.
        kwargs: Its other variables.
        day: The day that it is told.
    """
    with _on(day):
        text: str = tokenizer.apply_chat_template(
            list(messages),
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=False,
            **(kwargs or {}),
        )
    return text


@dataclass(frozen=True, slots=True)
class _Clock:
    """Stands for ``datetime`` where templates ask it for the time.

    Attributes:
        moment: The time that it tells.
    """

    moment: datetime

    def now(self) -> datetime:
        """The same at all times."""
        return self.moment


@contextlib.contextmanager
def _on(day: str) -> Iterator[None]:
    """Context in which templates are told a day; their variables can hold no function."""
    own = chat_template_utils.datetime  # type: ignore[attr-defined]
    clock = _Clock(datetime.fromisoformat(day))
    chat_template_utils.datetime = clock  # type: ignore[attr-defined, assignment]
    try:
        yield
    finally:
        chat_template_utils.datetime = own  # type: ignore[attr-defined]
