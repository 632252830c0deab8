"""The end of a pipe by which a trial knows that its sweep is still there."""

from __future__ import annotations

import os
import signal
import threading
import time

LIFELINE = "DPO_LIGHTNING_LIFELINE"
"""Environment variable with the file descriptor to read from."""


_GRACE_SECONDS = 30.0


def watch_lifeline() -> None:
    """Stops this process and those it started when the sweep that started it is gone.

    Does nothing outside a sweep. A sweep that ends by itself has ended its trials before.
    """
    descriptor = os.environ.pop(LIFELINE, None)
    if descriptor is None:
        return

    def wait() -> None:
        while os.read(int(descriptor), 1):
            pass  # nothing is ever written: only its end counts
        os.killpg(os.getpgrp(), signal.SIGTERM)
        # Ranks may wait for each other; nobody is left to look after them.
        time.sleep(_GRACE_SECONDS)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()
