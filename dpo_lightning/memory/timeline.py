"""Live bytes of a step, part by part: traced with few layers, put together for all of them.

Each layer's forward and backward pass is an event: the most bytes in it above those at its
beginning, and the bytes that it leaves. Events of further layers of a kind are those of its second
one, so the sum over all layers is exact, wherever its peak is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from dpo_lightning.memory.live import LiveBytes


@dataclass(frozen=True, slots=True)
class Event:
    """A part of a step.

    Attributes:
        layer: Which of the traced layers it is; None for what is outside of them.
        forward: True in a forward pass, as far as it is a layer's.
        peak: Most live bytes in it, above those at its beginning.
        change: Bytes that are alive at its end and were not at its beginning.
    """

    layer: int | None
    forward: bool
    peak: int
    change: int


class Recorder:
    """Events of a step, told apart by hooks of its layers.

    Args:
        live: The counter; entered.

    Attributes:
        events: Those that have ended.
        backward: True while a backward pass goes on, in which layers may be computed again.
    """

    def __init__(self, live: LiveBytes) -> None:
        self.events: list[Event] = []
        self.backward = False
        self._live = live
        self._open: tuple[int | None, bool] = (None, True)
        self._start = live.now
        live.begin()

    def mark(self, layer: int | None, *, forward: bool) -> None:
        """Ends an event and begins the next."""
        live = self._live
        own = self._open
        self.events.append(Event(*own, live.peak - self._start, live.now - self._start))
        self._open = (layer, forward)
        self._start = live.now
        live.begin()

    def watch(self, layers: Sequence[nn.Module]) -> None:
        """Hangs hooks on the traced layers, in their order."""
        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._enters(number), with_kwargs=True)
            layer.register_forward_hook(self._leaves(number, last=number + 1 == len(layers)))

    def _enters(self, number: int) -> Any:
        def enters(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self.backward:
                return
            self.mark(number, forward=True)
            states = next(_tensors([args, *kwargs.values()]), None)
            if number == 0 and states is not None and states.requires_grad:
                states.register_hook(lambda _: self.mark(None, forward=False))

        return enters

    def _leaves(self, number: int, *, last: bool) -> Any:
        def leaves(module: nn.Module, args: Any, output: Any) -> None:
            if self.backward:
                return
            states = next(_tensors([output]), None)
            if states is not None and states.requires_grad:
                states.register_hook(lambda _: self.mark(number, forward=False))
            if last:
                self.mark(None, forward=True)

        return leaves


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def put_together(events: Sequence[Event], layers: Sequence[int]) -> tuple[int, int]:
    """The peak of all layers, and what is left, above what there was before.

    Args:
        events: Of the traced layers.
        layers: For each layer of the model, the traced one that it is like.

    Example:
        Two layers keep 3 bytes each and give them back; the head takes 4 more for a while.

        >>> kept = [Event(0, True, 3, 3), Event(None, True, 4, 0), Event(0, False, 1, -3)]
        >>> put_together(kept, [0, 0])
        (10, 0)
    """
    live = peak = 0
    for event in _of_all(events, layers):
        peak = max(peak, live + event.peak)
        live += event.change
    return peak, live


def _of_all(events: Sequence[Event], layers: Sequence[int]) -> Iterator[Event]:
    for (inside, forward), found in groupby(
        events, key=lambda event: (event.layer is not None, event.forward)
    ):
        if not inside:
            yield from found
            continue
        for passed in _passes(found):
            order = layers if forward else reversed(layers)
            yield from (passed[number] for number in order if number in passed)


def _passes(events: Iterable[Event]) -> Iterator[dict[int | None, Event]]:
    """Events of one layer after the other; where one comes again another pass begins."""
    passed: dict[int | None, Event] = {}
    for event in events:
        if event.layer in passed:
            yield passed
            passed = {}
        passed[event.layer] = event
    if passed:
        yield passed
