"""A limit on the time and the memory of a piece of code that came from outside: a chat template.

A template is a program, in a sandbox that keeps it from everything but its own loops. Only its
effect can be bounded: the processor time and the memory that one conversation may take.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

try:
    import resource
except ImportError:  # no Unix
    resource = None  # type: ignore[assignment]

SECONDS = 5.0
"""Processor time; a long conversation takes a hundredth of one."""

MEMORY = 1 << 30
"""Bytes on top of what the process has."""

_AGAIN_SECONDS = 0.1


class OutOfBounds(Exception):
    """The code took more time or memory than it may."""


class _Interrupt(BaseException):
    """Exception that is raised in the code; no ``except Exception`` on the way may keep it."""


@contextlib.contextmanager
def bounded(*, seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Context that ends the code inside when it takes too much.

    Only the main thread can be interrupted: in another one there is no limit on time.

    Args:
        seconds: Processor time of the process.
        memory: Bytes of address space on top of what the process has.

    Raises:
        OutOfBounds: With what it took too much of.
    """
    try:
        with _memory(memory), _time(seconds):
            yield
    except _Interrupt:
        raise OutOfBounds(f"more than {seconds:g} s of processor time") from None
    except MemoryError:
        raise OutOfBounds(f"more than {memory / (1 << 30):g} GiB of memory") from None


@contextlib.contextmanager
def _time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(
        signal, "ITIMER_VIRTUAL"
    ):
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise _Interrupt

    earlier = signal.signal(signal.SIGVTALRM, interrupt)
    try:
        # Again and again: a handler of the code itself may have swallowed the first.
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds, _AGAIN_SECONDS)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, earlier)


@contextlib.contextmanager
def _memory(extra: int) -> Iterator[None]:
    size = _address_space()
    if resource is None or size is None:
        yield
        return
    earlier = resource.getrlimit(resource.RLIMIT_AS)
    limits = [limit for limit in (size + extra, *earlier) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, earlier)


def _address_space() -> int | None:
    """Bytes that the process has mapped; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()
