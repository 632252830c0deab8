"""The program in a process of its own, for those who call from Python. Imports no torch.

So nothing that it sets is left behind: seeds, threads, handlers, filters, folders.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import IO, Any

from dpo_lightning.errors import (
    CorruptArtifactError,
    DivergedError,
    DpoLightningError,
    UserError,
)
from dpo_lightning.processes.groups import signal_group
from dpo_lightning.processes.lifeline import LIFELINE, REASON
from dpo_lightning.settings.program import STARTED_AS, importing, started_as

_ERRORS = {kind.exit_code: kind for kind in (UserError, DivergedError, CorruptArtifactError)}

_FLAG = re.compile(r"--(reference|betas|lambdas|evaluate)\b[ =]?")


def run_apart(
    arguments: Sequence[str], *, stdout: IO[bytes] | None = None
) -> tuple[int, str | None]:
    """Runs the interpreter to its end; it stops by itself when this process is gone.

    Args:
        arguments: The interpreter's.
        stdout: File that takes what it prints; None: where this process prints.

    Returns:
        Its exit code, and the error that ended it where it named one.
    """
    lifeline, own_end = os.pipe()
    heard, reason = os.pipe()
    # What it has left behind may hold the other end.
    os.set_blocking(heard, False)
    told = {LIFELINE: str(lifeline), REASON: str(reason), STARTED_AS: started_as()}
    try:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env=importing(os.environ) | told,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            pass_fds=[lifeline, reason],
            process_group=0,
        )
        while True:
            try:
                code = process.wait()
                break
            except BaseException as error:
                stop = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
                signal_group(process.pid, stop)
                process.wait()
                raise
        with contextlib.suppress(BlockingIOError):
            said = os.read(heard, 65_536).decode().splitlines()
            return code, said[-1] if said else None
        return code, None
    finally:
        for descriptor in (lifeline, own_end, heard, reason):
            os.close(descriptor)


def answer_of(command: str, words: Sequence[str]) -> dict[str, Any]:
    """The object that a command prints, which runs in a process of its own.

    Args:
        command: Its name.
        words: The words behind it.

    Raises:
        DpoLightningError: As the command ended.
    """
    with tempfile.TemporaryFile() as out:
        code, reason = run_apart(["-m", "dpo_lightning", command, "--json", *words], stdout=out)
        if code:
            how = f"exit code {code}" if code > 0 else f"signal {-code}"
            # Flags of the command have the names of the arguments here.
            said = _FLAG.sub(r"\1=", reason or f"{command} ended by {how}; stderr says more")
            raise _ERRORS.get(code, DpoLightningError)(said.removeprefix("error: "))
        out.seek(0)
        found: dict[str, Any] = json.load(out)
        return found
