"""The log as a terminal shows it."""

import io
import logging
import sys


class TerminalHandler(logging.Handler):
    """Errors go to standard error, everything else to standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record; the streams are looked up late because progress bars replace them."""
        stream = sys.stderr if record.levelno >= logging.ERROR else sys.stdout
        try:
            print(self.format(record), file=stream, flush=True)
        except Exception:
            self.handleError(record)


def replace_unprintable() -> None:
    """Lets a terminal that has no beta show a question mark instead of ending the program."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
