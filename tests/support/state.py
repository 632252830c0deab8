"""State of this process that a call from Python has to leave as it was."""

import logging
import os
import random
import signal
import sys
import warnings
from pathlib import Path
from typing import Any


def state() -> dict[str, Any]:
    """All of it by name, as values that can be compared."""
    import numpy as np
    import torch

    loggers = {
        name: (logger.level, tuple(map(id, logger.handlers)), logger.disabled)
        for name, logger in [*logging.Logger.manager.loggerDict.items(), ("", logging.getLogger())]
        if isinstance(logger, logging.Logger)
    }
    open_files = {
        str(own.readlink()) for own in Path("/proc/self/fd").iterdir() if own.is_symlink()
    }
    return {
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "environment": dict(os.environ),
        "loggers": loggers,
        "filters": list(warnings.filters),
        "threads": torch.get_num_threads(),
        "deterministic": (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            torch.backends.cudnn.benchmark,
        ),
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),
        "random": random.getstate(),
        "folder": Path.cwd(),
        "words": list(sys.argv),
        "path": list(sys.path),
        # A library's own file, such as a font, is closed when its reader is collected.
        "files": {n for n in open_files if "/proc/" not in n and "/site-packages/" not in n},
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
    }


def changed(before: dict[str, Any]) -> dict[str, Any]:
    """Parts that are not as they were, each with its values before and now."""
    now = state()
    # New loggers, of modules that were imported, change nothing.
    now["loggers"] = {name: now["loggers"].get(name) for name in before["loggers"]}
    return {name: (own, now[name]) for name, own in before.items() if own != now[name]}
