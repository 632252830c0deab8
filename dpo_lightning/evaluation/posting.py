"""Questions to a server as JSON over HTTP, many at once. No torch.

A question is asked again after a timeout, a broken connection, 408, 429 and 5xx. A reply has a
deadline and a largest size as a whole, however slowly it comes. The key is in no error.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from dpo_lightning.settings.credentials import redact

MOST_WAIT = 300.0
"""Seconds beyond which a server's own wish to wait is a refusal."""

_FIRST_WAIT = 0.5
_LONGEST_BACKOFF = 30.0
_AGAIN = (408, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529)
# Apart from the generator that data and training may draw from.
_DICE = random.SystemRandom()

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


@dataclass(frozen=True, slots=True)
class Server:
    """An address, and how it is asked.

    Attributes:
        url: The address.
        key_variable: Variable of the environment with its key; None: none is sent.
        timeout: Seconds for one reply, from its first byte to its last.
        timeout_setting: The setting that says so, for errors.
        retries: Attempts after the first.
        concurrency: Questions at once.
        largest_reply: Bytes that a reply may have.
    """

    url: str
    key_variable: str | None
    timeout: float
    timeout_setting: str
    retries: int
    concurrency: int
    largest_reply: int


class PostFailure(Exception):
    """A question that got no reply.

    Attributes:
        why: In words, without the key.
        status: The server's, if it answered.

    Args:
        why: In words.
        again: True if another attempt may help.
        status: The server's, if it answered.
        wait: Seconds that the server asks to wait.
    """

    def __init__(
        self, why: str, *, again: bool, status: int | None = None, wait: float = 0.0
    ) -> None:
        super().__init__(why)
        self.why = why
        self.again = again
        self.status = status
        self.wait = wait


class Poster:
    """Sends questions to one server, from several threads.

    Attributes:
        requests: Number of requests that were sent, repeated ones too.

    Args:
        server: The server.
        client: Its connections.
        wait: Waits so many seconds; None: as long as nobody stops it.
    """

    def __init__(
        self,
        server: Server,
        client: httpx.Client,
        wait: Callable[[float], object] | None = None,
    ) -> None:
        self._server = server
        self._client = client
        variable = server.key_variable
        self._key = None if variable is None else os.environ.get(variable)
        self._stopped = threading.Event()
        self._wait = wait or self._stopped.wait
        self._lock = threading.Lock()
        self._last: str | None = None
        self.requests = 0

    def stop(self) -> None:
        """Lets nothing more be asked, and ends all waits between attempts."""
        self._stopped.set()

    def hidden(self, text: str) -> str:
        """A text without the key, which a server may repeat."""
        return redact(text if not self._key else text.replace(self._key, "[hidden]"))

    def post(self, path: str, body: dict[str, Any]) -> bytes:
        """The body of the reply, by as many attempts as are allowed.

        Args:
            path: Behind the address, such as ``/completions``.
            body: The question; entries of None are left out.

        Raises:
            PostFailure: If there is none.
        """
        content = json.dumps({name: value for name, value in body.items() if value is not None})
        for attempt in range(self._server.retries + 1):
            if self._stopped.is_set():
                raise PostFailure(self._last or "nothing more was asked", again=False)
            try:
                return self._send(f"{self._server.url}{path}", content.encode())
            except PostFailure as failure:
                self._last = failure.why
                if not failure.again or attempt == self._server.retries:
                    raise
                backoff = min(_LONGEST_BACKOFF, _FIRST_WAIT * 2**attempt)
                # Spread, so that those who failed together do not come back together.
                self._wait(max(failure.wait, backoff * _DICE.uniform(0.5, 1.0)))
        raise AssertionError("the last attempt returns or raises")  # pragma: no cover

    def each(self, ask: Callable[[_Item], _Found], items: Iterable[_Item]) -> list[_Found]:
        """The answer to each item, in their order; the first error ends all.

        Args:
            ask: Called in several threads; posts.
            items: The items.
        """
        pool = ThreadPoolExecutor(self._server.concurrency, thread_name_prefix="ask")
        try:
            return list(pool.map(ask, items))
        finally:
            self.stop()
            pool.shutdown(wait=True, cancel_futures=True)

    def _send(self, url: str, content: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        headers |= {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        with self._lock:
            self.requests += 1
        try:
            with self._client.stream("POST", url, content=content, headers=headers) as response:
                found = self._read(response)
        except httpx.TimeoutException:
            server = self._server
            raise PostFailure(
                f"no reply within {server.timeout_setting}={server.timeout:g} s", again=True
            ) from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            why = self.hidden(f"{type(error).__name__}: {error}")
            raise PostFailure(why, again=True) from None
        if response.status_code != 200:
            raise self._refused(response, found)
        return found

    def _read(self, response: httpx.Response) -> bytes:
        """The whole body, within time and size: httpx limits only the time between two parts."""
        deadline = time.monotonic() + self._server.timeout
        found = bytearray()
        for part in response.iter_bytes():
            found += part
            if time.monotonic() > deadline:
                raise httpx.ReadTimeout("the reply did not end")
            if len(found) > self._server.largest_reply:
                raise PostFailure("a reply without end", again=False)
        return bytes(found)

    def _refused(self, response: httpx.Response, content: bytes) -> PostFailure:
        status = response.status_code
        said = self.hidden(" ".join(content.decode(errors="replace").split())[:200])
        why = f"it answers {status}{f' ({said})' if said else ''}"
        wait = _retry_after(response.headers.get("Retry-After"))
        if wait > MOST_WAIT:
            return PostFailure(f"{why} and asks to wait {wait:.0f} s", again=False, status=status)
        return PostFailure(why, again=status in _AGAIN, status=status, wait=wait)


@contextlib.contextmanager
def open_poster(server: Server, wait: Callable[[float], object] | None = None) -> Iterator[Poster]:
    """Context with connections to a server.

    Args:
        server: The server.
        wait: Waits so many seconds; None: as long as nobody stops the poster.
    """
    with httpx.Client(
        timeout=server.timeout,
        limits=httpx.Limits(max_connections=server.concurrency),
        # Certificates are dear to read, and an open line has none.
        verify=server.url.startswith("https:"),
    ) as client:
        yield Poster(server, client, wait)


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
