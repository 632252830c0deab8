"""Public forms of preference rows, each declared: the columns it needs, and what they stand for.

A form puts what a row says under the names that :class:`RowReader` knows; where the row has it
inside a list or an object, it is first taken out, under a name that says where it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from dpo_lightning.data.fields import FieldAccount, is_empty, may_be_the_prompt, words_of
from dpo_lightning.data.texts import RowError, describe, show, typed_name
from dpo_lightning.data.thumbs import answer_column, label_column

Row = dict[str, Any]

_JUDGE = re.compile("better|best|winner|prefer|choice|chosen|label|verdict")

_BETTER = frozenset(
    ["chosen", "accepted", "accept", "preferred", "better", "good", "winner", "positive", "best"]
)
_WORSE = frozenset(
    ["rejected", "reject", "worse", "bad", "loser", "negative", "worst", "dispreferred", "non"]
)

_NAMED = frozenset({"prompt", "chosen", "rejected", "responses"})
"""Fields that the user maps where the row has no form that is known."""

_COMPARED = (
    *("chosen", "rejected", "responses", "rejected_response", "rejected_messages"),
    *("conversation_a", "non_preferred_output"),
)
"""Columns of rows that compare responses, whatever label stands beside them."""

_ALONE = ("response", "completion")
"""Columns that may be the only response of a row."""


@dataclass(frozen=True)
class Form:
    """A public form of rows.

    Attributes:
        name: Value of ``data.format``.
        needs: Columns that a row of this form has.
        lacks: Columns that it has not: with them it is another form.
        columns: Our fields to its columns.
        reads: Further columns that ``derive`` uses.
        derive: Adds columns to a row, made of others; accounts for what is inside of those.
        about: What is made of the columns, said once.
        refusal: The reason why such rows cannot be read; empty where they can.
        recognised: False if it is read only where ``data.format`` names it.
        alone: True if a row has one response and a label.
        conversation: The column whose answers are rated, each of which becomes a row; empty for
            forms of one group a row.
    """

    name: str
    needs: Collection[str]
    columns: Mapping[str, Any] = field(default_factory=dict)
    about: str = ""
    lacks: Collection[str] = ()
    reads: Collection[str] = ()
    derive: Callable[[Row, FieldAccount], Row] | None = None
    refusal: str = ""
    recognised: bool = True
    alone: bool = False
    conversation: str = ""

    def has(self, names: Collection[str]) -> bool:
        """True if columns of these names are those of this form."""
        return (
            self.recognised and set(self.needs) <= set(names) and not set(self.lacks) & set(names)
        )


def _inside(row: Row, column: str, kind: type, expected: str) -> Any:
    if column not in row:
        raise RowError(column, "missing")
    value = row[column]
    if not isinstance(value, kind):
        raise RowError(column, f"{describe(value)}, expected {expected}")
    return value


def _items(row: Row, column: str, keys: tuple[str, ...], account: FieldAccount) -> list[Row]:
    """The objects of a list in a row, all of which have the given keys."""
    values: list[Row] = _inside(row, column, list, "a list of objects")
    for index, value in enumerate(values):
        if not isinstance(value, dict) or not set(keys) <= value.keys():
            wanted = ", ".join(map(repr, keys))
            raise RowError(
                f"{column}[{index}]", f"{describe(value)}, expected an object of {wanted}"
            )
        account.close(value, keys, f"{column}.")
    return values


def _openai(row: Row, account: FieldAccount) -> Row:
    given = _inside(row, "input", dict, "an object of 'messages'")
    account.close(given, ("messages", "tools"), "input.")
    new = {**row, "input.messages": given.get("messages")}
    if not is_empty(given.get("tools")):
        new["input.tools"] = given["tools"]
    return new


def _turns_of_history(row: Row, prompt: str) -> Row:
    """Puts earlier pairs of question and answer before the prompt, as turns."""
    history = row.get("history")
    if is_empty(history):
        return row
    turns = []
    for index, pair in enumerate(_inside(row, "history", list, "a list of pairs")):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(f"history[{index}]", f"{describe(pair)}, expected question and answer")
        turns += [
            {"role": role, "content": text}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return {**row, prompt: [*turns, {"role": "user", "content": row.get(prompt)}]}


def _alpaca(row: Row, account: FieldAccount) -> Row:
    new = dict(row)
    if isinstance(row.get("output"), list):
        new["responses"] = row["output"]
    history = row.get("history")
    if not is_empty(history) and not is_empty(row.get("input")):
        new["instruction"] = f"{row['instruction']}\n{row['input']}"
        del new["input"]
    return _turns_of_history(new, "instruction")


def _swift_query(row: Row, account: FieldAccount) -> Row:
    return _turns_of_history(row, "query")


def _swift(row: Row, account: FieldAccount) -> Row:
    """The last turns of the assistant are the chosen answer; the other one stands apart."""
    messages = _inside(row, "messages", list, "a list of messages")
    end = len(messages)
    while (
        end
        and isinstance(messages[end - 1], dict)
        and messages[end - 1].get("role") not in (*("user", "system", "tool", "human"),)
    ):
        end -= 1
    if end == len(messages):
        raise RowError("messages", "ends with no answer, which would be the better one")
    rejected = row["rejected_response"]
    if isinstance(rejected, str):
        rejected = [{"role": "assistant", "content": rejected}]
    return {
        **row,
        "messages[question]": messages[:end],
        "messages[answer]": messages[end:],
        "rejected_response": rejected,
    }


def _labelled(column: str, values: Mapping[object, str]) -> Callable[[Row, FieldAccount], Row]:
    def derive(row: Row, account: FieldAccount) -> Row:
        if column not in row:
            raise RowError(column, "missing")
        value = row[column]
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise RowError(column, f"{describe(value)}, expected one of {_shown(values)}")
        if value not in values:
            raise RowError(column, f"{describe(value)}, expected one of {_shown(values)}")
        return {**row, f"{column} (better)": values[value]}

    return derive


def _shown(values: Mapping[object, str]) -> str:
    return ", ".join(map(show, values))


def _strength(column: str) -> Callable[[Row, FieldAccount], Row]:
    """Below 0 the first response is better, above 0 the second; 0 is a tie."""

    def derive(row: Row, account: FieldAccount) -> Row:
        value = row.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
            raise RowError(column, f"{describe(value)}, expected a number from -3 to 3")
        return {**row, f"{column} (ranks)": [1 + (value > 0), 1 + (value < 0)]}

    return derive


def _nectar(row: Row, account: FieldAccount) -> Row:
    answers = _items(row, "answers", ("answer", "rank"), account)
    return {
        **row,
        "answers.answer": [item["answer"] for item in answers],
        "answers.rank": [item["rank"] for item in answers],
    }


_MARKS = ("fine-grained_score", "overall_score")


def _ultrafeedback(row: Row, account: FieldAccount) -> Row:
    items = _inside(row, "completions", list, "a list of objects")
    first = items[0] if items and isinstance(items[0], dict) else {}
    mark = next((mark for mark in _MARKS if first.get(mark) is not None), _MARKS[0])
    answers = _items(row, "completions", ("response", mark), account)
    return {
        **row,
        "completions.response": [item["response"] for item in answers],
        "completions.score": [item[mark] for item in answers],
    }


FORMS = (
    Form(
        "openai",
        ("input", "preferred_output", "non_preferred_output"),
        {
            "prompt": "input.messages",
            "tools": "input.tools",
            "chosen": "preferred_output",
            "rejected": "non_preferred_output",
        },
        "OpenAI's preference form: 'preferred_output' is better than 'non_preferred_output'",
        reads=("input",),
        derive=_openai,
    ),
    Form(
        "swift",
        ("messages", "rejected_response"),
        {
            "prompt": "messages[question]",
            "chosen": "messages[answer]",
            "rejected": "rejected_response",
        },
        "ms-swift's form: the last answer of 'messages' is better than 'rejected_response'",
        reads=("messages",),
        derive=_swift,
    ),
    Form(
        "swift_messages",
        ("messages", "rejected_messages"),
        {"prompt": "", "chosen": "messages", "rejected": "rejected_messages"},
        "ms-swift's form: 'messages' is better than 'rejected_messages'",
    ),
    Form(
        "swift_query",
        ("query", "response", "rejected_response"),
        {"prompt": "query", "chosen": "response", "rejected": "rejected_response"},
        "ms-swift's form: 'response' is better than 'rejected_response'",
        reads=("history",),
        derive=_swift_query,
    ),
    Form(
        "sharegpt",
        ("conversations", "chosen", "rejected"),
        {"prompt": "conversations", "conversations": "conversations"},
        "ShareGPT's form: the prompt is 'conversations'",
        lacks=("prompt",),
    ),
    Form(
        "messages",
        ("messages", "chosen", "rejected"),
        {"prompt": "messages"},
        "the prompt is 'messages'",
        lacks=("prompt",),
        recognised=False,
    ),
    Form(
        "orca",
        ("system", "question", "chosen", "rejected"),
        {"prompt": "question"},
        "orca's form: 'system' and 'question' are turns of the prompt",
        lacks=("prompt",),
    ),
    Form(
        "orca_input",
        ("system", "input", "chosen", "rejected"),
        {"prompt": "input"},
        "orca's form: 'system' and 'input' are turns of the prompt",
        lacks=("prompt", "instruction", "question"),
    ),
    Form(
        "alpaca",
        ("instruction", "input", "chosen", "rejected"),
        {"prompt": "instruction", "input": "input"},
        "alpaca's form: the prompt is 'instruction', and 'input' on a new line where there is one",
        lacks=("prompt",),
        reads=("history",),
        derive=_alpaca,
    ),
    Form(
        "alpaca_output",
        ("instruction", "input", "output"),
        {"prompt": "instruction", "input": "input", "responses": "responses"},
        "alpaca's form: the prompt is 'instruction', and 'input' on a new line where there is one; "
        "'output' has the responses, the best first",
        lacks=("prompt", "chosen", "responses", "rejected"),
        reads=("history", "output"),
        derive=_alpaca,
    ),
    Form(
        "argilla",
        ("instruction", "chosen_response", "rejected_response"),
        {
            "prompt": "instruction",
            "chosen": "chosen_response",
            "rejected": "rejected_response",
        },
        "the prompt is 'instruction', 'chosen_response' is better than 'rejected_response'",
        lacks=("prompt",),
    ),
    Form(
        "stack_exchange",
        ("question", "response_j", "response_k"),
        {"prompt": "question", "chosen": "response_j", "rejected": "response_k"},
        "Stack Exchange's pairs: 'response_j' is better than 'response_k'",
    ),
    Form(
        "shp",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        {
            "prompt": "history",
            "responses": ("human_ref_A", "human_ref_B"),
            "better": "labels (better)",
        },
        "SHP's form: 'human_ref_A' is better where 'labels' is 1, 'human_ref_B' where it is 0",
        reads=("labels",),
        derive=_labelled("labels", {1: "human_ref_A", 0: "human_ref_B"}),
    ),
    Form(
        "safe_rlhf",
        ("prompt", "response_0", "response_1", "better_response_id"),
        {"responses": ("response_0", "response_1"), "better": "better_response_id"},
        "PKU-SafeRLHF's form: 'better_response_id' names the better response; the safer one is "
        "'data.columns={better: safer_response_id}'",
    ),
    Form(
        "helpsteer2",
        ("prompt", "response_1", "response_2", "preference_strength"),
        {
            "responses": ("response_1", "response_2"),
            "ranks": "preference_strength (ranks)",
        },
        "HelpSteer2's preferences: 'response_1' is better where 'preference_strength' is below 0, "
        "'response_2' where it is above; at 0 they are tied",
        reads=("preference_strength",),
        derive=_strength("preference_strength"),
    ),
    Form(
        "helpsteer3",
        ("context", "response1", "response2", "overall_preference"),
        {
            "prompt": "context",
            "responses": ("response1", "response2"),
            "ranks": "overall_preference (ranks)",
        },
        "HelpSteer3's preferences: 'response1' is better where 'overall_preference' is below 0, "
        "'response2' where it is above; at 0 they are tied",
        reads=("overall_preference",),
        derive=_strength("overall_preference"),
    ),
    Form(
        "helpsteer",
        ("prompt", "response", "helpfulness", "correctness", "coherence"),
        refusal="HelpSteer's marks, one response a row: that is no preference; take the pairs of "
        "its preference files (response_1, response_2, preference_strength), or put the responses "
        "of a prompt in one row with their scores, or say from which mark on one is desirable, as "
        "in 'data.columns={label: helpfulness}' data.threshold=3 loss=kto",
    ),
    Form(
        "unpaired",
        ("response", "label"),
        {"response": "response", "label": "label"},
        lacks=_COMPARED,
        alone=True,
    ),
    Form(
        "unpaired_completion",
        ("completion", "label"),
        {"response": "completion", "label": "label"},
        "TRL's unpaired form: 'completion' is desirable where 'label' is true, undesirable where "
        "it is false",
        lacks=_COMPARED,
        alone=True,
    ),
    *(
        Form(
            name,
            (column,),
            {
                "prompt": column,
                "response": answer_column(column),
                "label": label_column(column),
            },
            f"conversations with ratings: the turns of '{column}' before a rated answer are its "
            "prompt",
            lacks=(*_COMPARED, *_ALONE),
            reads=(column,),
            alone=True,
            conversation=column,
        )
        for name, column in (("thumbs", "messages"), ("thumbs_sharegpt", "conversations"))
    ),
    Form(
        "nectar",
        ("prompt", "answers"),
        {"responses": "answers.answer", "ranks": "answers.rank"},
        "Nectar's form: 'answers' with their ranks, 1 is best",
        lacks=("chosen", "rejected", "responses"),
        reads=("answers",),
        derive=_nectar,
    ),
    Form(
        "ultrafeedback",
        ("instruction", "completions"),
        {
            "prompt": "instruction",
            "responses": "completions.response",
            "scores": "completions.score",
        },
        "UltraFeedback's form: 'completions' by their fine-grained_score (overall_score where "
        "there is none)",
        reads=("completions",),
        derive=_ultrafeedback,
    ),
    Form(
        "arena",
        ("conversation_a", "conversation_b", "winner"),
        {"responses": ("conversation_a", "conversation_b"), "better": "winner"},
        "Chatbot Arena's form: 'winner' names the better conversation; ties teach nothing",
    ),
)

NAMES = ("auto", "rows", *(form.name for form in FORMS))


def form_of(names: Collection[str], columns: Mapping[str, Any], first: Row | None) -> Form | None:
    """The form that a source's rows have by their columns; None for the project's own.

    Args:
        names: The columns.
        columns: ``data.columns``: who maps the texts of a row reads it by that.
        first: The first row, where its columns alone do not tell.
    """
    shown = set(names) - {name for name, column in columns.items() if not column}
    if not any(columns.get(name) for name in ("chosen", "rejected", "responses")):
        # What is mapped is there, under a name of the user's.
        mapped = {name for name in ("response", "label") if columns.get(name)}
        for form in FORMS:
            if form.alone and form.has(shown | mapped):
                return form
    if any(columns.get(name) for name in _NAMED):
        return None
    for form in FORMS:
        if not form.alone and form.has(shown):
            return form
    return FORM["messages"] if first is not None and _answers_apart(first, shown) else None


def may_lack_label(names: Collection[str]) -> bool:
    """True if rows of these columns may have one response each, and a label that this one lacks."""
    return bool(set(_ALONE) & set(names)) and not {"label", *_COMPARED} & set(names)


def _answers_apart(row: Row, names: Collection[str]) -> bool:
    """True if the answers of a row do not repeat its messages."""
    if "prompt" in names or not {"messages", "chosen", "rejected"} <= set(names):
        return False
    for column in ("chosen", "rejected"):
        value = row.get(column)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict) and first.get("role") in ("system", "user", "human"):
            return False
    return True


FORM = {form.name: form for form in FORMS}


def pair_hint(names: Collection[str]) -> str:
    """The mapping to write for rows whose responses have names of one stem; empty for others."""
    stems: dict[str, list[str]] = {}
    for name in names:
        stem = name.rstrip("0123456789")
        if stem == name and len(name) > 1 and name[-1] in "abAB" and not name[-2].isalpha():
            stem = name[:-1]
        if stem and stem != name:
            stems.setdefault(stem, []).append(name)
    for found in stems.values():
        if len(found) > 1:
            listed = ", ".join(map(typed_name, sorted(found)))
            judges = [name for name in names if name not in found and _JUDGE.search(name.lower())]
            better = typed_name(judges[0]) if judges else "<column of the better one>"
            return f"'data.columns={{responses: [{listed}], better: {better}}}'"
    return ""


def mapping_hint(names: Collection[str]) -> str:
    """The mapping to write for rows of other names, as far as their names tell."""
    pair = pair_hint(names)
    if pair:
        return pair
    found = {}
    for field_name, known, other in (
        ("chosen", _BETTER, _WORSE),
        ("rejected", _WORSE, frozenset()),
    ):
        if field_name in names:
            continue
        near = [n for n in names if words_of(n) & known and not words_of(n) & other]
        if len(near) != 1:
            return "'data.columns={prompt: question, chosen: better, rejected: worse}'"
        found[field_name] = near[0]
    prompts = [n for n in names if may_be_the_prompt(n) and n not in found.values()]
    if "prompt" not in names and prompts:
        found = {"prompt": prompts[0], **found}
    return f"'data.columns={{{', '.join(f'{k}: {typed_name(v)}' for k, v in found.items())}}}'"
