"""Questions to a language model behind an OpenAI-compatible address. No torch.

A question is tried again after a timeout, a broken connection, 429 and 5xx; what cannot be had is
counted. The key is read from the environment when questions are sent; it is in no message, no log
and no file.
"""

from __future__ import annotations

import email.utils
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.mark_cache import MarkCache, Reply, key_of
from dpo_lightning.settings.credentials import redact
from dpo_lightning.settings.judging import EndpointSettings

log = logging.getLogger(__name__)

MOST_WAIT = 300.0
"""Seconds beyond which a server's own wish to wait is a refusal."""

_FIRST_WAIT = 0.5
_LONGEST_BACKOFF = 30.0
_AGAIN = (408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
_LARGEST_REPLY = 1 << 22
# Tokens that a chat template of the server's may add to a question.
_AROUND = 64
_MILLION = 1_000_000
# Apart from the generator that data and training may draw from.
_DICE = random.SystemRandom()


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


class _Failure(Exception):
    """A question that got no reply.

    Args:
        why: In words.
        again: True if another attempt may help.
        wait: Seconds that the server asks to wait.
    """

    def __init__(self, why: str, *, again: bool, wait: float = 0.0) -> None:
        super().__init__(why)
        self.why = why
        self.again = again
        self.wait = wait


@dataclass(slots=True)
class _Round:
    """The state of one round of questions, shared by its threads.

    Attributes:
        client: Sends them.
        key: The endpoint's key, if it takes one.
        spent: Counts.
        lock: Held by who counts.
        stopped: Set where no more is asked.
        refusal: The reason, if the server takes no question at all.
        in_a_row: Questions that failed since one got a reply.
    """

    client: httpx.Client
    key: str | None
    spent: Spent
    lock: threading.Lock = field(default_factory=threading.Lock)
    stopped: threading.Event = field(default_factory=threading.Event)
    refusal: str | None = None
    in_a_row: int = 0


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
        self, questions: Sequence[JudgeQuestion], read: Read
    ) -> tuple[list[Value | None], Spent]:
        """The value of the reply to each question, None where there is none that can be read.

        Equal questions are asked once.

        Args:
            questions: In any order.
            read: Reads replies.

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
            known |= self._ask_all(missing, read, spent)
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
        parts += [f"{spent.nonsense} replies were nonsense"] if spent.nonsense else []
        if spent.failed:
            parts.append(f"{spent.failed} got no reply ({spent.last_error})")
        if spent.uncounted:
            parts.append(f"of {spent.uncounted} replies the server counted no tokens")
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

    def _ask_all(self, missing: Mapping[str, str], read: Read, spent: Spent) -> dict[str, Value]:
        settings = self._settings
        variable = settings.key_variable
        key = None if variable is None else os.environ.get(variable)
        limits = httpx.Limits(max_connections=settings.concurrency)
        found: dict[str, Value] = {}
        with httpx.Client(timeout=settings.timeout, limits=limits) as client:
            state = _Round(client, key, spent)

            def one(item: tuple[str, str]) -> None:
                reply = self._answer(state, item[1])
                value = None if reply is None else read(reply.text)
                if reply is not None and value is not None:
                    # Nonsense is asked again another time: it may have been the server's.
                    self._cache.put(item[0], reply)
                    found[item[0]] = value
                elif reply is not None:
                    with state.lock:
                        spent.nonsense += 1

            pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="judge")
            try:
                list(pool.map(one, missing.items()))
            finally:
                state.stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
        if state.refusal is not None:
            raise UserError(state.refusal)
        return found

    def _answer(self, state: _Round, text: str) -> Reply | None:
        """The reply to one question; None where there is none, which is counted."""
        try:
            content = self._try(state, text)
        except _Failure as failure:
            with state.lock:
                state.spent.failed += 1
                state.spent.last_error = failure.why
                state.in_a_row += 1
                if state.in_a_row >= max(8, self._settings.concurrency):
                    state.stopped.set()  # there is nobody to ask
            return None
        said, counts = _said(content)
        with state.lock:
            state.in_a_row = 0
            state.spent.uncounted += None in counts
            state.spent.tokens_in += counts[0] or 0
            state.spent.tokens_out += counts[1] or 0
        return Reply(_hidden(said, state.key), *counts)

    def _try(self, state: _Round, text: str) -> bytes:
        """The body of a reply, by as many attempts as are allowed.

        Raises:
            _Failure: If there is none.
        """
        for attempt in range(self._settings.retries + 1):
            if state.stopped.is_set():
                raise _Failure(state.spent.last_error or "nothing more was asked", again=False)
            with state.lock:
                state.spent.requests += 1
            try:
                return self._send(state, text)
            except _Failure as failure:
                if not failure.again or attempt == self._settings.retries:
                    raise
                backoff = min(_LONGEST_BACKOFF, _FIRST_WAIT * 2**attempt)
                # Spread, so that those who failed together do not come back together.
                seconds = max(failure.wait, backoff * _DICE.uniform(0.5, 1.0))
                (self._wait or state.stopped.wait)(seconds)
        raise AssertionError("the last attempt returns or raises")  # pragma: no cover

    def _send(self, state: _Round, text: str) -> bytes:
        headers = {} if state.key is None else {"Authorization": f"Bearer {state.key}"}
        deadline = time.monotonic() + self._settings.timeout
        parts: list[bytes] = []
        try:
            with state.client.stream(
                "POST",
                f"{self._settings.url}/chat/completions",
                json=self._body(text),
                headers=headers,
            ) as response:
                for part in response.iter_bytes():
                    parts.append(part)
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout("the reply did not end")
                    if sum(map(len, parts)) > _LARGEST_REPLY:
                        raise _Failure("a reply without end", again=False)
        except httpx.TimeoutException:
            raise _Failure(
                f"no reply within evaluation.judge_timeout={self._settings.timeout:g} s", again=True
            ) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            why = _hidden(f"{type(error).__name__}: {error}", state.key)
            raise _Failure(f"{self._settings.url}: {why}", again=True) from None
        content = b"".join(parts)
        if response.status_code != 200:
            raise self._refused(state, response, content)
        return content

    def _refused(self, state: _Round, response: httpx.Response, content: bytes) -> _Failure:
        """The failure that a status means; one that holds for all questions ends the round."""
        status = response.status_code
        said = _hidden(" ".join(content.decode(errors="replace").split())[:200], state.key)
        why = f"{self._settings.url} answers {status}{f' ({said})' if said else ''}"
        remedy = _REMEDIES.get(status)
        if remedy is not None:
            with state.lock:
                variable = self._settings.key_variable
                named = "no key was sent" if variable is None else f"the key is that of {variable}"
                state.refusal = f"evaluation.judge=endpoint: {why}; {remedy.format(key=named)}"
                state.stopped.set()
        wait = _retry_after(response.headers.get("Retry-After"))
        if wait > MOST_WAIT:
            return _Failure(f"{why} and asks to wait {wait:.0f} s", again=False)
        return _Failure(why, again=status in _AGAIN, wait=wait)

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


def _hidden(text: str, key: str | None) -> str:
    """A text without the key, which a server may repeat."""
    return redact(text if not key else text.replace(key, "[hidden]"))


def _retry_after(text: str | None) -> float:
    """Seconds that a server asks to wait: given as such, or as a date; 0 for none."""
    if text is None:
        return 0.0
    try:
        return max(0.0, float(text))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
