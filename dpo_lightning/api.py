"""The project from Python: train one experiment, and load the policy that a run made.

Importing this imports no torch.

Example:
    >>> from dpo_lightning.api import load, train
    >>> result = train(["beta=0.3", "trainer.max_steps=100"])  # doctest: +SKIP
    >>> policy, tokenizer = load(result.folder)  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_lightning.cli import folder_of_run
from dpo_lightning.errors import UserError
from dpo_lightning.files import RESULT_FILE
from dpo_lightning.processes.groups import signal_group
from dpo_lightning.processes.lifeline import LIFELINE, REASON
from dpo_lightning.run.finished import export_of
from dpo_lightning.settings.folders import hydra_override
from dpo_lightning.settings.program import RUN, STARTED_AS, importing, started_as

__all__ = ["Result", "load", "train"]

_MERGED = "model-merged"


@dataclass(frozen=True, slots=True)
class Result:
    """A run that has ended, as its ``result.json`` says.

    Attributes:
        folder: The run's folder.
        status: ``finished``, ``stopped``, ``diverged`` or ``failed``; of a trial that its sweep
            stopped early ``pruned``, or ``paused`` while that is not decided.
        exit_code: Of its process: 0 finished, 2 settings or data, 3 diverged, negative for the
            signal that killed it.
        error: Why it did not finish, on one line; None where it did.
        beta: Strength of the pull towards the reference.
        loss: The loss's name.
        seed: The seed.
        step: Optimizer steps completed.
        epoch: Passes over the training groups.
        exported_step: Step of the weights in ``model/``; None where nothing was exported.
        selection: ``monitor``, ``best``, ``best_step`` and ``stopped_early``; None where no metric
            selects checkpoints.
        resumed: From which checkpoint, at which step, with which changes; None if it began anew.
        metrics: The last value of every metric; None for one that is not finite. Those of
            evaluations and answers are of the exported step.
        signs: Signs of a training that went wrong: ``name``, ``values`` and what it ``says``.
        reference: Rows of the reference: ``rows``, ``computed``, ``cached``.
        throughput: Speeds and wall times.
        memory: Bytes, as estimated and as measured.
        model: ``name``, ``parameters``, ``trainable``.
        data: Counts of groups, and of what was dropped.
        versions: The versions that ran, by package.
        config_hash: Of what decides the numbers; None where it ended before that was known.
        settings_hash: Of the settings alone; None where it ended before they were known.
        basis: Model, reference, rows and judge that the numbers are of.
        command: What repeats it.
    """

    folder: Path
    status: str
    exit_code: int
    error: str | None = None
    beta: float | None = None
    loss: str | None = None
    seed: int | None = None
    step: int = 0
    epoch: float = 0.0
    exported_step: int | None = None
    selection: Mapping[str, Any] | None = None
    resumed: Mapping[str, Any] | None = None
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    signs: Sequence[Mapping[str, Any]] = ()
    reference: Mapping[str, Any] = field(default_factory=dict)
    throughput: Mapping[str, Any] = field(default_factory=dict)
    memory: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    config_hash: str | None = None
    settings_hash: str | None = None
    basis: Mapping[str, Any] = field(default_factory=dict)
    command: str | None = None


def train(overrides: Sequence[str] = ()) -> Result:
    """Runs one experiment to its end, in a process of its own, as ``dpo-lightning train`` does.

    An interrupt is passed on to the run, which saves itself before this raises it.

    Args:
        overrides: Settings such as ``"beta=0.3"``, and flags that say where config files are.

    Returns:
        What became of it; a run that diverges or fails is a result too.

    Raises:
        UserError: If a setting is wrong, or they are those of a sweep; then nothing was started.
    """
    folder = folder_of_run(overrides).absolute()
    before = _identity(folder / RESULT_FILE)
    code, reason = _run([*RUN, *overrides, hydra_override("run.dir", folder)])
    # With code 0 just this run had finished there before.
    if code and _identity(folder / RESULT_FILE) == before:
        how = f"exit code {code}" if code >= 0 else f"signal {-code}"
        error = reason or f"it ended before it could say why, by {how}"
        return Result(folder, "failed", code, error=error)
    found = json.loads((folder / RESULT_FILE).read_text())
    names = set(Result.__dataclass_fields__) - {"folder", "exit_code"}
    known = {name: value for name, value in found.items() if name in names}
    if code < 0:  # it had no time to say so
        known |= {"status": "failed", "error": f"killed by signal {-code}"}
    return Result(folder=folder, exit_code=code, **known)


def _identity(path: Path) -> tuple[int, int] | None:
    """Mark of a file that changes when it is written anew; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _run(arguments: Sequence[str]) -> tuple[int, str | None]:
    """Runs the interpreter to its end; it stops by itself when this process is gone.

    Returns:
        Its exit code, and the error that ended it where it named one.
    """
    lifeline, own_end = os.pipe()
    heard, reason = os.pipe()
    # What it has left behind may hold the other end.
    os.set_blocking(heard, False)
    told = {LIFELINE: str(lifeline), REASON: str(reason), STARTED_AS: started_as()}
    try:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=importing(os.environ) | told,
            stdin=subprocess.DEVNULL,
            pass_fds=[lifeline, reason],
            process_group=0,
        )
        while True:
            try:
                code = process.wait()
                break
            except BaseException as error:
                stop = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
                signal_group(process.pid, stop)
                process.wait()
                raise
        with contextlib.suppress(BlockingIOError):
            said = os.read(heard, 65_536).decode().splitlines()
            return code, said[-1] if said else None
        return code, None
    finally:
        for descriptor in (lifeline, own_end, heard, reason):
            os.close(descriptor)


def load(run: str | Path) -> tuple[Any, Any]:
    """Loads the policy that a run exported, and its tokenizer, in evaluation mode on the CPU.

    An adapter is loaded by PEFT onto the base model that the run started from.

    Args:
        run: The run's folder.

    Raises:
        UserError: If there is no such run, it left no export, or the export cannot be loaded.
    """
    folder = Path(run)
    export = export_of(folder)
    # Here, because they import torch.
    from dpo_lightning.models.adapter_files import CONFIG_FILE
    from dpo_lightning.models.loading import load_tokenizer

    is_adapter = (export / CONFIG_FILE).is_file()
    policy = _adapted(export, _settings(folder)) if is_adapter else _whole(str(export), "run")
    return policy.eval(), load_tokenizer(str(export), key="run", needs_eos=False)


def _settings(folder: Path) -> Mapping[str, Any]:
    """The ``model`` group of a run's own settings; empty where they were taken away."""
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text())["model"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(source: str, key: str, **options: Any) -> Any:
    """A model in the type that it is stored in, unless another is named."""
    import torch

    from dpo_lightning.models.loading import load_config, load_model

    dtype, overrides = options.pop("dtype", None), options.pop("overrides", None)
    config = load_config(source, key=key, overrides=overrides, **options)
    named = getattr(torch, dtype) if dtype else config.dtype or torch.float32
    return load_model(source, config, key=key, dtype=named, **options)


def _adapted(export: Path, settings: Mapping[str, Any]) -> Any:
    from dpo_lightning.assets import BUNDLED_MODEL
    from dpo_lightning.models.adapter_files import CONFIG_FILE, read_adapter
    from dpo_lightning.models.loading import load_onto

    base = read_adapter(str(export), key="run").base
    merged = export.parent / _MERGED
    if base is None and merged.is_dir():
        return _whole(str(merged), "run")
    if base is None:
        raise UserError(
            f"run={export.parent}: its adapter was trained beside random weights, which nobody "
            "kept; train with peft.merge=true"
        )
    is_bundled = Path(base).parts[-3:] == BUNDLED_MODEL.parts[-3:]
    model = _whole(
        str(BUNDLED_MODEL) if is_bundled else base,
        "model.pretrained",
        revision=json.loads((export / CONFIG_FILE).read_text()).get("revision"),
        dtype=settings.get("dtype"),
        overrides=settings.get("config_overrides"),
    )
    return load_onto(model, str(export), key="run")
