"""A wandb server as far as a run needs one, and its failures: run it, it prints its port.

`python tests/support/wandb_server.py [mode]`: without a mode it takes everything; ``refuse``
answers 401 to everything; ``lost`` ends when the first metrics arrive.
"""

import gzip
import json
import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODE = sys.argv[1] if len(sys.argv) > 1 else "works"
_RUN = {
    **{"id": "UnVu", "name": "r", "displayName": "r", "description": None, "config": "{}"},
    **{"sweepName": None, "historyLineCount": 0},
    "project": {"id": "P", "name": "p", "entity": {"id": "E", "name": "me"}},
}


def _answer(name: str) -> dict[str, Any]:
    """One answer to every query, from which each takes its part."""
    run = _RUN | {"name": name, "displayName": name}
    return {
        "viewer": {
            "id": "V",
            "username": "me",
            "entity": "me",
            "flags": "{}",
            "teams": {"edges": []},
        },
        "serverInfo": {
            "cliVersionInfo": {"max_cli_version": "9.9.9"},
            "latestLocalVersionInfo": None,
        },
        "upsertBucket": {"bucket": run, "inserted": True},
        "model": {"bucket": None},
        "createRunFiles": {"runID": "r", "uploadHeaders": [], "files": []},
        "entity": {"name": "me"},
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        """Logs nothing."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        # What came in, for those who look for what should not have.
        print(self.path, body[:100_000], flush=True)
        if MODE == "refuse":
            self._reply({"errors": [{"message": "no such key"}]}, 401)
        elif MODE == "lost" and "file_stream" in self.path:
            os._exit(0)
        else:
            self._reply(self._data(body) if self.path.endswith("/graphql") else {}, 200)

    def _data(self, body: bytes) -> dict[str, Any]:
        return {"data": _answer(json.loads(body).get("variables", {}).get("name") or "r")}

    do_PUT = do_POST

    def do_GET(self) -> None:
        self._reply({}, 200)

    def _reply(self, value: Any, code: int) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
