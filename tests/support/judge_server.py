"""A language model's server as far as a judge needs one, in a thread, with all its moods."""

import contextlib
import json
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Act:
    """A server's answer to one request.

    Attributes:
        text: The reply's text.
        status: Another one than 200 comes with the text as its body.
        headers: More of them.
        stall: Seconds before anything is sent.
        reset: True if the connection is broken instead.
        raw: The body of a 200, in place of a reply.
        usage: Tokens in and out; None: it counts none.
    """

    text: str = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    stall: float = 0.0
    reset: bool = False
    raw: bytes | None = None
    usage: tuple[int, int] | None = (100, 10)

    def body(self) -> bytes:
        if self.raw is not None:
            return self.raw
        if self.status != 200:
            return self.text.encode()
        reply: dict[str, Any] = {"choices": [{"message": {"content": self.text}}]}
        if self.usage is not None:
            reply["usage"] = {"prompt_tokens": self.usage[0], "completion_tokens": self.usage[1]}
        return json.dumps(reply).encode()


@dataclass
class JudgeServer:
    """The server.

    Attributes:
        act: Its answer to the n-th request, by number and by the text of the question.
        seen: Body of each request,
        headers: and its headers.
    """

    act: Callable[[int, str], Act]
    url: str = ""
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def questions(self) -> list[str]:
        """The text of each request."""
        return [body["messages"][0]["content"] for body in self.seen]


def handler_of(server: JudgeServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            """Logs nothing."""

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.lock:
                number = len(server.seen)
                server.seen.append(body | {"path": self.path})
                server.headers.append(dict(self.headers))
            act = server.act(number, body["messages"][0]["content"])
            server.over.wait(act.stall)
            if act.reset:
                # Closed at once, with what is unread: the client sees a reset.
                option = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, option)
                self.connection.close()
                return
            content = act.body()
            with contextlib.suppress(OSError):  # it may have hung up
                self.send_response(act.status)
                for name, value in act.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

        def finish(self) -> None:
            # The connection may have been broken on purpose.
            with contextlib.suppress(OSError, ValueError):
                super().finish()

    return Handler


@contextlib.contextmanager
def judge_server(act: Callable[[int, str], Act]) -> Iterator[JudgeServer]:
    """A server that answers until the end of the block."""
    server = JudgeServer(act)
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(server))
    http.daemon_threads = True
    http.handle_error = lambda *_: None  # type: ignore[method-assign]
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        http.shutdown()
        http.server_close()
        thread.join()


def answers_in(question: str) -> list[str]:
    """The answers in a question of ours, in their order."""
    parts = question.split("=== ")
    return [
        part.partition(" ===\n")[2].strip() for part in parts if "answer ===" in part.split("\n")[0]
    ]


def prefers_longer(number: int, question: str) -> Act:
    """The longer of two answers is better, whatever their order."""
    first, second = map(len, answers_in(question))
    better = "first" if first > second else "second" if second > first else "tie"
    return Act(f'Because of its length.\n{{"better": "{better}"}}')


def prefers_first(number: int, question: str) -> Act:
    """The answer that stands first is better: the mind of this one follows the order."""
    return Act('{"better": "first"}')


def marks_length(number: int, question: str) -> Act:
    """The mark is the number of letters, at most 10."""
    [answer] = answers_in(question)
    return Act(f'{{"mark": {min(10, len(answer))}}}')
