"""The judge of answers: what its settings come to, and what is wrong with them. No torch.

An endpoint's key is never a setting: the settings name the variable of the environment that holds
it, and its value is read where a question is sent.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.data.source_names import is_address
from dpo_lightning.errors import UserError
from dpo_lightning.settings.addresses import key_problems
from dpo_lightning.settings.conduct import JUDGE_KINDS, EvaluationConfig
from dpo_lightning.settings.schema import Config

ANSWER_TOKENS = 256
"""Longest answer of a run on rows."""

JUDGED_TOKENS = 512
"""The same where answers are judged: a mark of an answer that was cut off says little."""

PLACES = {"pairs": ("prompt", "first", "second"), "marks": ("prompt", "answer")}
"""Names in braces that a question to an endpoint has to have, by its form."""

NOT_IN_MARKS = (
    *("judge_key_variable", "judge_price", "judge_timeout", "judge_retries", "judge_concurrency"),
    "scorer",
)
"""Settings of ``evaluation`` that change no mark."""

ENDPOINT_KEYS = (
    *("judge_url", "judge_model", "judge_form", "judge_prompt", "judge_key_variable"),
    *("judge_price", "judge_reply_tokens", "judge_timeout", "judge_retries", "judge_concurrency"),
    "judge_options",
)
"""Settings of ``evaluation`` that are of an endpoint."""

_PLACE = re.compile(r"\{(prompt|answer|first|second)\}")
# What is decided by a question itself.
_OWN_ENTRIES = ("model", "messages", "stream", "n")
_LARGEST_PROMPT = 1 << 20


@dataclass(frozen=True, slots=True)
class EndpointSettings:
    """Settings of an endpoint as plain values.

    Attributes:
        url: Its address, without a slash at the end.
        model: Name of its model.
        form: ``pairs`` or ``marks``.
        template: The question, if it is the user's own.
        key_variable: Variable of the environment with the key; None: none is sent.
        price: For a million tokens in and out, if it is known.
        reply_tokens: Longest reply.
        timeout: Seconds for a reply.
        retries: Attempts after the first.
        concurrency: Questions at once.
        options: More entries of a question's body; None takes one away.
    """

    url: str
    model: str
    form: str
    template: str | None = None
    key_variable: str | None = None
    price: tuple[float, float] | None = None
    reply_tokens: int = 512
    timeout: float = 60.0
    retries: int = 5
    concurrency: int = 8
    options: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """A judge as plain values.

    Attributes:
        name: A function, or a reward model; of an endpoint a label with model and address.
        plugins: Modules that were loaded.
        endpoint: Its settings, if it is one.
        batch_size: Answers that a reward model reads at once.
        cache: Folder of an endpoint's marks, kept for all runs.
    """

    name: str
    plugins: tuple[str, ...]
    endpoint: EndpointSettings | None
    batch_size: int
    cache: Path

    @property
    def marks(self) -> bool:
        """True if an answer alone gets a number."""
        return self.endpoint is None or self.endpoint.form == "marks"


def judge_named(evaluation: EvaluationConfig) -> str | None:
    """The judge that is named, by its old key too; None where nothing judges."""
    name = evaluation.scorer if evaluation.judge is None else evaluation.judge
    return None if name == "none" else name


def model_judge(evaluation: EvaluationConfig) -> str | None:
    """The judge that is a reward model or a function; None for an endpoint."""
    name = judge_named(evaluation)
    return None if name in JUDGE_KINDS else name


def gives_marks(evaluation: EvaluationConfig) -> bool:
    """True if a judge marks each answer by itself, so that there is a ``samples/judge``."""
    name = judge_named(evaluation)
    return name is not None and (name != "endpoint" or evaluation.judge_form == "marks")


def longest_answer(config: Config) -> int:
    """Tokens of the longest answer, before model and task bound it."""
    typed = config.evaluation.max_new_tokens
    if typed is not None:
        return typed
    return ANSWER_TOKENS if judge_named(config.evaluation) is None else JUDGED_TOKENS


def judge_label(evaluation: EvaluationConfig) -> str | None:
    """A text that two judges share if their marks may be ranked together; None without one."""
    name = judge_named(evaluation)
    if name != "endpoint":
        return name
    parts: list[Any] = [evaluation.judge_form, _own_template(evaluation), evaluation.judge_options]
    parts.append(evaluation.judge_reply_tokens)
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:8]
    return f"{evaluation.judge_model} at {_url(evaluation)}, {evaluation.judge_form}, {digest}"


def judge_settings(config: Config, *, cache: Path) -> JudgeSettings | None:
    """The judge as plain values; None where nothing judges.

    Args:
        config: The checked settings.
        cache: Folder of what is kept for all runs.

    Raises:
        UserError: If the endpoint's question cannot be read, or its variable is not set.
    """
    evaluation = config.evaluation
    name, label = judge_named(evaluation), judge_label(evaluation)
    if name is None or label is None:
        return None
    return JudgeSettings(
        name=label,
        plugins=tuple(config.plugins),
        endpoint=_endpoint(evaluation) if name == "endpoint" else None,
        batch_size=evaluation.batch_size,
        cache=cache / "marks",
    )


def _endpoint(evaluation: EvaluationConfig) -> EndpointSettings:
    assert evaluation.judge_model is not None
    price = evaluation.judge_price
    return EndpointSettings(
        url=_url(evaluation),
        model=evaluation.judge_model,
        form=evaluation.judge_form,
        template=_own_template(evaluation),
        key_variable=evaluation.judge_key_variable,
        price=None if price is None else (price[0], price[1]),
        reply_tokens=evaluation.judge_reply_tokens,
        timeout=evaluation.judge_timeout,
        retries=evaluation.judge_retries,
        concurrency=evaluation.judge_concurrency,
        options=dict(evaluation.judge_options),
    )


def _url(evaluation: EvaluationConfig) -> str:
    assert evaluation.judge_url is not None
    return evaluation.judge_url.rstrip("/").removesuffix("/chat/completions").rstrip("/")


def _own_template(evaluation: EvaluationConfig) -> str | None:
    """The text of ``judge_prompt``; None where ours is asked.

    Raises:
        UserError: If it cannot be read.
    """
    name = evaluation.judge_prompt
    if name is None:
        return None
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(
            f"evaluation.judge_prompt={name}: it cannot be read as text ({error}); name a text file"
        ) from error


# What is wrong with them -------------------------------------------------------------------------


def judge_problems(config: Config) -> Iterator[str]:
    """Yields the contradictions of a judge's settings, one clause each.

    A reward model's folder is looked at by who knows folders.
    """
    evaluation, default = config.evaluation, EvaluationConfig()
    old, new = evaluation.scorer, evaluation.judge
    if old is not None and new is not None and old != new:
        yield (
            f"evaluation.scorer={old} is the old name of evaluation.judge={new}; give one of the "
            "two"
        )
        return
    name = judge_named(evaluation)
    if name is not None and evaluation.samples == 0 and not config.rounds.count:
        yield (
            f"evaluation.judge={name}: evaluation.samples=0 draws no answers to judge; leave one "
            "of the two out"
        )
    if name != "endpoint":
        for key in ENDPOINT_KEYS:
            if getattr(evaluation, key) != getattr(default, key):
                yield (
                    f"evaluation.{key}={getattr(evaluation, key)} is for an endpoint, and "
                    f"evaluation.judge={name or 'none'}; add evaluation.judge=endpoint, or leave "
                    "it out"
                )
        if name is not None and is_address(name):
            yield (
                f"evaluation.judge={name}: addresses are not loaded; to ask a server, use "
                f"evaluation.judge=endpoint evaluation.judge_url={name}"
            )
        return
    yield from _endpoint_problems(evaluation)


def _endpoint_problems(evaluation: EvaluationConfig) -> Iterator[str]:
    url = evaluation.judge_url
    if url is None:
        yield (
            "evaluation.judge=endpoint needs its address: "
            "evaluation.judge_url=<address, such as http://localhost:8000/v1>"
        )
    if evaluation.judge_model is None:
        yield "evaluation.judge=endpoint needs a model: evaluation.judge_model=<name>"
    yield from key_problems(
        address_key="evaluation.judge_url",
        address=url,
        variable_key="evaluation.judge_key_variable",
        variable=evaluation.judge_key_variable,
    )
    for name in _OWN_ENTRIES:
        if name in evaluation.judge_options:
            yield (
                f"evaluation.judge_options.{name}={evaluation.judge_options[name]}: the question "
                "itself decides it; leave it out"
            )
    yield from _template_problems(evaluation)


def _template_problems(evaluation: EvaluationConfig) -> Iterator[str]:
    name, form = evaluation.judge_prompt, evaluation.judge_form
    if name is None:
        return
    path = Path(name).expanduser()
    if not path.is_file() or path.stat().st_size > _LARGEST_PROMPT:
        yield (
            f"evaluation.judge_prompt={name}: no such text file, seen from {Path.cwd()}; leave "
            "it out for the built-in question"
        )
        return
    found = set(_PLACE.findall(path.read_text(encoding="utf-8", errors="replace")))
    wanted = set(PLACES[form])
    if found != wanted:
        there = ", ".join(f"{{{place}}}" for place in sorted(found)) or "none"
        yield (
            f"evaluation.judge_prompt={name}: for evaluation.judge_form={form} it needs "
            f"{', '.join(f'{{{place}}}' for place in PLACES[form])} and no other, and has {there}; "
            "change the file, or leave it out for the built-in question"
        )


def is_price(value: object) -> bool:
    """True for a price of tokens in and of tokens out."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(type(x) in (int, float) and 0 <= x < float("inf") for x in value)
    )


def hashed_evaluation(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of ``evaluation`` that decide a run's numbers.

    Args:
        evaluation: All of them as plain values.
    """
    kept = {key: value for key, value in evaluation.items() if key not in NOT_IN_MARKS}
    if kept.get("judge") != "endpoint":
        # Settings of what nobody asks.
        kept = {key: value for key, value in kept.items() if key not in ENDPOINT_KEYS}
    return kept
