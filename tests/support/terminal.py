"""Terminal for the commands of the pages: a shell in which ours are forks of a warm process.

A command that is started cold spends most of its time in imports. What is typed is bash as it
stands on the page; `python`, `dpo-lightning` and their words are found first in the terminal's own
folder, and hand what they were given to this process, which has it forked.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_lightning.processes.warm import ForkOrder, WarmProcess, differing
from dpo_lightning.sweeps.places import warm_starts
from tests.support.runs import ROOT
from tests.support.warm import own_environment

MODULES = (*warm_starts.MODULES, "dpo_lightning.__main__", "tests.support.terminal")
SECONDS = 1500

_INPUT = "TYPED_INPUT"
_MESSAGE_BYTES = 1 << 17
_PYTHON = shlex.quote(sys.executable)
# The program as it is started: what sys.argv begins with.
_PROGRAMS = {
    "clone": str(ROOT / "train.py"),
    "module": str(ROOT / "dpo_lightning" / "__main__.py"),
    "command": "dpo-lightning",
}
_CLIENT = """\
import json, os, socket, sys
_, way, *words = sys.argv
about = {"way": way, "words": words, "cwd": os.getcwd(), "environment": {**os.environ}}
terminal = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
terminal.connect(os.path.join(os.path.dirname(__file__), "terminal"))
socket.send_fds(terminal, [json.dumps(about).encode()], [0, 1, 2])
sys.exit(int(terminal.recv(16) or b"1"))
"""
_SCRIPTS = {
    "dpo-lightning": 'exec {python} -IS {client} command "$@"\n',
    "python": (
        'case "$1 $2" in\n'
        '"train.py "*) shift; exec {python} -IS {client} clone train "$@";;\n'
        '"-m dpo_lightning") shift 2; exec {python} -IS {client} module "$@";;\n'
        "esac\n"
        'exec {python} "$@"\n'
    ),
}


def command() -> int:
    """Is one of our commands, in a fork of the warm process; returns its exit code."""
    import dpo_lightning.__main__ as program

    os.dup2(int(os.environ.pop(_INPUT)), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - as long as the process
    sys.modules["__main__"] = program  # what a run starts its other ranks as
    return program.main()


class Terminal:
    """A shell for the lines of a page.

    Args:
        change: Takes the words of each of our commands, and returns those that it is given.
    """

    def __init__(self, change: Callable[[Sequence[str]], Sequence[str]]) -> None:
        self._change = change
        self._bin = Path(tempfile.mkdtemp(prefix="terminal-"))
        client = self._bin / "client.py"
        client.write_text(_CLIENT)
        for name, text in _SCRIPTS.items():
            script = self._bin / name
            script.write_text(f"#!/bin/sh\n{text.format(python=_PYTHON, client=client)}")
            script.chmod(0o755)
        self._environment = own_environment() | {
            "PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "200",
            "OMP_NUM_THREADS": "1",
            # Nothing of a page reaches out: what stands in for the hub are folders.
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "offline",
        }
        self._warm = WarmProcess(MODULES, self._environment, apart=False)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(str(self._bin / "terminal"))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def type(self, lines: str, folder: Path) -> str:
        """Output of bash for lines of a page, standard error included.

        Args:
            lines: The lines.
            folder: The working folder.

        Raises:
            AssertionError: If one of them fails, with the end of what was said.
            TimeoutExpired: If they take too long.
        """
        done = subprocess.run(
            ["bash", "-eu", "-o", "pipefail", "-c", lines],
            cwd=folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{lines}\nexit code {done.returncode}\n{done.stdout[-5000:]}"
        return done.stdout

    def close(self) -> None:
        """Ends the warm process, and removes the terminal's folder."""
        self._socket.close()
        self._warm.close()
        shutil.rmtree(self._bin)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        """Has the command forked that a client was given, and tells the client its exit code."""
        with connection:
            body, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 3)
            code = self._run(json.loads(body), descriptors)
            with contextlib.suppress(OSError):  # whoever asked was killed
                connection.send(str(code).encode())

    def _run(self, asked: Mapping[str, Any], descriptors: Sequence[int]) -> int:
        given, out, err = descriptors
        order = ForkOrder(
            argv=[_PROGRAMS[asked["way"]], *self._change(asked["words"])],
            changes=differing(asked["environment"], self._warm.environment),
            cwd=asked["cwd"],
            target="tests.support.terminal:command",
            leads="nothing",
            handed=[_INPUT],
        )
        try:
            fork = self._warm.start(order, [out, err, given])
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        while not fork.ended():
            if fork.lost:
                return 1
            time.sleep(0.01)
        if fork.returncode is None:  # the warm process ended before it
            return 1
        return fork.returncode if fork.returncode >= 0 else 128 - fork.returncode
