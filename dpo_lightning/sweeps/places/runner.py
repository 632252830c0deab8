"""Runner of a trial on a cluster's node: a process group that dies with the runner.

The sweep sends plain values; what is decided late, such as whether there is a checkpoint to go on
from, is decided here. Imports no torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpo_lightning.files import RESULT_FILE
from dpo_lightning.processes.groups import clear_group, group_lives, kill_group, signal_group
from dpo_lightning.processes.lifeline import DIE_WITH_PARENT, LIFELINE
from dpo_lightning.settings.credentials import is_secret
from dpo_lightning.settings.program import importing
from dpo_lightning.sweeps.places.base import Work
from dpo_lightning.sweeps.places.claims import CHECK_SECONDS, Claim, Taken
from dpo_lightning.sweeps.places.leases import THREAD_LIMITS
from dpo_lightning.sweeps.trials import LOG_FILE, Trial, trial_command

_POLL_SECONDS = 0.2
# Less than SLURM leaves between SIGTERM and SIGKILL, and less than a take-over waits.
_GRACE_SECONDS = 20.0
# How long the ranks of a trial may go on when one of them has ended.
_OTHER_RANKS_SECONDS = 30.0
# How long other tasks of a job wait for the first one.
_FIRST_RANK_SECONDS = 300.0

# Environment variables of the sweep that also hold at the nodes, unless these have their own.
_PASSED_ON = ("DPO_LIGHTNING_CACHE", "HF_", "WANDB_")

STOPPED = 143
"""What a runner returns whose trial no longer counts."""


@dataclass(frozen=True, slots=True)
class Order:
    """A trial as it is sent to a node; every path is absolute and means the same there.

    Attributes:
        attempt: Name of the order in the trial's folder.
        folder: The trial's.
        program: Words behind the interpreter, ``-m dpo_lightning train``.
        arguments: Arguments of the program.
        workdir: Folder in which the command was typed; paths in the settings are seen from there.
        environment: Added to the node's environment.
        defaults: Added where the node's environment has nothing under that name.
        hide_gpus: True if it must not see the node's GPUs.
        max_starts: After more starts than this the trial is given up; None: never.
    """

    attempt: str
    folder: str
    program: tuple[str, ...]
    arguments: tuple[str, ...]
    workdir: str
    environment: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    hide_gpus: bool = False
    max_starts: int | None = None


class Runner:
    """Runner that carries out an order.

    Args:
        order: The order.
        run: Name of this start; the tasks of a job share it. None: a new name.
        rank: The task's number in its job.
    """

    def __init__(self, order: Order, *, run: str | None = None, rank: int = 0) -> None:
        self._order = order
        self._rank = rank
        self._folder = Path(order.folder)
        self._claim = Claim(self._folder, order.attempt, run or uuid.uuid4().hex)
        self._process: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        """Runs the trial to its end.

        Returns:
            The exit code of its process, negative for a signal; ``STOPPED`` if it no longer counts.

        Raises:
            BaseException: The interruption, when the trial's processes have ended.
        """
        if not self._claim.is_ordered():
            return STOPPED  # it was cancelled, or ordered anew, while this waited in a queue
        if not (self._begin() if self._rank == 0 else self._wait_for_first_rank()):
            return STOPPED
        lifeline, own_end = os.pipe()
        try:
            return self._run(lifeline)
        except Exception as error:
            self.stop(signal.SIGTERM)
            self._claim.end(None, reason=" ".join(str(error).split()))
            raise
        except BaseException as error:
            # What asked for the end is passed on as it came; the cluster may start it again.
            self.stop(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
            self._claim.leave()
            raise
        finally:
            os.close(lifeline)
            os.close(own_end)

    def stop(self, signum: int) -> None:
        """Asks the trial to end, waits a while, and kills what is left of it.

        It may be called by the handler of a signal.
        """
        # So not by way of Popen, whose lock the handler may have interrupted.
        if self._process is None:
            return
        group = self._process.pid
        if group_lives(group):
            signal_group(group, signum)
            deadline = time.monotonic() + _GRACE_SECONDS
            with contextlib.suppress(KeyboardInterrupt, SystemExit):  # a second one means now
                while group_lives(group) and time.monotonic() < deadline:
                    time.sleep(_POLL_SECONDS)
        kill_group(group)

    def _begin(self) -> bool:
        """Takes the folder; returns True if the trial may be started."""
        try:
            starts = self._claim.take(self._labels())
        except Taken as error:
            self._claim.end(None, reason=str(error))
            return False
        most = self._order.max_starts
        if most is not None and starts > most:
            self._claim.end(None, reason=f"its node or its worker was lost {starts - 1} times")
            return False
        return self._claim.holds()

    def _run(self, lifeline: int) -> int:
        if self._rank == 0:
            # What an earlier start left must not pass for this one's.
            (self._folder / RESULT_FILE).unlink(missing_ok=True)
        process = self._process = self._start(lifeline)
        if self._rank == 0:
            self._claim.note_group(process.pid)
            if not self._claim.holds():
                kill_group(process.pid)
                return STOPPED
        code = self._wait(process)
        if code is None:
            return STOPPED
        clear_group(process.pid)
        if self._rank == 0:
            self._claim.end(code)
        else:
            self._claim.end_part(self._rank, code)
        return code

    def _start(self, lifeline: int) -> subprocess.Popen[bytes]:
        order = self._order
        name = LOG_FILE
        command = trial_command(order.program, order.arguments, self._folder)
        if self._rank > 0:
            # Files of the folder are the first rank's; so is its log, as appending is not safe
            # between machines.
            command += [f"hydra.job.name=train_rank_{self._rank}", "hydra.output_subdir=null"]
            name = f"trial-rank-{self._rank}.log"
        # This process imports the package from where it is on this node, and so does the trial.
        environment = importing({**order.defaults, **os.environ, **order.environment})
        environment |= {LIFELINE: str(lifeline), DIE_WITH_PARENT: "1"}
        if order.hide_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (self._folder / name).open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=order.workdir,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lifeline],
                process_group=0,
            )

    def _wait(self, process: subprocess.Popen[bytes]) -> int | None:
        """The exit code of the trial; None when it no longer counts."""
        checked, others_ended = time.monotonic(), None
        while process.poll() is None:
            time.sleep(_POLL_SECONDS)
            now = time.monotonic()
            if now - checked < CHECK_SECONDS:
                continue
            checked = now
            if self._claim.is_withdrawn():
                self.stop(signal.SIGINT)
                self._claim.end(STOPPED)
                return None
            if not (self._claim.holds() if self._rank == 0 else self._claim.is_ordered()):
                kill_group(process.pid)  # another start of the trial waits for it
                return None
            if self._rank == 0:
                failed = self._claim.failed_part()
            else:
                failed = None if self._claim.is_open() else STOPPED
            if failed is not None:
                others_ended = others_ended or now
                if now - others_ended > _OTHER_RANKS_SECONDS:
                    kill_group(process.pid)
                    process.wait()
                    return failed
        return process.returncode

    def _wait_for_first_rank(self) -> bool:
        deadline = time.monotonic() + _FIRST_RANK_SECONDS
        while not self._claim.is_open():
            if time.monotonic() > deadline or not self._claim.is_ordered():
                return False
            time.sleep(_POLL_SECONDS)
        return True

    def _labels(self) -> list[str]:
        """The devices that the node lets the trial see, as a reader knows them."""
        host = socket.gethostname()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        if self._order.hide_gpus or not visible:
            return [host]
        return [f"{host}/cuda:{name}" for name in visible.split(",")]


def run_order(order: Order) -> int:
    """Carries out an order; returns the exit code of the trial."""
    return Runner(order).run()


def make_order(
    trial: Trial,
    work: Work,
    *,
    attempt: str,
    threads: int | None,
    max_starts: int | None,
) -> Order:
    """The order that starts a trial at a node.

    Args:
        trial: The trial.
        work: The sweep that the place was opened for.
        attempt: Name of the order.
        threads: CPU threads of each of its processes; None leaves them to the node.
        max_starts: Most starts by the place itself; None: as many as it needs.
    """
    passed_on = {
        name: value
        for name, value in os.environ.items()
        # What a credential's file holds is on the nodes too; the credential is not sent to them.
        if name.startswith(_PASSED_ON) and not is_secret(name)
    }
    limits = {} if threads is None else {name: str(threads) for name in THREAD_LIMITS}
    return Order(
        attempt=attempt,
        folder=str(trial.folder.absolute()),
        program=tuple(work.program),
        arguments=trial.plan.arguments,
        workdir=str(Path.cwd()),
        environment=dict(work.environment),
        defaults=passed_on | limits,
        hide_gpus=trial.plan.accelerator == "cpu",
        max_starts=max_starts,
    )
