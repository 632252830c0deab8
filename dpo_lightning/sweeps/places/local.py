"""Trials as processes of this machine: one process group each, on leased devices.

The sweep holds one end of a pipe to each trial; when the sweep is gone, however it went, the trials
see the pipe close and stop. Imports no torch.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_lightning.errors import UserError
from dpo_lightning.memory.gpus import memory_of_gpus
from dpo_lightning.processes.groups import clear_group, signal_group
from dpo_lightning.processes.lifeline import LIFELINE
from dpo_lightning.processes.ownership import INHERITED_LOCK, LOCK_FILE
from dpo_lightning.processes.warm import Fork
from dpo_lightning.settings.names import DeviceKind
from dpo_lightning.settings.program import RUN, importing
from dpo_lightning.sweeps.places.base import Attempt, Demand, Ending, Place, Work, check_counts
from dpo_lightning.sweeps.places.claims import Taken, stop_other
from dpo_lightning.sweeps.places.leases import (
    DevicePool,
    Lease,
    check_width,
    core_count,
    kind_of_trial,
    make_pool,
    thread_limits,
    visible_gpus,
)
from dpo_lightning.sweeps.places.sharing import (
    MOST_PER_GPU,
    Shares,
    estimate_apart,
    estimated_shares,
    fixed_shares,
    most_at_once,
    say_shared,
)
from dpo_lightning.sweeps.places.warm_starts import Forked, Process, Spawned, WarmStarts
from dpo_lightning.sweeps.trials import LOG_FILE, Plan, Trial, trial_command

# How long the trial of a sweep that is gone may take to end; its lifeline gives it less.
_ENDING_SECONDS = 60.0
_POLL_SECONDS = 0.2


class LocalSite:
    """The devices of this machine.

    Args:
        devices: ``auto``, a count or a list.
        max_failures: After more failed trials than this no other is started; None: all are.
        retries: Number of times that a trial that crashed is started again.
        trials_per_device: Trials on one GPU at a time: ``auto`` or a count.
    """

    def __init__(
        self,
        *,
        devices: Any,
        max_failures: int | None,
        retries: int,
        trials_per_device: Any = "auto",
    ) -> None:
        self.devices = devices
        self.per_device = trials_per_device
        self.max_failures = max_failures
        self.retries = retries

    @functools.cached_property
    def _gpus(self) -> list[str]:
        return visible_gpus()

    def check(self) -> None:
        """Checks the launcher's own settings.

        Raises:
            UserError: Naming the first that is wrong.
        """
        devices = self.devices
        is_list = not isinstance(devices, str | int) and len(devices) > 0
        if not (devices == "auto" or is_list or (type(devices) is int and devices > 0)):
            raise UserError(
                f"hydra.launcher.devices={devices}: must be auto, a count of at least 1, or a list "
                "of device numbers such as [0,1]"
            )
        count = self.per_device
        if not (count == "auto" or (type(count) is int and count > 0)):
            raise UserError(
                f"hydra.launcher.trials_per_device={count}: must be auto, or a count of at least 1"
            )
        options = {"max_failures": self.max_failures, "retries": self.retries}
        check_counts(options, {"max_failures": 0, "retries": 0})

    def check_trials(self, demands: Sequence[Demand]) -> None:
        """Checks that each trial can have the devices it wants.

        Raises:
            UserError: If one would never fit.
        """
        widths: dict[DeviceKind, int] = {}
        for demand in demands:
            if demand.nodes > 1:
                raise UserError(
                    f"trainer.num_nodes={demand.nodes}: this launcher starts trials on this "
                    "machine; use trainer.num_nodes=1, or hydra/launcher=slurm"
                )
            kind = self.kind(demand.accelerator)
            widths[kind] = max(widths.get(kind, 0), demand.width)
        _make_pools(widths, self.devices, self._gpus)
        if self.per_device not in ("auto", 1) and "cuda" not in widths:
            raise UserError(
                f"hydra.launcher.trials_per_device={self.per_device}: is for GPUs, and these "
                f"trials run on {', '.join(widths)}; use hydra.launcher.devices={self.per_device}"
            )

    def kind(self, accelerator: str) -> DeviceKind:
        """The kind of device that ``trainer.accelerator`` means on this machine."""
        return kind_of_trial(accelerator, self._gpus)

    @contextmanager
    def open(self, work: Work) -> Iterator[Place]:
        """Leases devices until the sweep has ended."""
        widths: dict[DeviceKind, int] = {}
        for plan in work.plans:
            widths[plan.kind] = max(widths.get(plan.kind, 0), plan.width)
        pools = _make_pools(widths, self.devices, self._gpus)
        warm = WarmStarts() if self._starts_warm(work) else None
        shares = self._shares(work.plans, pools)
        with open_local(pools, work.program, work.environment, warm=warm, shares=shares) as place:
            yield place

    def _shares(
        self, plans: Sequence[Plan], pools: Mapping[DeviceKind, DevicePool]
    ) -> dict[str, Shares]:
        """The part of a GPU that each trial takes, by its hash; all where nothing is said."""
        if "cuda" not in pools:
            return {}
        devices = pools["cuda"].devices
        on_gpus = [plan for plan in plans if plan.kind == "cuda"]
        if self.per_device != "auto":
            shares = fixed_shares(on_gpus, devices, self.per_device)
        elif len(on_gpus) <= len(devices):
            return {}
        else:
            there = memory_of_gpus()
            memory = {device: there[device] for device in devices if device in there}
            most = min(MOST_PER_GPU, max(1, core_count() // len(devices)))
            shares = estimated_shares(on_gpus, memory, most=most, estimate=estimate_apart)
        say_shared(devices, shares)
        return shares

    def _starts_warm(self, work: Work) -> bool:
        """True if the imports are saved more than once, in this batch or with those before."""
        alone = sum(plan.width * plan.nodes == 1 for plan in work.plans)
        return tuple(work.program) == RUN and alone > 0 and alone + work.before > 1


def _make_pools(
    widths: Mapping[DeviceKind, int], devices: Any, gpus: Sequence[str]
) -> dict[DeviceKind, DevicePool]:
    """A pool for each kind of device, as wide as the widest trial of the kind at least."""
    pools: dict[DeviceKind, DevicePool] = {}
    for kind, width in widths.items():
        pools[kind] = make_pool(kind, devices, gpus)
        check_width(width, pools[kind])
    return pools


@contextmanager
def open_local(
    pools: Mapping[DeviceKind, DevicePool],
    program: Sequence[str],
    environment: Mapping[str, str],
    *,
    warm: WarmStarts | None = None,
    shares: Mapping[str, Shares] | None = None,
) -> Iterator[LocalProcesses]:
    """A place on this machine, and the pipe by which trials notice its end.

    Args:
        pools: The devices, by kind; every trial fits into the pool of its kind.
        program: What follows the interpreter, ``-m dpo_lightning train``.
        environment: Added to every trial's environment.
        warm: Starts the trials without imports where it can; None starts all cold.
        shares: Part of each device that a trial takes, by its hash; None: all of it.
    """
    given, parts = importing(os.environ | environment), shares or {}
    devices = [device for pool in pools.values() for device in pool.devices]
    limits = thread_limits(sum(most_at_once(device, parts) for device in devices), given)
    lifeline, own_end = os.pipe()
    try:
        yield LocalProcesses(pools, program, {**environment, **limits}, lifeline, warm, parts)
    finally:
        os.close(lifeline)
        os.close(own_end)


class LocalProcesses:
    """Starts trials on leased devices of this machine.

    Args:
        pools: The devices, by kind; every trial fits into the pool of its kind.
        program: What follows the interpreter, ``-m dpo_lightning train``.
        environment: Added to every trial's environment.
        lifeline: The end of a pipe that the trials read from.
        warm: Starts the trials without imports where it can; None starts all cold.
        shares: Part of each device that a trial takes, by its hash; None: all of it.
    """

    grace_seconds = 30.0

    def __init__(
        self,
        pools: Mapping[DeviceKind, DevicePool],
        program: Sequence[str],
        environment: Mapping[str, str],
        lifeline: int,
        warm: WarmStarts | None = None,
        shares: Mapping[str, Shares] | None = None,
    ) -> None:
        self._shares = shares or {}
        self._pools = pools
        self._program = program
        self._environment = environment
        self._lifeline = lifeline
        self._warm = warm

    def fits(self, trial: Trial) -> bool:
        """True if as many devices are free as the trial asks for, or its share of one."""
        plan = trial.plan
        return self._pools[plan.kind].has(plan.width, self._shares.get(plan.settings_hash))

    def find(self, trial: Trial) -> Attempt | None:
        """Returns None: trials of this machine end with the sweep that started them.

        One that is about to end, or a job that another launcher left, is waited for: two of them
        must not write one folder.

        Raises:
            UserError: If it does not end.
        """
        if trial.folder.is_dir():
            try:
                stop_other(trial.folder)
            except Taken as error:
                raise UserError(f"{trial.folder}: {error}; stop it first") from error
            os.close(_lock(trial.folder))
        return None

    def start(self, trial: Trial) -> Attempt:
        """Starts a trial on devices that it holds until it has ended."""
        pool = self._pools[trial.plan.kind]
        lease = pool.take(trial.plan.width, self._shares.get(trial.plan.settings_hash))
        assert lease is not None
        environment = importing(os.environ | self._environment) | pool.environment(lease)
        fork = self._fork(trial, environment)
        if fork is None:
            process: Process = self._spawn(trial, environment)
        else:
            process = Forked(fork, functools.partial(self._spawn_lost, trial, environment))
        return _LocalAttempt(process, lease, pool)

    def _fork(self, trial: Trial, environment: Mapping[str, str]) -> Fork | None:
        """Starts a trial warm, where that comes to the same."""
        # Of several ranks all but the first start cold, and the first waits for them.
        if self._warm is None or trial.plan.width * trial.plan.nodes > 1:
            return None
        arguments = self._command(trial)[len(self._program) :]
        lock = _lock(trial.folder)
        with os.fdopen(lock), (trial.folder / LOG_FILE).open("ab") as log:
            handed = {LIFELINE: self._lifeline, INHERITED_LOCK: lock}
            return self._warm.start(arguments, environment, output=log.fileno(), handed=handed)

    def _spawn_lost(self, trial: Trial, environment: Mapping[str, str]) -> Spawned:
        """Starts a trial cold that should have been forked."""
        assert self._warm is not None
        self._warm.lost()
        return self._spawn(trial, environment)

    def _spawn(self, trial: Trial, environment: Mapping[str, str]) -> Spawned:
        """Starts a trial by its own command."""
        lock = _lock(trial.folder)
        with os.fdopen(lock), (trial.folder / LOG_FILE).open("ab") as log:
            process = subprocess.Popen(
                self._command(trial),
                env={**environment, LIFELINE: str(self._lifeline), INHERITED_LOCK: str(lock)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[self._lifeline, lock],
                process_group=0,
            )
        return Spawned(process)

    def _command(self, trial: Trial) -> list[str]:
        return trial_command(self._program, trial.plan.arguments, trial.folder)


def _lock(folder: Path) -> int:
    """Waits until no process of an earlier sweep is at work in a trial's folder.

    Returns:
        The descriptor of a lock that is held until whoever inherits it is gone.

    Raises:
        UserError: If one does not end.
    """
    handle = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    deadline = time.monotonic() + _ENDING_SECONDS
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{folder}: a process of an earlier sweep is still running there; stop it "
                        "first"
                    ) from None
                time.sleep(_POLL_SECONDS)
            except OSError:
                return handle  # a file system without locks
            else:
                return handle
    except BaseException:
        os.close(handle)
        raise


class _LocalAttempt:
    def __init__(self, process: Process, lease: Lease, pool: DevicePool) -> None:
        self._process = process
        self._lease = lease
        self._pool = pool

    @property
    def labels(self) -> list[str]:
        return self._lease.labels

    def starts(self) -> int:
        return 0 if self._process.group is None else 1

    def ending(self) -> Ending | None:
        if not self._process.ended():
            return None
        if self._process.group is not None:
            clear_group(self._process.group)
        self._pool.give_back(self._lease)
        return Ending(self._process.code)

    def ask(self) -> None:
        self._process.withdraw()
        if self._process.group is not None:
            signal_group(self._process.group, signal.SIGINT)

    def kill(self) -> Ending:
        self._process.withdraw()
        if self._process.group is not None and not self._process.ended():
            signal_group(self._process.group, signal.SIGKILL)
            self._process.wait()
        ending = self.ending()
        assert ending is not None
        return ending
