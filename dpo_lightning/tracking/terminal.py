"""Log handlers for a terminal and a file, and a terminal that may close before the run ends."""

import contextlib
import io
import logging
import logging.handlers
import os
import sys

from dpo_lightning.settings.credentials import redact

# Lines of a log that may wait for the first step.
_MOST_WAITING = 1_000_000


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

    def emit(self, record: logging.LogRecord) -> None:
        """Writes one record; that its file cannot be opened any more is an error like any other."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Reports the first error alone; Python's own way is a traceback for every line."""
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self._failed:
            self._failed = True
            reason = error.strerror or error
            print(f"{self.baseFilename} cannot be written: {reason}", file=sys.stderr, flush=True)


class WaitingLogs:
    """The log files of a run, whose lines wait in memory until they may be written.

    It stands in for the handlers of files that are installed, from its making to :meth:`write` or
    :meth:`close`.
    """

    def __init__(self) -> None:
        self._places: list[tuple[logging.Logger, logging.Handler, logging.Handler]] = []
        named = [
            x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)
        ]
        for logger in (logging.getLogger(), *named):
            for handler in [*logger.handlers]:
                if isinstance(handler, logging.FileHandler):
                    waiting = logging.handlers.MemoryHandler(_MOST_WAITING, logging.CRITICAL + 1)
                    waiting.setLevel(handler.level)
                    self._put(logger, handler, waiting)
                    self._places.append((logger, handler, waiting))

    def _put(self, logger: logging.Logger, old: logging.Handler, new: logging.Handler) -> None:
        logger.handlers[logger.handlers.index(old)] = new

    def write(self) -> None:
        """Writes what was said, and has the rest written as it is said."""
        for logger, handler, waiting in self._places:
            assert isinstance(waiting, logging.handlers.MemoryHandler)
            if isinstance(handler, logging.FileHandler) and handler.stream is None:
                with contextlib.suppress(OSError):  # that is said when there is a line for it
                    handler.stream = handler._open()
            waiting.setTarget(handler)
            waiting.flush()
            if waiting in logger.handlers:
                self._put(logger, waiting, handler)
        self._places.clear()

    def close(self) -> None:
        """Drops what still waits; the files stay as they are."""
        for logger, handler, waiting in self._places:
            if waiting in logger.handlers:
                logger.removeHandler(waiting)
            waiting.close()
            handler.close()
        self._places.clear()


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
