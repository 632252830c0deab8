"""The trials of a sweep: the command, the folder and the outcome of each."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dpo_lightning.files import RESULT_FILE, read_json, write_json
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.settings.schema import LoggerConfig
from dpo_lightning.training.checkpoints.files import saved_checkpoints

TRIAL_FILE = "trial.json"
LOG_FILE = "trial.log"

Status = Literal[
    "waiting", "running", "paused", "pruned", "finished", "failed", "diverged", "stopped"
]


@dataclass(frozen=True, slots=True)
class SweepFacts:
    """A sweep as a whole.

    Attributes:
        folder: Its folder.
        named: True if the command itself names the folder, so that the same command finds it.
        metric: Metric that its report ranks by; None leaves it to the report.
        margin: Loss against the best that does not matter; None leaves it to the report.
        kl_budget: Largest KL of the report's pick; None sets no limit.
        logger: The loggers of its trials.
    """

    folder: Path
    named: bool
    metric: str | None
    logger: LoggerConfig
    margin: float | None = None
    kl_budget: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """One trial as it was composed and validated.

    Attributes:
        name: Its folder's name, made of the swept settings.
        overrides: The swept settings, such as ``("beta=0.1", "seed=1")``.
        arguments: Arguments of ``train`` to run it, without its folder.
        settings_hash: Of all settings and input files; a finished trial with it is not run again.
        kind: The device it runs on.
        width: Number of devices that it takes, of each node.
        nodes: Number of machines that it runs on at once.
        accelerator: ``trainer.accelerator``.
        facts: ``beta``, ``loss``, ``seed`` and ``command``, for a result that it cannot write.
        batch_size: Groups of a step, for the live view.
        memory: Settings that decide how much memory it takes, as one text.
    """

    name: str
    overrides: tuple[str, ...]
    arguments: tuple[str, ...]
    settings_hash: str
    kind: DeviceKind
    width: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int = 1
    nodes: int = 1
    accelerator: str = "auto"
    memory: str = ""


@dataclass(slots=True)
class Trial:
    """A trial and its state.

    Attributes:
        plan: The trial as it was composed.
        folder: Its folder.
        status: Its state, in a word.
        exit_code: Of the last attempt; negative for a signal, None while there is none.
        attempts: Number of times that this command started it.
        devices: Devices of the last attempt.
        error: Reason why it did not finish, on one line.
        skipped: True if it had finished before this command.
        metrics: The last metrics of its result.
        seconds: Wall time of its attempts in this command.
    """

    plan: Plan
    folder: Path
    status: Status = "waiting"
    exit_code: int | None = None
    attempts: int = 0
    devices: list[str] = field(default_factory=list)
    error: str | None = None
    skipped: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """True if the trial stopped before its end."""
        return self.status in ("failed", "diverged", "stopped")

    def save(self) -> None:
        """Writes ``trial.json``, by which a later command and the report know the trial."""
        write_json(
            self.folder / TRIAL_FILE,
            {
                "name": self.folder.name,
                "overrides": list(self.plan.overrides),
                "settings_hash": self.plan.settings_hash,
                "status": self.status,
                "exit_code": self.exit_code,
                "attempts": self.attempts,
                "devices": self.devices,
                "log": LOG_FILE,
            },
        )


def place_trials(plans: Iterable[Plan], sweep_dir: Path) -> list[Trial]:
    """Gives each trial its folder, and finds those that have finished already.

    A folder of that name with other settings, of an earlier command, is left alone: the trial gets
    its own, with a part of its hash behind the name. Equal trials are run once.

    Args:
        plans: The trials of one command.
        sweep_dir: The sweep's folder.
    """
    trials: dict[Path, Trial] = {}
    for plan in plans:
        candidates = [
            sweep_dir / plan.name,
            sweep_dir / f"{plan.name}-{plan.settings_hash[:8]}",
        ]
        owners = [_owner(folder, trials) for folder in candidates]
        if plan.settings_hash in owners:
            folder = candidates[owners.index(plan.settings_hash)]
        else:
            folder = candidates[0] if owners[0] is None else candidates[1]
        if folder not in trials:
            trials[folder] = as_left(Trial(plan, folder))
    return list(trials.values())


def _owner(folder: Path, trials: Mapping[Path, Trial]) -> str | None:
    """Hash of the trial that owns a folder; empty if something else does, None if nobody does."""
    if folder in trials:
        return trials[folder].plan.settings_hash
    for name in (TRIAL_FILE, RESULT_FILE):
        if (folder / name).exists():
            return str(read_json(folder / name).get("settings_hash", ""))
    return None


def as_left(trial: Trial) -> Trial:
    """The trial as an earlier command left it: finished, or still to be done."""
    result = read_json(trial.folder / RESULT_FILE)
    if (
        result.get("status") == "finished"
        and result.get("settings_hash") == trial.plan.settings_hash
    ):
        trial.status, trial.skipped = "finished", True
        trial.exit_code, trial.metrics = 0, result.get("metrics") or {}
    return trial


def judge(trial: Trial, exit_code: int | None, *, stopped: bool, reason: str | None = None) -> None:
    """Sets the outcome of an attempt that ended, and writes a ``result.json`` if there is none.

    Args:
        trial: The trial.
        exit_code: Of its process; negative for the signal that killed it, None when nobody saw it
            end.
        stopped: True if this command stopped it.
        reason: Known facts about an end that nobody saw.
    """
    path = trial.folder / RESULT_FILE
    result = read_json(path)
    trial.exit_code = exit_code
    trial.metrics = result.get("metrics") or {}
    said = result.get("status")
    # It says so last of all; what came after it, such as its machine's end, costs nothing.
    if said == "finished" and exit_code in (0, None):
        trial.status, trial.error = "finished", None
        return
    if exit_code is None:
        how = reason or "its process vanished"
    elif exit_code < 0:
        how = f"killed by signal {-exit_code}"
    elif exit_code == 0:
        how = "the process ended before the run had finished"
    else:
        how = f"ended with exit code {exit_code}"
    if said == "paused" and exit_code in (0, None):
        trial.status, trial.error = "paused", None
        return
    trial.error = (exit_code is None and reason) or result.get("error") or how
    if stopped or said == "stopped":
        trial.status = "stopped"
    else:
        trial.status = "diverged" if said == "diverged" else "failed"
    if said != trial.status:
        # Whatever ended it left it no time to say so.
        write_json(
            path,
            {
                "status": trial.status,
                "error": trial.error,
                "step": 0,
                "epoch": 0.0,
                "config_hash": None,
                "settings_hash": trial.plan.settings_hash,
                "metrics": {},
                "reference": {"rows": 0, "computed": 0, "cached": 0},
                "throughput": {"total_seconds": trial.seconds},
                **trial.plan.facts,
                **{k: v for k, v in result.items() if k not in ("status", "error")},
            },
        )
        # Here, because few trials come to it.
        from dpo_lightning.run.page.write import keep_run_page

        keep_run_page(trial.folder)


def trial_command(program: Sequence[str], arguments: Sequence[str], folder: Path) -> list[str]:
    """The command of a trial in Hydra's RUN mode, which resumes from a checkpoint if there is one.

    Args:
        program: Words behind the interpreter, ``-m dpo_lightning train``.
        arguments: The trial's settings.
        folder: Its folder.
    """
    escaped = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    return [
        *(sys.executable, *program, *arguments),
        *(f"hydra.run.dir='{escaped}'", "hydra.mode=RUN"),
        *(["resume=auto"] if saved_checkpoints(folder) else []),
    ]
