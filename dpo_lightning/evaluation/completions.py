"""Answers of a server of completions that is compatible with OpenAI's, such as vLLM's.

Prompts go out as token ids. Servers that can give ids back are asked to; the text of others is
tokenized again, which may be other tokens of the same text.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.evaluation.keyed import request_seeds
from dpo_lightning.evaluation.posting import Poster, PostFailure, Server, open_poster
from dpo_lightning.plugins import SampleRequest
from dpo_lightning.settings.generation import Backend

log = logging.getLogger(__name__)

_RETRIES = 4
_LARGEST_REPLY = 1 << 24


class CompletionServer:
    """A sampler that asks a server.

    Args:
        backend: Its address, the name of its model, and how it is asked.
        wait: Waits so many seconds between two attempts; None: as long as nothing ends them.
    """

    def __init__(self, backend: Backend, wait: Callable[[float], object] | None = None) -> None:
        self._backend = backend
        self._url = backend.name.removesuffix("/completions")
        self._wait = wait
        self._by_text = False

    def __call__(self, request: SampleRequest) -> list[list[int]]:
        """Answers of the server.

        Raises:
            UserError: If it gives none to one of the prompts.
        """
        seeds = request_seeds(request)
        bodies = [
            self._body(request, prompt, limit, seed)
            for prompt, limit, seed in zip(request.prompts, request.limits, seeds, strict=True)
        ]
        backend = self._backend
        server = Server(
            self._url,
            backend.key_variable,
            backend.timeout,
            "generation.timeout",
            _RETRIES,
            backend.concurrency,
            _LARGEST_REPLY,
        )
        with open_poster(server, self._wait) as poster:
            choices = poster.each(lambda body: self._choice(poster, body), bodies)
        answers = [self._ids(choice, request) for choice in choices]
        if self._by_text:
            log.info(
                "%s returns no token ids: its answers are tokenized again, so log-probs may be of "
                "other tokens than those that were drawn",
                self._url,
            )
        return answers

    def _body(
        self, request: SampleRequest, prompt: Sequence[int], limit: int, seed: int
    ) -> dict[str, Any]:
        return {
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

    def _choice(self, poster: Poster, body: dict[str, Any]) -> dict[str, Any]:
        """The first choice of a reply.

        Raises:
            UserError: If there is none.
        """
        try:
            content = poster.post("/completions", body)
        except PostFailure as failure:
            remedy = _REMEDIES.get(failure.status or 0, _REMEDY)
            raise UserError(f"generation.backend={self._url}: {failure.why}; {remedy}") from failure
        return _first_choice(content, self._url)

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


def _first_choice(content: bytes, url: str) -> dict[str, Any]:
    try:
        choice = json.loads(content)["choices"][0]
        if not isinstance(choice.get("text"), str) and "token_ids" not in choice:
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"generation.backend={url}: the reply is not one of a completions server; give the "
            "address up to its /v1"
        ) from error
    assert isinstance(choice, dict)
    return choice


_KEY = "name the variable that holds its key with generation.key_variable="
_REMEDIES = {401: _KEY, 403: _KEY, 404: "check the address and generation.model="}
_REMEDY = "look at the server's log, or use generation.backend=hf"
