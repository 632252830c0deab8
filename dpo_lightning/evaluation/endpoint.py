"""Questions to a language model behind an OpenAI-compatible address. No torch.

What cannot be had is counted. The key is read from the environment when questions are sent; it is
in no message, no log and no file.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.mark_cache import MarkCache, Reply, key_of
from dpo_lightning.evaluation.posting import Poster, PostFailure, Server, open_poster
from dpo_lightning.processes.phases import ShowPhase, unshown
from dpo_lightning.settings.judging import EndpointSettings

log = logging.getLogger(__name__)

_LARGEST_REPLY = 1 << 22
# Tokens that a chat template of the server's may add to a question.
_AROUND = 64
_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class JudgeQuestion:
    """A question.

    Attributes:
        content: Prompt and answers that it is about, by name.
        text: The text that is sent.
    """

    content: Mapping[str, Any]
    text: str


@dataclass(slots=True)
class Spent:
    """Counts of what was asked.

    Attributes:
        questions: Different questions.
        cached: Those of them whose reply was kept from before.
        requests: Requests that were sent, repeated ones too.
        nonsense: Replies that could not be read.
        failed: Questions without a reply.
        tokens_in: Tokens of the questions that got a reply, as the server counts.
        tokens_out: Tokens of these replies.
        uncounted: Replies whose tokens the server did not count.
        last_error: The reason of the last failure.
    """

    questions: int = 0
    cached: int = 0
    requests: int = 0
    nonsense: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    uncounted: int = 0
    last_error: str | None = None


Value = float | str
"""A mark, or the better answer."""

Read = Callable[[str], Value | None]
"""The value of a reply's text; None for nonsense."""


@dataclass(slots=True)
class _Round:
    """The state of one round of questions, shared by its threads.

    Attributes:
        poster: Sends them.
        spent: Counts.
        lock: Held by who counts.
        refusal: The reason, if the server takes no question at all.
        in_a_row: Questions that failed since one got a reply.
        done: Questions that are over.
    """

    poster: Poster
    spent: Spent
    lock: threading.Lock = field(default_factory=threading.Lock)
    refusal: str | None = None
    in_a_row: int = 0
    done: int = 0


class Endpoint:
    """A language model behind an address.

    Args:
        settings: Its settings.
        template: The question with names in braces, of which replies depend on.
        cache: Replies of before.
        wait: Waits so many seconds; None: as long as nobody stops the round.
    """

    def __init__(
        self,
        settings: EndpointSettings,
        *,
        template: str,
        cache: MarkCache,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._settings = settings
        self._template = template
        self._cache = cache
        self._wait = wait

    def ask(
        self, questions: Sequence[JudgeQuestion], read: Read, *, show: ShowPhase = unshown
    ) -> tuple[list[Value | None], Spent]:
        """The value of the reply to each question, None where there is none that can be read.

        Equal questions are asked once.

        Args:
            questions: In any order.
            read: Reads replies.
            show: Shows how far it is.

        Raises:
            UserError: If the server takes no question at all: no such model, or a wrong key.
        """
        keys = [self._key_of(question) for question in questions]
        different = dict(zip(keys, questions, strict=True))
        kept = {key: reply for key in different if (reply := self._cache.get(key)) is not None}
        known = {k: value for k, r in kept.items() if (value := read(r.text)) is not None}
        spent = Spent(questions=len(different), cached=len(known))
        missing = {key: q.text for key, q in different.items() if key not in known}
        if missing:
            log.info("judge: %s", self._bound(list(missing.values()), kept=len(known)))
            known |= self._ask_all(missing, read, spent, show)
            log.info("judge: %s", self.bill(spent))
        return [known.get(key) for key in keys], spent

    def facts(self, spent: Spent) -> dict[str, Any]:
        """Counts and price, as plain values."""
        return {
            "questions": spent.questions,
            "cached": spent.cached,
            "requests": spent.requests,
            "nonsense": spent.nonsense,
            "failed": spent.failed,
            "tokens_in": spent.tokens_in,
            "tokens_out": spent.tokens_out,
            "uncounted": spent.uncounted,
            "price": self._price(spent.tokens_in, spent.tokens_out),
        }

    def bill(self, spent: Spent) -> str:
        """The counts in words."""
        price = self._price(spent.tokens_in, spent.tokens_out)
        parts = [
            f"{spent.requests} requests, {spent.tokens_in:,} tokens in and {spent.tokens_out:,} out"
        ]
        parts += [] if price is None else [f"price {price:.4g}"]
        parts += [f"{spent.nonsense} replies could not be read"] if spent.nonsense else []
        if spent.failed:
            parts.append(f"{spent.failed} got no reply ({spent.last_error})")
        if spent.uncounted:
            parts.append(f"{spent.uncounted} replies came without token counts")
        return ", ".join(parts)

    def upper_bound(self, texts_bytes: int, count: int) -> str:
        """The most that questions can cost, in words.

        No tokenizer makes more tokens than a text has bytes.

        Args:
            texts_bytes: Bytes of all questions.
            count: Number of questions.
        """
        tokens_in = texts_bytes + _AROUND * count
        reply = self._longest_reply()
        if reply is None:
            return f"at most {tokens_in:,} tokens in; judge_options bound no reply"
        price = self._price(tokens_in, reply * count)
        words = f"at most {tokens_in:,} tokens in and {reply * count:,} out"
        return words if price is None else f"{words}, price at most {price:.4g}"

    # One round ----------------------------------------------------------------------------------

    def _bound(self, texts: Sequence[str], *, kept: int) -> str:
        size = sum(len(text.encode()) for text in texts)
        before = f" ({kept} more are kept from before)" if kept else ""
        return f"{len(texts)} questions{before}, {self.upper_bound(size, len(texts))}"

    def _ask_all(
        self, missing: Mapping[str, str], read: Read, spent: Spent, show: ShowPhase
    ) -> dict[str, Value]:
        found: dict[str, Value] = {}
        total = len(missing)
        with (
            open_poster(self._server(), self._wait) as poster,
            show("judging", total=total, unit="questions") as say,
        ):
            state = _Round(poster, spent)

            def one(item: tuple[str, str]) -> None:
                reply = self._answer(state, item[1])
                value = None if reply is None else read(reply.text)
                if reply is not None and value is not None:
                    # Nonsense is asked again another time: it may have been the server's.
                    self._cache.put(item[0], reply)
                    found[item[0]] = value
                with state.lock:
                    spent.nonsense += reply is not None and value is None
                    state.done += 1
                    say(state.done)

            try:
                poster.each(one, missing.items())
            finally:
                spent.requests = poster.requests
        if state.refusal is not None:
            raise UserError(state.refusal)
        return found

    def _server(self) -> Server:
        settings = self._settings
        return Server(
            settings.url,
            settings.key_variable,
            settings.timeout,
            "evaluation.judge_timeout",
            settings.retries,
            settings.concurrency,
            _LARGEST_REPLY,
        )

    def _answer(self, state: _Round, text: str) -> Reply | None:
        """The reply to one question; None where there is none, which is counted."""
        try:
            content = state.poster.post("/chat/completions", self._body(text))
        except PostFailure as failure:
            self._count_failure(state, failure)
            return None
        said, counts = _said(content)
        with state.lock:
            state.in_a_row = 0
            state.spent.uncounted += None in counts
            state.spent.tokens_in += counts[0] or 0
            state.spent.tokens_out += counts[1] or 0
        return Reply(state.poster.hidden(said), *counts)

    def _count_failure(self, state: _Round, failure: PostFailure) -> None:
        """Counts a failure; one that holds for all questions, and many in a row, end the round."""
        remedy = _REMEDIES.get(failure.status or 0)
        with state.lock:
            state.spent.failed += 1
            state.spent.last_error = f"{self._settings.url}: {failure.why}"
            state.in_a_row += 1
            if remedy is not None:
                variable = self._settings.key_variable
                named = "no key was sent" if variable is None else f"the key is that of {variable}"
                state.refusal = (
                    f"evaluation.judge=endpoint: {state.spent.last_error}; "
                    f"{remedy.format(key=named)}"
                )
            if remedy is not None or state.in_a_row >= max(8, self._settings.concurrency):
                state.poster.stop()  # there is nobody to ask

    def _body(self, text: str) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": self._settings.reply_tokens,
        }
        body |= self._settings.options or {}
        return {name: value for name, value in body.items() if value is not None}

    def _key_of(self, question: JudgeQuestion) -> str:
        settings = self._settings
        judge = {"url": settings.url, "template": self._template, "body": self._body("")}
        return key_of(judge, question.content)

    def _longest_reply(self) -> int | None:
        body = self._body("")
        known = [body[name] for name in ("max_tokens", "max_completion_tokens") if name in body]
        counts = [value for value in known if isinstance(value, int)]
        return max(counts) if counts else None

    def _price(self, tokens_in: int, tokens_out: int) -> float | None:
        price = self._settings.price
        if price is None:
            return None
        return (tokens_in * price[0] + tokens_out * price[1]) / _MILLION


_REMEDIES = {
    401: "{key}; name the right variable with evaluation.judge_key_variable=",
    403: "{key}; name the right variable with evaluation.judge_key_variable=",
    404: "check evaluation.judge_url= and evaluation.judge_model=",
}
"""Remedies of what holds for every question."""


def _said(content: bytes) -> tuple[str, tuple[int | None, int | None]]:
    """The text of a reply, empty where there is none, and its tokens in and out."""
    try:
        found = json.loads(content)
        usage = found.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        first, second = (n if type(n) is int and n >= 0 else None for n in counts)
        text = found["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "", (None, None)
    return (text if isinstance(text, str) else ""), (first, second)
