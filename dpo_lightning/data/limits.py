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
# Pieces after which the process's size is looked up again; what they leave behind makes it grow.
_MEASURED_EACH = 64


class OutOfBounds(Exception):
    """The code took more time or memory than it may."""


class _Interrupt(BaseException):
    """Exception that is raised in the code; no ``except Exception`` on the way may keep it."""


class Bounds:
    """Context for many pieces of such code, each of which is ended when it takes too much.

    Each piece is a context of its own, :attr:`piece`. What the limits need is made ready once, as
    that would cost more than the pieces.

    Only the main thread can be interrupted: in another one there is no limit on time.

    Args:
        seconds: Processor time of the process for a piece.
        memory: Bytes of address space on top of what the process has.
    """

    def __init__(self, *, seconds: float = SECONDS, memory: int = MEMORY) -> None:
        self.seconds = seconds
        self.memory = memory
        self.piece = _Piece(self)
        self._ready = contextlib.ExitStack()
        self._pieces = 0
        self._is_entered = False
        self._is_timed = False
        self._earlier: tuple[int, int] | None = None

    @property
    def is_entered(self) -> bool:
        """True inside of the context."""
        return self._is_entered

    def __enter__(self) -> Bounds:
        self._is_entered = True
        is_main = threading.current_thread() is threading.main_thread()
        self._is_timed = is_main and hasattr(signal, "ITIMER_VIRTUAL")
        self._pieces = 0
        if self._is_timed:
            earlier = signal.signal(signal.SIGVTALRM, _interrupt)
            self._ready.callback(signal.signal, signal.SIGVTALRM, earlier)
        if resource is not None:
            self._earlier = resource.getrlimit(resource.RLIMIT_AS)
            self._ready.callback(resource.setrlimit, resource.RLIMIT_AS, self._earlier)
        return self

    def __exit__(self, *error: object) -> None:
        self._is_entered = False
        self._ready.close()

    def start(self) -> None:
        """Begins a piece."""
        if self._pieces % _MEASURED_EACH == 0:
            self._limit_memory()
        self._pieces += 1
        if self._is_timed:
            # Again and again: a handler of the code itself may have swallowed the first.
            signal.setitimer(signal.ITIMER_VIRTUAL, self.seconds, _AGAIN_SECONDS)

    def stop(self) -> None:
        """Ends it."""
        if self._is_timed:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)

    def _limit_memory(self) -> None:
        size = _address_space()
        if self._earlier is None or size is None:
            return
        limits = (size + self.memory, *self._earlier)
        least = min(limit for limit in limits if limit != resource.RLIM_INFINITY)
        resource.setrlimit(resource.RLIMIT_AS, (least, self._earlier[1]))


class _Piece:
    """Context of one piece; it says what the piece took too much of."""

    def __init__(self, bounds: Bounds) -> None:
        self._bounds = bounds

    def __enter__(self) -> None:
        self._bounds.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bounds.stop()
        if kind is None:
            return
        if issubclass(kind, _Interrupt):
            raise OutOfBounds(f"more than {self._bounds.seconds:g} s of processor time") from None
        if issubclass(kind, MemoryError):
            size = self._bounds.memory / (1 << 30)
            raise OutOfBounds(f"more than {size:g} GiB of memory") from None


@contextlib.contextmanager
def bounded(*, seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Context that ends the code inside when it takes too much.

    Args:
        seconds: Processor time of the process.
        memory: Bytes of address space on top of what the process has.

    Raises:
        OutOfBounds: With what it took too much of.
    """
    with Bounds(seconds=seconds, memory=memory) as bounds, bounds.piece:
        yield


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise _Interrupt


def _address_space() -> int | None:
    """Bytes that the process has mapped; None where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()
