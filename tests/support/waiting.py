"""Waiting for an event: no longer than it takes, and long enough for a machine that is busy."""

import time
from collections.abc import Callable

SECONDS = 120.0
"""Nothing that is waited for takes so long, on any machine."""


def until(condition: Callable[[], object], about: Callable[[], object] | str = "") -> None:
    """Waits until a condition holds; `about` gives the facts for a failure."""
    deadline = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(about if isinstance(about, str) else about())
        time.sleep(0.02)
