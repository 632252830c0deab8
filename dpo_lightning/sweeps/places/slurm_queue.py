"""SLURM's queue: the jobs that squeue knows, and their states. Imports no submitit."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpo_lightning.errors import UserError
from dpo_lightning.sweeps.places.claims import order

log = logging.getLogger(__name__)

# States of a job that may still run, beside those in which it does.
_ALIVE = (
    *("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "STAGE_OUT", "SUSPENDED", "STOPPED"),
    *("REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "SIGNALING", "SPECIAL_EXIT", "READY"),
)
_NAME_LENGTH = 200
# How long sbatch may be at work after the command that called it is gone.
_SUBMISSION_SECONDS = 60.0
# How long squeue may give no answer when there is no other way to know.
_SILENCE_SECONDS = 120.0
_POLL_SECONDS = 1.0


class QueuedJob(NamedTuple):
    """A job as squeue lists it."""

    number: str
    state: str
    name: str


def job_name(trial: str, attempt: str) -> str:
    """The name of the job of an order, by which it is found though nobody noted its number."""
    return f"{trial[:_NAME_LENGTH]}.{attempt}"


def is_alive(state: str) -> bool:
    """True if a job in this state runs or may run."""
    return state.partition(" ")[0] in (*_ALIVE, "UNKNOWN")


def queue() -> list[QueuedJob] | None:
    """This user's jobs, those that ended lately too; None where squeue does not answer."""
    command = ["squeue", "--noheader", "--states=all", "--me", "--format=%i %T %j"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = [line.split(maxsplit=2) for line in said.stdout.splitlines()]
    return [QueuedJob(*line) for line in lines if len(line) == 3]


def queue_states(states: Mapping[str, str]) -> dict[str, str]:
    """Asks squeue about jobs that sacct knows nothing of: not all clusters keep accounts."""
    jobs = queue()
    if jobs is None:
        return dict(states)
    known = {job.number: job.state for job in jobs}
    return {
        number: known.get(number, "GONE") if state == "UNKNOWN" else state
        for number, state in states.items()
    }


def find_number(folder: Path) -> str | None:
    """Finds the number of the job that carries out a folder's order, if nobody noted it.

    The command that gave the order may have been killed before sbatch answered it. Then sbatch
    may even be at work still, so a young order is looked for until it has some age.

    Raises:
        UserError: If squeue does not answer.
    """
    given = order(folder)
    begin = time.monotonic()
    until = begin + _seconds_left(given)
    has_said = False
    while True:
        jobs = queue()
        now = time.monotonic()
        number = _number(jobs, given["attempt"])
        if number is not None:
            return number
        if jobs is not None and now >= until:
            return None
        if jobs is None and now >= begin + _SILENCE_SECONDS:
            raise UserError(
                f"hydra/launcher=slurm: squeue does not answer, and {folder.name} may be in the "
                "queue already; run the command again when it answers"
            )
        if not has_said:
            log.warning("%s may have been submitted already: looking for its job", folder.name)
            has_said = True
        time.sleep(_POLL_SECONDS)


def cancel_named(attempt: str) -> None:
    """Cancels the job of an order, if SLURM answers."""
    number = _number(queue(), attempt)
    if number is not None:
        with contextlib.suppress(OSError):
            subprocess.call(["scancel", number])


def _number(jobs: Iterable[QueuedJob] | None, attempt: str) -> str | None:
    return next((job.number for job in jobs or () if job.name.endswith(attempt)), None)


def _seconds_left(given: Mapping[str, Any]) -> float:
    """Seconds that the submission of an order may still take, whatever the clocks say."""
    age = time.time() - float(given.get("given", 0.0))
    return min(max(_SUBMISSION_SECONDS - age, 0.0), _SUBMISSION_SECONDS)
