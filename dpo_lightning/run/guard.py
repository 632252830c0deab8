"""Boundary between a command and its user: errors as lines, the end as an exit code."""

import os
import sys
import traceback
from collections.abc import Callable

from dpo_lightning.errors import DpoLightningError
from dpo_lightning.processes.lifeline import tell_reason, watch_lifeline
from dpo_lightning.processes.signals import noted_interrupts, was_interrupted
from dpo_lightning.settings.compose import ready_hydra
from dpo_lightning.settings.credentials import redact
from dpo_lightning.tracking.quiet import quiet_loggers
from dpo_lightning.tracking.terminal import outlive_terminal

# Exit codes of a run that a signal ended.
STOPPED = (130, 143)


def guarded(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Runs a command that composes settings; what goes wrong becomes a line and an exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"
    quiet_loggers()
    watch_lifeline()
    outlive_terminal()
    with noted_interrupts(), ready_hydra():
        try:
            return command(argv)
        except KeyboardInterrupt:
            return STOPPED[0]
        except SystemExit as stop:
            return exit_code(stop)
        except Exception as error:
            if was_interrupted():
                return STOPPED[0]
            if isinstance(error, DpoLightningError):
                return report(error)
            show_traceback()
            return 1


def report(error: DpoLightningError, prefix: str = "") -> int:
    """Prints an error of the user's in one line; returns its exit code."""
    line = redact(f"{prefix}{' '.join(str(error).split())}")
    print(f"error: {line}", file=sys.stderr, flush=True)
    tell_reason(line)
    return error.exit_code


def show_traceback() -> None:
    """Prints the traceback of what is handled just now."""
    print(redact(traceback.format_exc()), end="", file=sys.stderr, flush=True)


def exit_code(stop: SystemExit) -> int:
    """The code that an exit means."""
    if stop.code is None:
        return 0
    return stop.code if isinstance(stop.code, int) else 1
