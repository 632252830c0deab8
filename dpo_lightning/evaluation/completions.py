"""Answers of a server of completions that is compatible with OpenAI's, such as vLLM's.

Prompts go out as token ids. Servers that can give ids back are asked to; the text of others is
tokenized again, which may be other tokens of the same text.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.keyed import seeds_of
from dpo_lightning.plugins import SampleRequest
from dpo_lightning.settings.credentials import redact
from dpo_lightning.settings.generation import Backend

log = logging.getLogger(__name__)

_AGAIN = (408, 429, 500, 502, 503, 504)
_ATTEMPTS = 5
_FIRST_WAIT = 0.5
_LARGEST_REPLY = 1 << 24


class CompletionServer:
    """A sampler that asks a server.

    Args:
        backend: Its address, the name of its model, and how it is asked.
        wait: Waits so many seconds between two attempts.
    """

    def __init__(self, backend: Backend, wait: Any = time.sleep) -> None:
        self._backend = backend
        self._url = backend.name.removesuffix("/completions")
        self._wait = wait
        variable = backend.key_variable
        self._key = None if variable is None else os.environ.get(variable)
        self._stopped = threading.Event()
        self._by_text = False

    def __call__(self, request: SampleRequest) -> list[list[int]]:
        """Answers of the server.

        Raises:
            UserError: If it gives none to one of the prompts.
        """
        self._stopped.clear()
        limits = httpx.Limits(max_connections=self._backend.concurrency)
        bodies = [
            self._body(request, prompt, limit, seed)
            for prompt, limit, seed in zip(
                request.prompts,
                request.limits,
                seeds_of(request.seed, request.prompts),
                strict=True,
            )
        ]
        with httpx.Client(
            timeout=self._backend.timeout,
            limits=limits,
            # Certificates are dear to read, and an open line has none.
            verify=self._url.startswith("https:"),
        ) as client:
            pool = ThreadPoolExecutor(self._backend.concurrency, thread_name_prefix="generate")
            try:
                choices = list(pool.map(lambda body: self._choice(client, body), bodies))
            except BaseException:
                self._stopped.set()
                raise
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        answers = [self._ids(choice, request) for choice in choices]
        if self._by_text:
            log.info(
                "%s gives no token ids back: its answers are tokenized again, so that "
                "log-probabilities are of these tokens and not surely of those that were drawn",
                self._url,
            )
        return answers

    def _body(
        self, request: SampleRequest, prompt: Sequence[int], limit: int, seed: int
    ) -> dict[str, Any]:
        body = {
            "model": self._backend.model,
            "prompt": list(prompt),
            "max_tokens": limit,
            "temperature": request.temperature,
            "top_p": request.top_p,
            # Some servers take 32 bits.
            "seed": seed & 0x7FFFFFFF,
            "n": 1,
            "stop_token_ids": list(request.ends),
            "return_token_ids": True,
        } | dict(request.options)
        return {name: value for name, value in body.items() if value is not None}

    def _choice(self, client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of a reply, by as many attempts as are allowed.

        Raises:
            UserError: If there is none.
        """
        why = "it was stopped"
        for attempt in range(_ATTEMPTS):
            if self._stopped.is_set():
                break
            if attempt:
                self._wait(_FIRST_WAIT * 2 ** (attempt - 1))
            try:
                reply = client.post(f"{self._url}/completions", json=body, headers=self._headers())
            except httpx.TimeoutException:
                why = f"no reply within generation.timeout={self._backend.timeout:g} s"
                continue
            except httpx.TransportError as error:
                why = f"{type(error).__name__}: {error}"
                continue
            if reply.status_code == 200:
                return _first_choice(reply, self._url)
            said = " ".join(reply.text.split())[:200]
            why = f"it answers {reply.status_code}{f' ({said})' if said else ''}"
            if reply.status_code not in _AGAIN:
                break
        raise UserError(self._hidden(f"generation.backend={self._url}: {why}; {_remedy(why)}"))

    def _headers(self) -> dict[str, str]:
        return {} if self._key is None else {"Authorization": f"Bearer {self._key}"}

    def _hidden(self, text: str) -> str:
        """A text without the key, which a server may repeat."""
        return redact(text.replace(self._key, "[hidden]") if self._key else text)

    def _ids(self, choice: dict[str, Any], request: SampleRequest) -> list[int]:
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            self._by_text = True
            text = str(choice.get("text", ""))
            ids = request.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if choice.get("finish_reason") == "stop" and (not ids or ids[-1] not in request.ends):
            reason = choice.get("stop_reason")
            ids = [*ids, reason if type(reason) is int else request.ends[0]]
        return list(ids) or [request.ends[0]]


def _first_choice(reply: httpx.Response, url: str) -> dict[str, Any]:
    try:
        if len(reply.content) > _LARGEST_REPLY:
            raise ValueError
        choice = reply.json()["choices"][0]
        if not isinstance(choice.get("text"), str) and "token_ids" not in choice:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"generation.backend={url}: a reply is none of a server of completions; name the "
            "address up to its /v1"
        ) from error
    assert isinstance(choice, dict)
    return choice


def _remedy(why: str) -> str:
    if " 401" in why or " 403" in why:
        return "name the variable that holds its key with generation.key_variable="
    if " 404" in why:
        return "check the address and generation.model="
    return "see what its server says, or draw by generation.backend=hf"
