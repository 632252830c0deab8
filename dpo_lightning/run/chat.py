"""The chat template of a run: its options, what is said of it once, its line in the header."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_lightning.data.records import Rows
from dpo_lightning.data.templates import TemplateOptions, check_kwargs, template_facts
from dpo_lightning.errors import UserError
from dpo_lightning.models.source import set_chat_template
from dpo_lightning.run.inputs import SourceRows
from dpo_lightning.settings.schema import DataConfig

_LONGEST_SHOWN = 80


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template that rows of messages go through.

    Attributes:
        options: What it is given beside the rows.
        dated: True if it asks for the date.
        notes: Lines to say once.
    """

    options: TemplateOptions
    dated: bool
    notes: tuple[str, ...]

    def identity(self) -> dict[str, Any]:
        """Entries for what a checkpoint to resume from must agree with."""
        own: dict[str, Any] = {"data.chat_template_kwargs": dict(self.options.kwargs)}
        return own | ({"data.template_date": self.options.date} if self.dated else {})

    def line(self, leads: Mapping[str, int]) -> str:
        """The template's line in the header: what begins a scored answer, options in force.

        Args:
            leads: Rows by the text that the template writes before their responses.
        """
        lead, count = Counter(leads).most_common(1)[0]
        shown = lead if len(lead) <= _LONGEST_SHOWN else f"…{lead[-_LONGEST_SHOWN:]}"
        behind = repr(shown) if lead else "the answer that the prompt has begun"
        if count < sum(leads.values()):
            behind += f" in {count:,} of {sum(leads.values()):,} rows"
        options = [f"{name}={value}" for name, value in self.options.kwargs.items()]
        if self.dated:
            options.append(f"data.template_date={self.options.date}")
        return f"a scored answer begins behind {behind}; options: {', '.join(options) or 'none'}"


def choose_template(tokenizer: Any, rows: SourceRows, data: DataConfig) -> ChatTemplate | None:
    """Gives the tokenizer its chat template; None where no row goes through one.

    Args:
        tokenizer: The policy's.
        rows: The rows that were read.
        data: The settings of the data.

    Raises:
        UserError: If the template or one of its options cannot be used.
    """
    sources = rows.all
    messages = any(_has_messages(source) for source in sources)
    own = tokenizer.chat_template
    note = set_chat_template(tokenizer, data.chat_template, needed=messages)
    kwargs = data.chat_template_kwargs
    if not messages:
        if kwargs:
            raise UserError(
                f"data.chat_template_kwargs={kwargs}: the rows are plain strings, which no chat "
                f"template writes; {_REMEDY}, or leave the setting out"
            )
        key = "data.chat_template" if data.chat_template is not None else "the model's template"
        if own or data.chat_template is not None:
            return ChatTemplate(TemplateOptions(), dated=False, notes=(_unused(key),))
        return None
    notes = [] if note is None else [note]
    facts = template_facts(tokenizer.chat_template)
    check_kwargs(kwargs, facts, key="data.chat_template_kwargs")
    if facts.dated and not _date_is_given(facts.text, kwargs):
        notes.append(
            "the chat template asks for the date: it is told "
            f"data.template_date={data.template_date} on every day, so that tokens stay the same"
        )
    options = TemplateOptions(
        kwargs=dict(kwargs), date=data.template_date, ignored=frozenset(data.ignore_fields)
    )
    return ChatTemplate(options, dated=facts.dated, notes=tuple(notes))


_REMEDY = 'to use it, write each prompt as messages: [{"role": "user", "content": "..."}]'


def _unused(key: str) -> str:
    return f"the rows are plain strings, trained on as they are: {key} is not used; {_REMEDY}"


def _has_messages(rows: Rows) -> bool:
    return any(not isinstance(group.prompt, str) for group in rows.groups)


def _date_is_given(text: str, kwargs: Mapping[str, Any]) -> bool:
    """True if an option takes the place of the date, as Llama's ``date_string`` does."""
    return "date_string" in kwargs and "date_string" in text
