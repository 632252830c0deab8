"""Names of runs, trials and kinds of device."""

import hashlib
import re
from typing import Literal

DeviceKind = Literal["cuda", "mps", "cpu"]

LONGEST_NAME = 80


def slug(text: str) -> str:
    """The text as one plain folder name: 1 to 80 of ``A-Z a-z 0-9 . _ -``, never hidden.

    Example:
        >>> slug("../../my run"), slug("..")
        ('my-run', 'run')
    """
    cleaned = re.sub(r"[^A-Za-z0-9._-]+", "-", text).lstrip(".-")[:LONGEST_NAME].rstrip(".-")
    return cleaned or "run"


def run_name(name: str | None, model: str, loss: str, beta: float) -> str:
    """The last part of a run's folder name, for ``hydra.run.dir``.

    Example:
        >>> run_name(None, "llama", "sigmoid", 0.1)
        'llama-sigmoid-beta-0.1'
    """
    return slug(f"{model}-{loss}-beta-{beta:g}" if name is None else name)


def trial_name(overrides: str, number: int) -> str:
    """The folder name of one trial of a sweep, for ``hydra.sweep.subdir``.

    Where making a slug loses something, a hash of the whole keeps two trials apart.

    Example:
        >>> trial_name("beta-0.1_seed-1", 0), trial_name("", 3)
        ('beta-0.1_seed-1', '3')
    """
    if not overrides:
        return str(number)
    name = slug(overrides)
    if name == overrides:
        return name
    digest = hashlib.sha256(overrides.encode()).hexdigest()[:8]
    return f"{name[: LONGEST_NAME - 9]}-{digest}"
