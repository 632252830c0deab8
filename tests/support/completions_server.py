"""A local server of completions: it answers what a test tells it to, and keeps what it was sent."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], tuple[Any, ...]]
"""From a body and the number of the request to a status, what is sent (JSON, bytes, or an iterator
of bytes, which is sent as it comes), and headers if there are more."""


@dataclass
class Sent:
    """Requests that came in."""

    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def completions(answer: Answer) -> Iterator[Sent]:
    """Context with a server; its address ends in ``/v1``."""
    sent, lock = Sent(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(sent.bodies)
                sent.paths.append(self.path)
                sent.bodies.append(body)
                sent.keys.append(self.headers.get("Authorization"))
            status, found, *more = answer(body, number)
            self.send_response(status)
            for name, value in (more[0] if more else {}).items():
                self.send_header(name, value)
            if isinstance(found, Iterator):
                self.end_headers()  # its end is that of the connection
                with contextlib.suppress(OSError):  # it may have hung up
                    for part in found:
                        self.wfile.write(part)
                return
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    sent.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield sent
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def choice(text: str, reason: str = "stop", **more: Any) -> dict[str, Any]:
    """A reply with one choice."""
    return {"choices": [{"index": 0, "text": text, "finish_reason": reason, **more}]}
