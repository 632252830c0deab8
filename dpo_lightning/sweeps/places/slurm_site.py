"""Settings of `hydra/launcher=slurm`, and the resources of a trial's job."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.settings.program import SOURCE
from dpo_lightning.sweeps.places.base import (
    Demand,
    Place,
    Work,
    check_counts,
    check_texts,
    require_extra,
)
from dpo_lightning.sweeps.places.slurm_jobs import JobTerms, SlurmJobs
from dpo_lightning.sweeps.trials import Plan

_LEAST = {"timeout_min": 1, "cpus_per_task": 1, "max_parallel": 1}
_OWN_OPTIONS = {
    "partition": "hydra.launcher.partition",
    "account": "hydra.launcher.account",
    "qos": "hydra.launcher.qos",
    "constraint": "hydra.launcher.constraint",
    "time": "hydra.launcher.timeout_min",
    "signal": "hydra.launcher.signal_delay_s",
    "cpus_per_task": "hydra.launcher.cpus_per_task",
    "mem": "hydra.launcher.mem_gb",
    "gpus_per_node": "hydra.launcher.gpus_per_node",
    "nodes": "trainer.num_nodes",
    "ntasks": "trainer.devices",
    "ntasks_per_node": "trainer.devices",
    "job_name": "the launcher",
    "array": "the launcher",
    "output": "the launcher",
    "error": "the launcher",
    "open_mode": "the launcher",
    "chdir": "the launcher",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmQueue:
    """Queue of the jobs; see sbatch."""

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmLimits:
    """Time and hardware of a job.

    Attributes:
        timeout_min: Time limit of a job, minutes.
        signal_delay_s: How long before it a trial is told, seconds.
        max_timeouts: How often a trial that reached the limit is queued again.
        cpus_per_task: CPU cores of each process.
        mem_gb: Memory of each node.
        gpus_per_node: GPUs of each node; None: by the trial.
    """

    timeout_min: int
    signal_delay_s: int
    max_timeouts: int
    cpus_per_task: int | None
    mem_gb: float | None
    gpus_per_node: int | None


class SlurmSite:
    """A SLURM cluster; the keys are those of ``SlurmLauncherConf``.

    Args:
        cluster: ``slurm``, or ``local`` for processes of this machine.
        queue: Where jobs wait.
        limits: Time and hardware of a job.
        setup: Shell commands before the trial.
        additional_parameters: Other options of sbatch.
        max_parallel: Jobs in the queue at once.
        max_failures: After more failed trials than this no other is started; None: all are.
        retries: How often a trial that crashed is started again.
    """

    def __init__(
        self,
        *,
        cluster: str,
        queue: SlurmQueue,
        limits: SlurmLimits,
        setup: Sequence[str],
        additional_parameters: Mapping[str, Any],
        max_parallel: int | None,
        max_failures: int | None,
        retries: int,
    ) -> None:
        self.cluster = cluster
        self.max_failures = max_failures
        self.retries = retries
        self._names: dict[str, str | None] = asdict(queue)
        self._counts: dict[str, float | None] = {
            **asdict(limits),
            "max_parallel": max_parallel,
            "max_failures": max_failures,
            "retries": retries,
        }
        self._setup = list(setup)
        self._additional = dict(additional_parameters)

    @classmethod
    def of(cls, **options: Any) -> SlurmSite:
        """The site that the keys of ``hydra.launcher`` describe."""

        def taken(kind: type[SlurmQueue] | type[SlurmLimits]) -> dict[str, Any]:
            return {item.name: options.pop(item.name) for item in fields(kind)}

        queue, limits = SlurmQueue(**taken(SlurmQueue)), SlurmLimits(**taken(SlurmLimits))
        return cls(queue=queue, limits=limits, **options)

    def check(self) -> None:
        """Checks the launcher's own settings.

        Raises:
            UserError: Naming the first thing that is wrong.
        """
        if self.cluster not in ("slurm", "local"):
            raise UserError(f"hydra.launcher.cluster={self.cluster}: must be slurm or local")
        check_counts(self._counts, dict.fromkeys(self._counts, 0) | _LEAST)
        check_texts(self._names, self._names)
        mem_gb = self._counts["mem_gb"]
        if mem_gb is not None and mem_gb <= 0:
            raise UserError(f"hydra.launcher.mem_gb={mem_gb}: must be a number > 0")
        minutes, seconds = self._counts["timeout_min"], self._counts["signal_delay_s"]
        assert minutes is not None
        assert seconds is not None
        if seconds >= 60 * minutes:
            raise UserError(
                f"hydra.launcher.signal_delay_s={seconds}: must be less than "
                f"hydra.launcher.timeout_min={minutes} minutes"
            )
        self._check_additional()
        if self.cluster == "local" and self._setup:
            raise UserError(
                f"hydra.launcher.setup={self._setup}: is for cluster=slurm; run it in this shell"
            )

    def _check_additional(self) -> None:
        for key, value in self._additional.items():
            name = key.replace("-", "_")
            if name in _OWN_OPTIONS:
                raise UserError(
                    f"hydra.launcher.additional_parameters.{key}={value}: "
                    f"{_OWN_OPTIONS[name]} decides it"
                )
            if not isinstance(value, str | int | float):
                raise UserError(
                    f"hydra.launcher.additional_parameters.{key}={value}: must be a text, a number "
                    "or true"
                )

    def check_trials(self, demands: Sequence[Demand]) -> None:
        """Checks what is known here; whether the nodes have the devices is for SLURM to say.

        Raises:
            UserError: If a trial would never fit, or jobs cannot be submitted from here.
        """
        wide = max((demand.nodes for demand in demands), default=1)
        if self.cluster == "local" and wide > 1:
            raise UserError(
                f"trainer.num_nodes={wide}: hydra.launcher.cluster=local is this machine; use "
                "trainer.num_nodes=1"
            )
        require_extra("submitit", "slurm", "hydra/launcher=slurm")
        if self.cluster == "slurm" and not all(map(shutil.which, ("sbatch", "srun"))):
            raise UserError(
                "hydra/launcher=slurm: there is no sbatch here; run it on a login node, or try it "
                "out with hydra.launcher.cluster=local"
            )

    def kind(self, accelerator: str) -> DeviceKind:
        """GPUs, unless the trial says that it wants none."""
        return "cpu" if accelerator == "cpu" else "cuda"

    @contextmanager
    def open(self, work: Work) -> Iterator[Place]:
        """Jobs are submitted from now on."""
        most = self._counts["max_parallel"]
        if most is None and self.cluster == "local":
            most = 1  # nothing keeps the processes of this machine off each other's devices
        threads = self._counts["cpus_per_task"]
        terms = JobTerms(
            on_slurm=self.cluster == "slurm",
            max_timeouts=int(self._counts["max_timeouts"] or 0),
            max_parallel=None if most is None else int(most),
            threads=None if threads is None else int(threads),
            parameters=self.parameters,
        )
        yield SlurmJobs(terms, work)

    def parameters(self, plan: Plan) -> dict[str, Any]:
        """Resources of a trial's job, in the words of submitit's executor.

        One task per device: Lightning takes the ranks from SLURM.
        """
        counts = self._counts
        gpus = counts["gpus_per_node"]
        if gpus is None:
            gpus = plan.width if plan.accelerator in ("auto", "gpu", "cuda") else 0
        shared = {
            "name": plan.name,
            "timeout_min": counts["timeout_min"],
            "mem_gb": counts["mem_gb"],
            "nodes": plan.nodes,
            "cpus_per_task": counts["cpus_per_task"],
            "gpus_per_node": gpus or None,
            "tasks_per_node": plan.width if self.cluster == "slurm" else 1,
        }
        if self.cluster == "local":
            return shared
        own: dict[str, Any] = {**self._names, "signal_delay_s": counts["signal_delay_s"]}
        of_clone = [] if SOURCE is None else [f"PYTHONPATH={shlex.quote(SOURCE)}:$PYTHONPATH"]
        own["setup"] = [*(f"export {line}" for line in of_clone), *self._setup]
        own["additional_parameters"] = self._additional or None
        return shared | {f"slurm_{name}": value for name, value in own.items()}
