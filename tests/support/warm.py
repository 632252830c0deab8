"""Warm process of the tests: runs that they start are forks of it, as the trials of a sweep are.

A run that is started cold spends most of its time in imports. A run starts cold where a variable of
its environment that a library may read when it is imported differs from that of the warm process.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dpo_lightning.processes import warm
from dpo_lightning.sweeps.places import warm_starts

ROOT = Path(__file__).resolve().parents[2]

# What a run imports, and the functions of tests that are ranks; more is not kept warm.
MODULES = (*warm_starts.MODULES, "pytest")

# Read when they are needed, not when something is imported: they may differ.
READ_LATER = (
    *("DPO_LIGHTNING_CACHE", "DPO_LIGHTNING_LIFELINE", "DPO_LIGHTNING_PARENT"),
    *("DISTURB", "DISTURB_GO", "BLOCK_LOG", "BLOCK_SECONDS", "BLOCK_PROCESSES"),
    *("WANDB_MODE", "WANDB_DIR", "WANDB_BASE_URL", "WANDB_API_KEY"),
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT", "COLUMNS", "LINES", "PYTEST_CURRENT_TEST", "PWD", "OLDPWD"),
)

# Runs in this process leave them behind; no shell has them.
LEFT_BEHIND = (
    *("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"),
    *("HYDRA_FULL_ERROR", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "TORCHINDUCTOR_CACHE_DIR"),
    *("PYTORCH_NVML_BASED_CUDA_CHECK", "PYTORCH_ALLOC_CONF", "WANDB_SERVICE"),
)


@dataclass(frozen=True, slots=True)
class Order:
    """A run that the warm process is asked to fork.

    Attributes:
        argv: Value of ``sys.argv``; the first is the program.
        environment: The whole environment.
        cwd: The working folder.
        session: True if it leads a session of its own, else it stays in that of the warm process.
        target: ``module:function`` that is called, with no argument; it returns the exit code.
        path: Put ahead of where modules are looked for.
    """

    argv: list[str]
    environment: dict[str, str]
    cwd: str
    session: bool
    target: str
    path: list[str]


class WarmRun:
    """A forked run, with the part of ``subprocess.Popen`` that tests use."""

    def __init__(
        self, warm: WarmProcess, pid: int, stdout: IO[Any] | None, stderr: IO[Any] | None
    ) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self.args = "a run of the warm process"
        self.returncode: int | None = None
        self._warm = warm

    def poll(self) -> int | None:
        """The exit code, or minus the signal's number; None while it runs."""
        if self.returncode is None:
            self.returncode = self._warm.code_of(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end of the run.

        Raises:
            TimeoutExpired: If it does not come.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[Any, Any]:
        """Returns the output of its pipes, once it has ended; None where there is none.

        Raises:
            TimeoutExpired: If it does not end, or what it started holds a pipe open.
        """
        pipes = (self.stdout, self.stderr)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            parts = [None if pipe is None else pool.submit(pipe.read) for pipe in pipes]
            self.wait(timeout)
            said = [None if part is None else part.result(timeout) for part in parts]
        for pipe in filter(None, pipes):
            pipe.close()
        return said[0], said[1]

    def send_signal(self, signum: int) -> None:
        """Signals the run, if it is still there."""
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        """Kills the run."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Asks the run to end."""
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> WarmRun:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in filter(None, (self.stdout, self.stderr)):
            pipe.close()
        self.wait()


class WarmProcess:
    """A warm process, of which each run is known by its process id.

    Args:
        modules: Modules that it imports.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self.environment = own_environment()
        own = self.environment | {"PYTHONPATH": _with_root(self.environment)}
        # In this process group: Ctrl-C is for the tests and all that they started.
        self._process = warm.WarmProcess(modules, own, apart=False)
        self._forks: dict[int, warm.Fork] = {}

    def start(self, order: Order, stdout: int, stderr: int) -> int:
        """Has a run forked; returns its process id.

        Args:
            order: The run.
            stdout: File descriptor that it writes to.
            stderr: File descriptor that its errors go to.

        Raises:
            RuntimeError: If the warm process forks none.
        """
        asked = warm.ForkOrder(
            argv=order.argv,
            changes=warm.differing(order.environment, self._process.environment),
            cwd=order.cwd,
            target=order.target,
            leads="session" if order.session else "nothing",
            path=order.path,
        )
        fork = self._process.start(asked, [stdout, stderr])
        while not fork.begun():
            if fork.lost:
                raise RuntimeError(f"the warm process forks no run: {self._process.gone}")
            time.sleep(0.005)
        assert fork.pid is not None
        self._forks[fork.pid] = fork
        return fork.pid

    def code_of(self, pid: int) -> int | None:
        """The exit code of a run that has ended."""
        fork = self._forks[pid]
        if not fork.ended():
            return None
        assert fork.returncode is not None, self._process.gone
        return fork.returncode

    def close(self) -> None:
        """Ends the warm process; runs go on."""
        self._process.close()


def own_environment() -> dict[str, str]:
    """The environment of this process, as a shell would have it."""
    return {name: value for name, value in os.environ.items() if name not in LEFT_BEHIND}


def _with_root(environment: Mapping[str, str]) -> str:
    return os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))


@functools.cache
def warm_process(modules: tuple[str, ...] = MODULES) -> WarmProcess:
    """The warm process of this process; it is spawned when it is first asked for."""
    process = WarmProcess(modules)
    atexit.register(process.close)
    return process


def needs_cold_start(environment: Mapping[str, str], warm: Mapping[str, str]) -> list[str]:
    """Names of the variables for which a run has to import everything itself."""
    names = {*environment, *warm} - {*READ_LATER}
    return sorted(name for name in names if environment.get(name) != warm.get(name))


def start_train(
    *arguments: str,
    cwd: Path = ROOT,
    stdout: int | IO[Any] | None = None,
    stderr: int | IO[Any] | None = None,
    start_new_session: bool = False,
    env: Mapping[str, str | None] | None = None,
) -> WarmRun | subprocess.Popen[str]:
    """Starts ``train.py`` as a process of its own, out of the warm process where that may be.

    Args:
        arguments: Of its command line.
        cwd: Its working folder.
        stdout: As for ``subprocess.Popen``: None, PIPE, DEVNULL or a file; pipes are text.
        stderr: The same, and STDOUT.
        start_new_session: True if it leads a session of its own.
        env: Added to this process's own environment; None takes a variable away.
    """
    changed: dict[str, str | None] = {**own_environment(), **(env or {})}
    whole = {name: value for name, value in changed.items() if value is not None}
    program = str(ROOT / "train.py")
    if needs_cold_start(whole, warm_process().environment):
        return subprocess.Popen(
            [sys.executable, "-u", program, *arguments],
            cwd=cwd,
            env=whole,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            start_new_session=start_new_session,
        )
    order = Order(
        argv=[program, *arguments],
        environment=whole,
        cwd=str(cwd),
        session=start_new_session,
        target="dpo_lightning.cli:main",
        path=[],
    )
    with contextlib.ExitStack() as opened:
        out, read_out = _stream(stdout, 1, opened)
        err, read_err = _stream(stderr, out if stderr == subprocess.STDOUT else 2, opened)
        pid = warm_process().start(order, out, err)
    return WarmRun(warm_process(), pid, read_out, read_err)


def _stream(
    given: int | IO[Any] | None, inherited: int, opened: contextlib.ExitStack
) -> tuple[int, IO[Any] | None]:
    """The descriptor that a run writes to, and, if it is a pipe, the end to read from."""
    if given == subprocess.PIPE:
        reader, writer = os.pipe()
        opened.callback(os.close, writer)
        return writer, os.fdopen(reader, "r")
    if given == subprocess.DEVNULL:
        return opened.enter_context(Path(os.devnull).open("w")).fileno(), None
    if given is None or isinstance(given, int):
        return inherited, None
    return given.fileno(), None


def run_apart(
    *arguments: str,
    cwd: Path = ROOT,
    timeout: float = 300.0,
    env: Mapping[str, str | None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Runs ``train.py`` as a process of its own to its end.

    Args:
        arguments: Of its command line.
        cwd: Its working folder.
        timeout: Seconds until it is killed.
        env: Added to this process's own environment; None takes a variable away.

    Raises:
        TimeoutExpired: If it does not end.
    """
    process = start_train(
        *arguments, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode is not None
    return subprocess.CompletedProcess(list(arguments), process.returncode, out, err)
