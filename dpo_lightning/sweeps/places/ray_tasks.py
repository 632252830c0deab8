"""Trials as tasks of Ray, which chooses their nodes and replaces lost ones.

A task runs its trial as a process of its own, which dies with Ray's worker. Imports neither torch
nor, before a sweep, Ray.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.sweeps.places.base import (
    Attempt,
    Demand,
    Ending,
    Place,
    Work,
    check_counts,
    check_texts,
    require_extra,
)
from dpo_lightning.sweeps.places.claims import ClaimReader, give_order, withdraw_order
from dpo_lightning.sweeps.places.runner import make_order, run_order
from dpo_lightning.sweeps.trials import Plan, Trial

log = logging.getLogger(__name__)

# Of a cluster that is started for a sweep: only exit codes go through it.
_OBJECT_STORE_BYTES = 100_000_000
_ANSWER_SECONDS = 10.0


class RaySite:
    """A Ray cluster; the keys are those of ``RayLauncherConf``.

    Args:
        address: ``auto``, ``local``, or where it is; None is ``auto``.
        cpus_per_device: CPU cores that each device of a trial takes.
        node_retries: Number of times that Ray starts a trial again whose node was lost.
        max_parallel: Tasks that are with Ray at once; None: all.
        max_failures: After more failed trials than this no other is started; None: all are.
        retries: Number of times that a trial that crashed is started again.
    """

    def __init__(
        self,
        *,
        address: str | None,
        cpus_per_device: int,
        node_retries: int,
        max_parallel: int | None,
        max_failures: int | None,
        retries: int,
    ) -> None:
        self.address = address
        self.cpus_per_device = cpus_per_device
        self.node_retries = node_retries
        self.max_parallel = max_parallel
        self.max_failures = max_failures
        self.retries = retries

    def check(self) -> None:
        """Checks the launcher's own settings.

        Raises:
            UserError: Naming the first thing that is wrong.
        """
        least = {"node_retries": 0, "max_failures": 0, "retries": 0}
        check_counts(vars(self), {"cpus_per_device": 1, "max_parallel": 1} | least)
        check_texts(vars(self), ["address"])

    def check_trials(self, demands: Sequence[Demand]) -> None:
        """Checks the demands as far as possible here; the devices of the nodes are not known.

        Raises:
            UserError: If a trial would never fit, or Ray is not installed.
        """
        for demand in demands:
            if demand.nodes > 1:
                raise UserError(
                    f"trainer.num_nodes={demand.nodes}: a task of Ray has one node; use "
                    "trainer.num_nodes=1, or hydra/launcher=slurm"
                )
        require_extra("ray", "ray", "hydra/launcher=ray")

    def kind(self, accelerator: str) -> DeviceKind:
        """Returns GPUs, unless the trial wants none."""
        return "cpu" if accelerator == "cpu" else "cuda"

    @contextmanager
    def open(self, work: Work) -> Iterator[Place]:
        """Connects to the cluster, or starts one for the time of the sweep.

        Raises:
            UserError: If there is none where the settings name one, or a trial does not fit.
        """
        handler = signal.getsignal(signal.SIGTERM)
        ray, is_own = _connect(self.address)
        try:
            place = RayTasks(
                ray,
                work,
                cpus_per_device=self.cpus_per_device,
                node_retries=self.node_retries,
                max_parallel=self.max_parallel,
            )
            for plan in work.plans:
                place.check_room(plan, is_own=is_own)
            yield place
        finally:
            ray.shutdown()
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there


def _connect(address: str | None) -> tuple[Any, bool]:
    """Connects to Ray; returns it, and True if the cluster was started here."""
    # Read when Ray is imported.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # The runner hides GPUs itself.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    named, key = address, "hydra.launcher.address"
    if address in (None, "auto"):
        named, key = os.environ.get("RAY_ADDRESS") or None, "RAY_ADDRESS"
    ray: Any = importlib.import_module("ray")
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if named is None:
        named = _running_here()
    if named not in (None, "local"):
        try:
            _check_answer(str(named))
            ray.init(address=named, **options)
            return ray, False
        except Exception as error:  # of many kinds: no answer, another version, a bad address
            raise UserError(
                f"{key}={named}: no Ray cluster can be joined there ({_line(error)}); "
                "hydra.launcher.address=local starts one here"
            ) from error
    ray.init(
        address="local",
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        **options,
    )
    return ray, True


def _running_here() -> str | None:
    """The address of a cluster that this machine belongs to."""
    # Ray's public way is to try and join it, which takes minutes where a killed one left its
    # address behind.
    services: Any = importlib.import_module("ray._private.services")
    try:
        address = str(services.canonicalize_bootstrap_address("auto"))
        _check_answer(address)
    except OSError:
        return None
    return address


def _check_answer(address: str) -> None:
    """Checks that somebody listens there: Ray itself would try for minutes.

    Raises:
        OSError: If nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()


def _line(error: BaseException) -> str:
    """The first line of an exception's message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


class RayTasks:
    """Place that gives trials to Ray.

    Args:
        ray: The module, connected.
        work: Their sweep.
        cpus_per_device: CPU cores that each device of a trial takes.
        node_retries: Number of times that Ray starts a trial again whose node was lost.
        max_parallel: Tasks that are with Ray at once; None: all.
    """

    grace_seconds = 30.0

    def __init__(
        self,
        ray: Any,
        work: Work,
        *,
        cpus_per_device: int,
        node_retries: int,
        max_parallel: int | None,
    ) -> None:
        self._ray = ray
        self._work = work
        self._cpus_per_device = cpus_per_device
        self._node_retries = node_retries
        self._max_parallel = max_parallel
        self._run_order = ray.remote(run_order)
        self._tasks = 0

    def needs(self, plan: Plan) -> dict[str, int]:
        """Resources of a trial; with ``trainer.accelerator=auto``, GPUs if the cluster has any."""
        wants_gpus = plan.accelerator in ("gpu", "cuda") or (
            plan.accelerator == "auto" and bool(self._ray.cluster_resources().get("GPU"))
        )
        return {
            "num_cpus": plan.width * self._cpus_per_device,
            "num_gpus": plan.width if wants_gpus else 0,
        }

    def check_room(self, plan: Plan, *, is_own: bool) -> None:
        """Checks that there is a node on which a trial fits; a cluster may grow, our own does not.

        Raises:
            UserError: If there never will be.
        """
        needs = self.needs(plan)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        for node in nodes:
            if all(node.get(name[4:-1].upper(), 0) >= count for name, count in needs.items()):
                return
        wanted = f"{needs['num_gpus']} GPUs and {needs['num_cpus']} CPU cores"
        if is_own:
            [node] = nodes
            there = f"{node.get('GPU', 0):g} and {node.get('CPU', 0):g}"
            raise UserError(
                f"trainer.devices={plan.width}: a trial takes {wanted}, this machine has {there}"
            )
        log.warning("no node of the Ray cluster has %s yet: %s waits", wanted, plan.name)

    def fits(self, trial: Trial) -> bool:
        """True if one more task may be with Ray; Ray decides which of them runs."""
        return self._max_parallel is None or self._tasks < self._max_parallel

    def find(self, trial: Trial) -> Attempt | None:
        """Returns None: Ray ends the tasks of a sweep that is gone."""
        return None

    def start(self, trial: Trial) -> Attempt:
        """Gives a trial to Ray."""
        attempt = give_order(trial.folder)
        order = make_order(
            trial,
            self._work,
            attempt=attempt,
            threads=self._cpus_per_device,
            max_starts=self._node_retries + 1,
        )
        task = self._run_order.options(
            name=trial.folder.name, max_retries=self._node_retries, **self.needs(trial.plan)
        ).remote(order)
        self._tasks += 1
        return _RayAttempt(self, self._ray, task, trial.folder, attempt)

    def forget(self) -> None:
        """Notes that a task is over."""
        self._tasks -= 1


class _RayAttempt:
    def __init__(self, tasks: RayTasks, ray: Any, task: Any, folder: Path, attempt: str) -> None:
        self._tasks = tasks
        self._ray = ray
        self._task = task
        self._folder = folder
        self._reader = ClaimReader(folder, attempt)
        self._ending: Ending | None = None

    @property
    def labels(self) -> list[str]:
        return list(self._reader.look().get("devices", ["ray"]))

    def starts(self) -> int:
        return int(self._reader.look().get("starts", 0))

    def ending(self) -> Ending | None:
        if self._ending is None:
            ready, _ = self._ray.wait([self._task], timeout=0)
            if not ready:
                return None
            self._ending = self._outcome()
            self._reader.look(now=True)
            self._tasks.forget()
        return self._ending

    def _outcome(self) -> Ending:
        errors = self._ray.exceptions
        try:
            code = int(self._ray.get(self._task))
        except errors.TaskCancelledError:
            return Ending(None, "its task was cancelled", final=True)
        except errors.RayTaskError as error:
            return Ending(None, f"its task failed: {_line(error.cause) or error.cause!r}")
        except errors.RayError as error:
            return Ending(None, f"Ray lost it: {type(error).__name__}: {_line(error)}")
        claim = self._reader.look(now=True)
        if claim.get("state") == "ended":
            return Ending(claim.get("exit_code"), claim.get("reason"))
        return Ending(code)

    def ask(self) -> None:
        withdraw_order(self._folder)
        self._ray.cancel(self._task)

    def kill(self) -> Ending:
        self._ray.cancel(self._task, force=True)
        deadline = time.monotonic() + 10
        while (ending := self.ending()) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return ending or Ending(None, "it did not stop when asked to", final=True)
