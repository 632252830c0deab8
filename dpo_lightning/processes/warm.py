"""Programs that start without importing anything: forks of one process that has imported it all.

The warm process is spawned, never forked from a process that may hold threads. A fork differs in
nothing that a program can see from one that was started by its own command: it leads its own
process group, has its own output, folder and environment, and ends as a program does. Where a
variable of its environment that a library may have read differs, it has to be started cold, which
:func:`differing` tells. Imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Literal

from dpo_lightning.processes import warm_server
from dpo_lightning.processes.ownership import is_alive

_POLL_SECONDS = 0.01
# How long the exit code of a fork may take that runs no more, and the warm process to end.
_CODE_SECONDS = 5.0
_MESSAGE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class ForkOrder:
    """A program that a warm process is asked to fork.

    Attributes:
        argv: Value of ``sys.argv``.
        changes: Variables of the environment that differ from the warm process's; None for none.
        cwd: The working folder.
        target: ``module:function`` that is called, with no argument; it returns the exit code. A
            module ``__main__`` stands for the program.
        leads: Leads a process group or a session of its own, or stays in the warm process's group.
        handed: Names of variables that tell the numbers of further descriptors.
        path: Put ahead of where modules are looked for.
    """

    argv: Sequence[str]
    changes: Mapping[str, str | None]
    cwd: str
    target: str
    leads: Literal["group", "session", "nothing"] = "group"
    handed: Sequence[str] = ()
    path: Sequence[str] = ()


class Fork:
    """A program that a warm process was asked for.

    Args:
        warm: The process.

    Attributes:
        pid: Its process id; None until it is there.
        returncode: Its exit code, or minus the signal's number; None while it runs, and for one
            that ended after the warm process.
        lost: True if it never started, and will not.
    """

    def __init__(self, warm: WarmProcess) -> None:
        self.pid: int | None = None
        self.returncode: int | None = None
        self.lost = False
        self._warm = warm
        self._born = 0
        self._gone_since: float | None = None

    def ended(self) -> bool:
        """True if it ran and does so no more."""
        self._warm.look()
        if self.returncode is not None:
            return True
        if self.pid is None or is_alive([self.pid, self._born]):
            return False
        # Its code is on its way, unless nobody is there to tell it.
        now = time.monotonic()
        self._gone_since = self._gone_since or now
        if self._warm.gone is None and now - self._gone_since < _CODE_SECONDS:
            return False
        self._warm.look()
        return True

    def begun(self) -> bool:
        """True if it is there, or was."""
        self._warm.look()
        return self.pid is not None

    def withdraw(self) -> None:
        """Sees to it that it will not start, unless it has: the warm process may end for it."""
        deadline = time.monotonic() + _CODE_SECONDS
        while not self.begun() and not self.lost:
            # Once it has imported all, what is asked for is there in a moment.
            if self._warm.importing or time.monotonic() > deadline:
                self._warm.kill()
            time.sleep(_POLL_SECONDS)

    def wait(self) -> None:
        """Waits until it has ended, or will not start."""
        while not self.ended() and not self.lost:
            time.sleep(_POLL_SECONDS)

    def _begin(self, pid: int, born: int) -> None:
        self.pid, self._born = pid, born


class WarmProcess:
    """A process that has imported modules, seen from the one that spawned it.

    Args:
        modules: Modules that it imports.
        environment: Its environment.
        apart: True if it leads a process group of its own.

    Attributes:
        environment: Its environment, as it began with it.
        gone: Reason why it takes no more orders; None while it does.
    """

    def __init__(
        self, modules: Sequence[str], environment: Mapping[str, str], *, apart: bool = True
    ) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.environment = dict(environment)
        self.gone: str | None = None
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with it
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, warm_server.__file__, str(theirs.fileno()), *modules],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                env=self.environment,
                process_group=0 if apart else None,
            )
        self._socket = ours
        self._owner = os.getpid()
        self._ready = False
        self._forks: dict[int, Fork] = {}
        self._count = 0
        self._lock = threading.RLock()

    @property
    def usable(self) -> bool:
        """True if it takes orders, of this process."""
        self.look()
        return self.gone is None

    def start(self, order: ForkOrder, descriptors: Sequence[int]) -> Fork:
        """Asks for a program; while modules are imported it waits for that.

        Args:
            order: The program.
            descriptors: Descriptors of its output, of its errors, and those that the order's
                ``handed`` names.

        Raises:
            OSError: If the order cannot be sent; the program does not start then.
        """
        with self._lock:
            fork = Fork(self)
            self._count += 1
            body = {name: getattr(order, name) for name in ForkOrder.__slots__}
            text = json.dumps({"number": self._count, **body}).encode()
            socket.send_fds(self._socket, [text], [*descriptors], socket.MSG_DONTWAIT)
            self._forks[self._count] = fork
            return fork

    def look(self) -> None:
        """Takes what was said since the last look."""
        with self._lock:
            if os.getpid() != self._owner:
                self.gone = self.gone or "it is another process's"
            while self.gone is None:
                # Not what the socket says of the other end: forks speak for themselves.
                if not select.select([self._socket], [], [], 0)[0]:
                    return
                try:
                    data = self._socket.recv(_MESSAGE_BYTES)
                except OSError:
                    data = b""
                if data:
                    self._take(json.loads(data))
                else:
                    self._close(self._why())

    def _take(self, message: dict[str, int | str]) -> None:
        if "ready" in message:
            self._ready = True
            return
        number = int(message["number"])
        fork = self._forks[number]
        if "pid" in message:
            fork._begin(int(message["pid"]), int(message["born"]))
            return
        if "refused" in message:
            self._close(str(message["refused"]))  # it would refuse every other one, too
            return
        fork.returncode = int(message["code"])
        fork.lost = fork.pid is None
        del self._forks[number]

    def _why(self) -> str:
        """The end of a process that closed its socket, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_CODE_SECONDS)
        code = self._process.poll()
        how = "it ended" if code is None else f"it ended with exit code {code}"
        if code is not None and code < 0:
            how = f"it was killed by signal {-code}"
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {last}" if last and code else how

    def _close(self, why: str) -> None:
        self.gone = why
        for fork in self._forks.values():
            fork.lost = fork.pid is None

    @property
    def importing(self) -> bool:
        """True until its modules are imported."""
        return not self._ready

    def kill(self) -> None:
        """Kills it; what it has forked goes on, and what it has not never starts."""
        with self._lock:
            if os.getpid() != self._owner or self._process.returncode is not None:
                return
            self._process.kill()
            self._process.wait()
            deadline = time.monotonic() + _CODE_SECONDS
            # A fork that is just being made has the socket, too, until it has said who it is.
            while self.usable and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            if self.gone is None:
                self._close("it was ended")

    def close(self) -> None:
        """Ends it when all that it forked has ended."""
        if self.importing or self.gone is not None:
            self.kill()
        with self._lock:
            if os.getpid() != self._owner:
                return
            self._socket.close()
            if self.gone is None:
                self._close("it was closed")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_CODE_SECONDS)
            if self._process.returncode is None:
                self._process.kill()
                self._process.wait()
            self._said.close()


def differing(environment: Mapping[str, str], warm: Mapping[str, str]) -> dict[str, str | None]:
    """Variables in which an environment differs from another, with their values; None for none."""
    names = sorted({*environment, *warm})
    return {
        name: environment.get(name) for name in names if environment.get(name) != warm.get(name)
    }
