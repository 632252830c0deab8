"""Log handlers for a terminal and a file, and a terminal that may close before the run ends."""

import contextlib
import io
import logging
import os
import sys

from dpo_lightning.settings.credentials import redact


class HidingFormatter(logging.Formatter):
    """Formats a record, its traceback included, without any credential that stands in it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, or the lines of a traceback."""
        return redact(super().format(record))


class TerminalHandler(logging.Handler):
    """Handler that sends errors to standard error, everything else to standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; the streams are looked up late because progress bars replace them."""
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        try:
            print(self.format(record), file=stream, flush=True)
        except Exception:
            self.handleError(record)


class LogFile(logging.FileHandler):
    """A log file whose failure does not end the run; that is said once."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        """Reports the first error alone; Python's own way is a traceback for every line."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            reason = error.strerror or error
            print(f"{self.baseFilename} cannot be written: {reason}", file=sys.stderr, flush=True)


class _Lasting(io.FileIO):
    """A file descriptor that discards its output once nobody reads it or its disk is full."""

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        """Writes, or discards the text."""
        with contextlib.suppress(OSError):
            return super().write(data)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
        return len(data)


def outlive_terminal() -> None:
    """Lets the program go on, silently, when its output is closed: ``| head``, a lost session.

    A terminal that has no beta shows a question mark instead of ending the program.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the start
            setattr(sys, name, open(os.devnull, "w"))  # noqa: PTH123, SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            if stream is getattr(sys, f"__{name}__"):  # and not what somebody put in its place
                setattr(sys, name, _lasting(stream))


def _lasting(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    stream.flush()
    raw = _Lasting(stream.fileno(), "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),  # type: ignore[type-var]
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
