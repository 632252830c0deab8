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


def model_label(name: str, pretrained: str | None, config: str | None) -> str:
    """The name of a model: of the weights or the config that are loaded, else of its settings.

    Args:
        name: ``model.name``.
        pretrained: ``model.pretrained``.
        config: ``model.config``.

    Example:
        >>> model_label("llama", "Qwen/Qwen3-0.6B", None), model_label("llama", None, None)
        ('Qwen3-0.6B', 'llama')
        >>> model_label("llama", "outputs/runs/first/model", None)
        'first'
    """
    source = pretrained or config
    if source is None:
        return name
    parts = [part for part in source.split("/") if part not in ("", ".", "..", "~")]
    # The export of a run has its run's name; a config alone that of its folder.
    while len(parts) > 1 and parts[-1] in ("model", "model-merged", "config.json"):
        parts.pop()
    return parts[-1] if parts else name


def run_name(name: str | None, model: str, loss: str, beta: float, seed: int) -> str:
    """The name of a run that is none of a sweep, and the last part of its folder's.

    Args:
        name: The name that was set.
        model: From :func:`model_label`.
        loss: Name of the loss.
        beta: Strength of the pull towards the reference.
        seed: Of all that is drawn.

    Example:
        >>> run_name(None, "llama", "sigmoid", 0.1, 1)
        'llama-sigmoid-beta-0.1-seed-1'
    """
    if name is not None:
        return slug(name)
    return _before(model, f"{loss}-beta-{beta:g}-seed-{seed}")


def name_of_trial(trial: str, model: str, loss: str, beta: float, seed: int) -> str:
    """The name of a trial in loggers: its folder's, with model, loss, beta and seed.

    Args:
        trial: Name of its folder, which says what is swept.
        model: From :func:`model_label`.
        loss: Name of the loss.
        beta: Strength of the pull towards the reference.
        seed: Of all that is drawn.

    Example:
        >>> name_of_trial("beta-0.1_optimizer.lr-1e-05", "llama", "sigmoid", 0.1, 1)
        'llama-sigmoid-beta-0.1_optimizer.lr-1e-05-seed-1'
    """
    swept = {part.partition("-")[0] for part in trial.split("_")}
    parts = [] if "loss" in swept else [loss]
    parts += [trial] + ([] if "beta" in swept else [f"beta-{beta:g}"])
    return _before(model, "-".join(parts + ([] if "seed" in swept else [f"seed-{seed}"])))


def _before(model: str, rest: str) -> str:
    """A model's name, cut if need be, before all that tells runs of it apart."""
    rest = slug(rest)
    room = LONGEST_NAME - len(rest) - 1
    return slug(f"{slug(model)[:room]}-{rest}" if room > 0 else rest)


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
