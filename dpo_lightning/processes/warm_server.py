"""Program of the warm process: it imports modules once, and forks the programs that are asked for.

``python warm_server.py <socket> <module> …``. It does no tensor work and touches no device, and it
forks only while it has one thread and no device open: a lock that another thread holds would be
held for ever in the fork, and a CUDA context cannot be used there. A fork says who it is before
anything else, so that whoever asked knows of it even if this process ends at that very moment.

It imports nothing of this project by itself: what it imports is what it is told to.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TextIO

# As many as a message may hand over.
_MOST_DESCRIPTORS = 8
_MESSAGE_BYTES = 1 << 18
_PR_SET_PDEATHSIG = 1
# Files by which a process talks to a GPU.
_DEVICE_FILES = ("/dev/nvidia", "/dev/kfd", "/dev/dri/")


def unfit(proc: Path = Path("/proc/self")) -> str | None:
    """Reason why this process must not be forked; None where it may be.

    Args:
        proc: What the system says of the process.
    """
    threads = sum(1 for _ in (proc / "task").iterdir())
    if threads > 1:
        return f"it has {threads} threads"
    for entry in (proc / "fd").iterdir():
        with contextlib.suppress(OSError):  # the one by which they are listed
            if str(entry.readlink()).startswith(_DEVICE_FILES):
                return f"it has opened {entry.readlink()}"
    cuda = getattr(sys.modules.get("torch"), "cuda", None)
    return "it has initialized CUDA" if cuda is not None and cuda.is_initialized() else None


class _Server:
    def __init__(self, connection: socket.socket, interrupt: Any) -> None:
        self._connection = connection
        self._interrupt = interrupt
        self._children: dict[int, int] = {}
        self._pipe = os.pipe()
        for end in self._pipe:
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def serve(self) -> dict[str, Any] | None:
        """Forks what is asked for; returns its order in a fork, None at the end."""
        poll = select.poll()
        poll.register(self._connection, select.POLLIN)
        poll.register(self._pipe[0], select.POLLIN)
        while True:
            events = dict(poll.poll())
            if self._pipe[0] in events:
                os.read(self._pipe[0], 4096)
                self._reap()
            event = events.get(self._connection.fileno(), 0)
            if event & ~select.POLLIN:
                return None  # whoever asked is gone; what it asked for last is not wanted any more
            if event:
                order = self._take()
                if order is not None:
                    return order

    def say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone, which shows at the next look
            self._connection.send(json.dumps(message).encode())

    def _reap(self) -> None:
        for pid in [*self._children]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                number = self._children.pop(pid)
                self.say(number=number, code=os.waitstatus_to_exitcode(status))

    def _take(self) -> dict[str, Any] | None:
        """Takes one order; returns it in the fork."""
        body, descriptors, _, _ = socket.recv_fds(
            self._connection, _MESSAGE_BYTES, _MOST_DESCRIPTORS
        )
        if not body:
            return None
        order = json.loads(body)
        reason = unfit()
        pid = -1 if reason is not None else os.fork()
        if pid == 0:
            self._become(order, descriptors)
            return order  # type: ignore[no-any-return]
        for descriptor in descriptors:
            os.close(descriptor)
        if reason is not None:
            self.say(number=order["number"], refused=reason)
        else:
            self._children[pid] = order["number"]
        return None

    def _become(self, order: dict[str, Any], descriptors: list[int]) -> None:
        """Takes over all that a program has that was started by its own command."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, self._interrupt)
        for end in self._pipe:
            os.close(end)
        if order["leads"] == "session":
            os.setsid()
        elif order["leads"] == "group":
            os.setpgid(0, 0)
        self.say(number=order["number"], pid=os.getpid(), born=_birth())
        self._connection.close()
        _write_to(*descriptors[:2])
        for name, value in order["changes"].items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        os.environ.update(zip(order["handed"], map(str, descriptors[2:]), strict=True))
        os.chdir(order["cwd"])
        sys.path[:0] = order["path"]


def _birth() -> int:
    """Time at which this process was born, as ``processes.ownership`` reads it."""
    return int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])


def _write_to(out: int, err: int) -> None:
    """Exchanges the output, after what was said while modules were imported."""
    said = b""
    if os.fstat(1).st_size:  # a file
        with contextlib.suppress(OSError):
            said = os.pread(1, 1 << 20, 0)
    os.dup2(out, 1)
    os.dup2(err, 2)
    for descriptor in {out, err} - {1, 2}:
        os.close(descriptor)
    if said:
        os.write(2, said)
    # Theirs remember what kind of file they were made for.
    sys.stdout = _stream(1, sys.stdout)
    sys.stderr = _stream(2, sys.stderr)


def _stream(descriptor: int, like: TextIO) -> TextIO:
    """A stream as the interpreter makes it, buffered as the environment asks for."""
    assert isinstance(like, io.TextIOWrapper)
    unbuffered = like.write_through
    return io.TextIOWrapper(
        open(descriptor, "wb", buffering=0 if unbuffered else -1, closefd=False),
        encoding=like.encoding,
        errors=like.errors,
        line_buffering=like.line_buffering or (os.isatty(descriptor) and not unbuffered),
        write_through=unbuffered,
    )


def _die_with_parent() -> None:
    """Has the system kill this process when its parent is gone, also while it imports."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # forks have it not


def _import_all(modules: Iterable[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    # Else the first collection in a fork copies every page that holds an object.
    gc.collect()
    gc.freeze()


def _call(order: dict[str, Any]) -> int:
    """Calls the function of an order as a program; returns its exit code."""
    module_name, _, function = order["target"].partition(":")
    random = sys.modules.get("numpy.random")
    if random is not None:
        random.seed()  # as that of a new process; Python sees to its own
    package = sys.modules.get("dpo_lightning")
    if package is not None:
        package.STARTED = time.perf_counter()  # type: ignore[attr-defined]
    try:
        sys.argv = order["argv"]
        module = importlib.import_module(module_name)
        if module_name.endswith("__main__"):
            # What starts this program once more asks which one it is.
            sys.modules["__main__"] = module
            sys.argv[0] = str(module.__file__)
        return int(getattr(module, function)() or 0)
    except SystemExit as stop:
        if not isinstance(stop.code, int | None):
            print(stop.code, file=sys.stderr)
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


def _end(code: int) -> NoReturn:
    """Ends as the interpreter does, without taking modules apart, which takes a second."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code & 0xFF)


def main() -> NoReturn:
    """Imports, serves, and becomes what was asked for in each fork."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    # It ends with whoever asks, and Ctrl-C is for that one to see to.
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not sys.flags.safe_path:
        del sys.path[0]  # the folder of this file, whose names are not for importing
    _die_with_parent()
    _import_all(sys.argv[2:])
    server = _Server(connection, interrupt)
    server.say(ready=True)
    order = server.serve()
    _end(0 if order is None else _call(order))


if __name__ == "__main__":
    main()
