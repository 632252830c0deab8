"""Trials as SLURM jobs, submitted by submitit. Imports neither torch nor, before a sweep, submitit.

Each task of a job runs :class:`TrialJob`, which runs the trial as a process of its own; how that
ended stands in the trial's folder. SLURM is asked only about jobs that say nothing.
"""

from __future__ import annotations

import math
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.settings.program import importing
from dpo_lightning.sweeps.places.base import Attempt, Ending, Work
from dpo_lightning.sweeps.places.claims import (
    ClaimReader,
    claim_of,
    give_order,
    note_job,
    order,
    withdraw_order,
)
from dpo_lightning.sweeps.places.runner import Order, Runner, make_order
from dpo_lightning.sweeps.places.slurm_queue import (
    cancel_named,
    find_number,
    is_alive,
    job_name,
    queue_states,
)
from dpo_lightning.sweeps.trials import Plan, Trial

JOBS_DIR = ".submitit"
"""Below the sweep's folder: what submitit writes of each job."""

_STATE_SECONDS = 20.0
_STATE_SECONDS_STOPPING = 4.0
# How long a job may be over before what it wrote is seen here, and how long one that lost its node
# may take to be queued again by SLURM itself.
_LATE_SECONDS = 15.0
_REQUEUE_SECONDS = 180.0
_HINTS = {
    "OUT_OF_MEMORY": "; give it more with hydra.launcher.mem_gb=<GB>",
    "TIMEOUT": "; give it more with hydra.launcher.timeout_min=<minutes>",
}


@dataclass(frozen=True, slots=True)
class JobTerms:
    """Terms on which jobs are submitted.

    Attributes:
        on_slurm: True submits to SLURM; False starts processes of this machine.
        max_timeouts: Number of times that a trial that reached its time limit is queued again.
        max_parallel: Jobs in the queue at once; None: all.
        threads: CPU threads of each process; None: by the node.
        parameters: Resources of a trial's job, in the words of submitit's executor.
    """

    on_slurm: bool
    max_timeouts: int
    max_parallel: int | None
    threads: int | None
    parameters: Callable[[Plan], Mapping[str, Any]]


class TrialJob:
    """The work of one task of a job; it is sent by its import name and plain values.

    Args:
        order: The trial.
    """

    def __init__(self, order: Order) -> None:
        self._order = order
        self._runner: Runner | None = None

    def __call__(self) -> int:
        """Runs the trial to its end; returns its exit code."""
        on_slurm = os.environ.get("SUBMITIT_EXECUTOR") == "slurm"
        rank = int(os.environ.get("SLURM_PROCID", "0")) if on_slurm else 0
        run = None
        if on_slurm:
            # The same for all tasks, another one when SLURM has queued the job again.
            run = ".".join(os.environ.get(f"SLURM_{n}", "0") for n in ("JOB_ID", "RESTART_COUNT"))
        runner = self._runner = Runner(self._order, run=run, rank=rank)
        # submitit lets SIGTERM pass; but it is all that cancelled and preempted jobs are told.
        signal.signal(signal.SIGTERM, _exit_143)
        if rank > 0:
            # submitit acts on its signal in the first task alone, and all ranks have to end.
            signal.signal(signal.SIGUSR2, lambda *_: runner.stop(signal.SIGTERM))
        return runner.run()

    def checkpoint(self) -> Any:
        """Ends the trial, at its time limit or for a preemption, so that the job may go on later.

        Called by submitit, in the handler of its signal.
        """
        from submitit.helpers import DelayedSubmission

        if self._runner is not None:
            self._runner.stop(signal.SIGTERM)
        return DelayedSubmission(TrialJob(self._order))


def _exit_143(signum: int, frame: object) -> None:
    raise SystemExit(143)


class SlurmJobs:
    """Place that submits trials as jobs.

    Args:
        terms: Terms of the submission.
        work: Their sweep.
    """

    grace_seconds = 60.0

    def __init__(self, terms: JobTerms, work: Work) -> None:
        import submitit

        self._terms = terms
        self._work = work
        self._jobs: dict[str, Any] = {}
        self._states: dict[str, str] = {}
        self._asked = -math.inf
        self._folder = (work.folder / JOBS_DIR).absolute()
        self._executor: Any
        if terms.on_slurm:
            self._executor = submitit.AutoExecutor(
                self._folder, cluster="slurm", slurm_max_num_timeout=terms.max_timeouts
            )
        else:
            self._executor = submitit.LocalExecutor(
                self._folder, max_num_timeout=terms.max_timeouts
            )

    def fits(self, trial: Trial) -> bool:
        """True if one more job may be in the queue."""
        most = self._terms.max_parallel
        return most is None or len(self._jobs) < most

    def find(self, trial: Trial) -> Attempt | None:
        """Finds the job of an earlier command that ended without it, and goes on with that job.

        Raises:
            UserError: If SLURM does not say whether there is one.
        """
        given = order(trial.folder)
        attempt = given.get("attempt")
        if not self._terms.on_slurm or not attempt:
            return None
        if claim_of(trial.folder, attempt).get("state") == "ended":
            return None
        number = given.get("job") or find_number(trial.folder)
        if number is None:
            return None
        from submitit import SlurmJob

        job: Any = SlurmJob(self._folder, number, tasks=range(trial.plan.width * trial.plan.nodes))
        found = self._follow(job, trial, attempt)
        if not is_alive(self.state(job, seconds=0)):
            self.forget(job)
            return None
        if not given.get("job"):
            note_job(trial.folder, attempt, number)
        return found

    def start(self, trial: Trial) -> Attempt:
        """Submits the job of a trial.

        The order is written first and the job has its name, so that a command that is killed at
        any moment leaves no job that the next one would not find.

        Raises:
            UserError: If SLURM does not take it.
        """
        attempt = give_order(trial.folder)
        order = make_order(
            trial,
            self._work,
            attempt=attempt,
            threads=self._terms.threads,
            max_starts=None,
        )
        asked = {k: v for k, v in self._terms.parameters(trial.plan).items() if v is not None}
        try:
            if self._terms.on_slurm:
                job = self._submit_named(TrialJob(order), attempt, asked)
                note_job(trial.folder, attempt, job.job_id)
            else:
                self._executor.update_parameters(**asked)
                job = _submit(self._executor, TrialJob(order))
        except BaseException:
            self._disown(trial.folder, attempt)
            raise
        return self._follow(job, trial, attempt)

    def _submit_named(self, function: TrialJob, attempt: str, asked: dict[str, Any]) -> Any:
        """Submits a job that needs nothing more from this process to be found and to run.

        submitit gives a job's file its name when sbatch has answered; a job whose command was
        killed before that would wait for it in vain, and takes a copy of its own.
        """
        from submitit.helpers import DelayedSubmission

        sent = self._folder / f"{attempt}.pkl"
        sent.parent.mkdir(parents=True, exist_ok=True)
        submission = DelayedSubmission(function)
        submission.set_timeout(asked["timeout_min"], self._terms.max_timeouts)
        submission.dump(sent)
        needed = f'{shlex.quote(str(self._folder))}/"${{SLURM_JOB_ID}}_submitted.pkl"'
        take = f"[ -e {needed} ] || cp {shlex.quote(str(sent))} {needed}"
        asked["name"] = job_name(asked["name"], attempt)
        asked["slurm_setup"] = [take, *asked["slurm_setup"]]
        self._executor.update_parameters(**asked)
        job = _submit(self._executor, function)
        sent.unlink(missing_ok=True)
        return job

    def _disown(self, folder: Path, attempt: str) -> None:
        """Cancels a job that may be in the queue though its submission failed."""
        withdraw_order(folder)
        if self._terms.on_slurm:
            cancel_named(attempt)

    def _follow(self, job: Any, trial: Trial, attempt: str) -> Attempt:
        self._jobs[job.job_id] = job
        return _SlurmAttempt(self, job, trial.folder, attempt, on_slurm=self._terms.on_slurm)

    def forget(self, job: Any) -> None:
        """Notes that the job is over."""
        self._jobs.pop(job.job_id, None)

    def state(self, job: Any, *, seconds: float) -> str:
        """The state of a job, as SLURM said when it was last asked about all of them.

        Args:
            job: The job.
            seconds: After how long it is asked again.

        Returns:
            One of SLURM's words, such as ``CANCELLED by 1000``; ``GONE`` for a job that nobody
            knows, ``UNKNOWN`` where nobody answers.
        """
        now = time.monotonic()
        if now - self._asked >= seconds:
            self._asked = now
            job.watcher.update()  # sacct, for all that submitit knows
            states = {name: str(job.watcher.get_state(name, mode="cache")) for name in self._jobs}
            if "UNKNOWN" in states.values():
                states = queue_states(states)
            self._states = states
        return self._states.get(job.job_id, "UNKNOWN")


def _submit(executor: Any, function: TrialJob) -> Any:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    before = os.environ.get("PYTHONPATH")
    found = importing(os.environ).get("PYTHONPATH")
    if found is not None:
        os.environ["PYTHONPATH"] = found
    try:
        return executor.submit(function)
    except (FailedJobError, FailedSubmissionError, subprocess.CalledProcessError) as error:
        said = " ".join(str(getattr(error, "stderr", None) or error).split())
        raise UserError(f"hydra/launcher=slurm: sbatch refused the job: {said}") from error
    finally:
        if before is None:
            os.environ.pop("PYTHONPATH", None)
        else:
            os.environ["PYTHONPATH"] = before


class _SlurmAttempt:
    def __init__(
        self, jobs: SlurmJobs, job: Any, folder: Path, attempt: str, *, on_slurm: bool
    ) -> None:
        self._jobs = jobs
        self._job = job
        self._folder = folder
        self._reader = ClaimReader(folder, attempt)
        self._on_slurm = on_slurm
        self._over_since: float | None = None
        self._over: Ending | None = None
        self._stopping = False

    @property
    def labels(self) -> list[str]:
        name = "slurm" if self._on_slurm else "job"
        return [f"{name}:{self._job.job_id}", *self._reader.look().get("devices", [])]

    def starts(self) -> int:
        return int(self._reader.look().get("starts", 0))

    def ending(self) -> Ending | None:
        ending = self._said() or self._vanished()
        if ending is not None:
            self._jobs.forget(self._job)
        return ending

    def _said(self) -> Ending | None:
        claim = self._reader.look()
        if claim.get("state") != "ended":
            return None
        return Ending(claim.get("exit_code"), claim.get("reason"))

    def _vanished(self) -> Ending | None:
        """The end of a job whose trial said nothing, once that is certain."""
        if self._on_slurm:
            seconds = _STATE_SECONDS_STOPPING if self._stopping else _STATE_SECONDS
            state = self._jobs.state(self._job, seconds=seconds)
            alive = is_alive(state)
        else:
            alive, state = not self._job.done(), "over"
        now = time.monotonic()
        if alive:
            self._over_since = None
            return None
        if self._over_since is None:
            self._over_since = now
        word = state.partition(" ")[0]
        queued_again = word in ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL") and not self._stopping
        wait = _REQUEUE_SECONDS if queued_again else _LATE_SECONDS if self._on_slurm else 2.0
        if now - self._over_since < wait:
            return None
        if self._on_slurm:
            self._job.cancel(check=False)  # SLURM must not bring it back
        self._reader.look(now=True)
        return self._said() or Ending(None, self._reason(state), final=word == "CANCELLED")

    def _reason(self, state: str) -> str:
        where = f"see {self._job.task(0).paths.stderr}"
        if not self._on_slurm:
            return f"its job {self._job.job_id} ended before the trial did; {where}"
        if state == "GONE":
            return f"SLURM no longer knows its job {self._job.job_id}; {where}"
        hint = _HINTS.get(state.partition(" ")[0], "")
        return f"SLURM: job {self._job.job_id} is {state}{hint}; {where}"

    def ask(self) -> None:
        self._stopping = True
        withdraw_order(self._folder)
        if self._on_slurm:
            self._job.cancel(check=False)

    def kill(self) -> Ending:
        self._job.cancel(check=False)
        if not self._on_slurm:
            deadline = time.monotonic() + 10
            while not self._job.done() and time.monotonic() < deadline:
                time.sleep(0.1)
        self._jobs.forget(self._job)
        return self._said() or Ending(None, "it did not stop when asked to", final=True)
