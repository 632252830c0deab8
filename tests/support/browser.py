"""Chromium without a display, spoken to over two pipes: pages opened and measured."""

import base64
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars "
    "--remote-debugging-pipe"
)


@dataclass
class Browser:
    """An open browser with one page.

    Attributes:
        said: Errors and warnings of the page's console, texts.
    """

    send: Any
    receive: Any
    session: str | None = None
    said: list[str] = field(default_factory=list)
    _number: int = 0
    _rest: bytes = b""

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the DevTools protocol and waits for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        self.send.write(json.dumps(message).encode() + b"\0")
        self.send.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            more = self.receive.read1()
            assert more, "the browser ended"
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        answer = json.loads(text)
        parameters = answer.get("params", {})
        if answer.get("method") == "Runtime.exceptionThrown":
            self.said.append(str(parameters["exceptionDetails"]))
        elif answer.get("method") == "Log.entryAdded":
            self.said.append(parameters["entry"]["text"])
        elif answer.get("method") == "Runtime.consoleAPICalled":
            self.said.append(str(parameters["args"]))
        return answer

    def open(self, page: Path | str, *, width: int, dark: bool) -> None:
        """Opens a file or an address and waits until it is there.

        Args:
            page: The file, or an address.
            width: Width of the window.
            dark: True for the dark scheme.
        """
        # What an earlier view wrote or was told must not reach this one.
        self.call("Page.navigate", url="about:blank")
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        address = page if isinstance(page, str) else page.resolve().as_uri()
        self.call("Page.navigate", url=address)
        while self.run("document.readyState") != "complete":
            time.sleep(0.02)

    def picture(self, path: Path) -> None:
        """Writes the whole page, as it is shown, into a PNG.

        Args:
            path: The file.
        """
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(taken["data"]))

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """A browser whose profile lies in a folder; closed at the end."""
    program = shutil.which("chromium")
    assert program is not None
    ours, theirs = os.pipe(), os.pipe()
    command = [program, *FLAGS.split(), f"--user-data-dir={folder}", "about:blank"]
    # It reads from descriptor 3 and writes to descriptor 4.
    line = f"exec {shlex.join(command)} 3<&{ours[0]} 4>&{theirs[1]}"
    process = subprocess.Popen(
        ["bash", "-c", line], pass_fds=(ours[0], theirs[1]), stderr=subprocess.DEVNULL
    )
    os.close(ours[0])
    os.close(theirs[1])
    with os.fdopen(ours[1], "wb") as send, os.fdopen(theirs[0], "rb") as receive:
        browser = Browser(send, receive)
        try:
            pages = browser.call("Target.getTargets")["targetInfos"]
            [target] = [page["targetId"] for page in pages if page["type"] == "page"]
            attached = browser.call("Target.attachToTarget", targetId=target, flatten=True)
            browser.session = attached["sessionId"]
            for domain in ("Page", "Runtime", "Log"):
                browser.call(f"{domain}.enable")
            # A site remembers the scheme of an earlier view; a file may have no such memory.
            forget = "try { localStorage.clear() } catch {}"
            browser.call("Page.addScriptToEvaluateOnNewDocument", source=forget)
            yield browser
        finally:
            process.kill()
            process.wait()
