"""Limits on the time and the memory of a chat template, which is a program."""

import mmap
import resource
import signal
import threading
import time

import pytest

from dpo_lightning.data.limits import Bounds, OutOfBounds, bounded
from dpo_lightning.data.rows import PreferenceGroup
from dpo_lightning.data.texts import Message
from dpo_lightning.data.tokens import tokenize_groups
from dpo_lightning.errors import UserError
from tests.support.models import byte_tokenizer

ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# Doubles a text 60 times: 2 EiB.
HUGE = (
    "{% set ns = namespace(s='xx') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}"
    "{% endfor %}{{ ns.s }}"
)
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def tokenize(template: str):
    group = PreferenceGroup(
        prompt=(Message("user", "a"),),
        responses=((Message("assistant", "b"),), (Message("assistant", "c"),)),
        ranks=(1, 2),
        weight=1.0,
        target_margin=None,
        source="rows.jsonl:7",
    )
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenize_groups([group], tokenizer, max_length=64, truncation="drop")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "what"),
    [(ENDLESS, "processor time"), (HUGE, "of memory"), ("{{ 'x' * 99999999999 }}", "of memory")],
)
def test_a_template_that_takes_too_much_is_stopped_and_named(template, what, monkeypatch):
    monkeypatch.setattr("dpo_lightning.data.rendering.Bounds", lambda: Bounds(seconds=0.5))
    with pytest.raises(UserError) as caught:
        tokenize(template)
    assert what in str(caught.value)
    assert "rows.jsonl:7" in str(caught.value)
    assert "data.chat_template=" in str(caught.value)


def test_a_template_as_they_are_is_let_through():
    assert len(tokenize(PLAIN).groups) == 1


def _spin() -> None:
    """Never ends, and catches every exception on the way."""
    while True:
        try:
            while True:
                pass
        except Exception:
            continue


def test_nothing_is_left_behind():
    before = (
        resource.getrlimit(resource.RLIMIT_AS),
        signal.getsignal(signal.SIGVTALRM),
        signal.getitimer(signal.ITIMER_VIRTUAL),
    )
    with bounded():
        assert resource.getrlimit(resource.RLIMIT_AS) != before[0]
    with pytest.raises(OutOfBounds), bounded(seconds=0.05):
        _spin()
    with pytest.raises(ZeroDivisionError), bounded():
        _ = 1 / 0
    assert before == (
        resource.getrlimit(resource.RLIMIT_AS),
        signal.getsignal(signal.SIGVTALRM),
        signal.getitimer(signal.ITIMER_VIRTUAL),
    )


def test_what_catches_every_exception_cannot_go_on():
    with pytest.raises(OutOfBounds), bounded(seconds=0.05):
        _spin()


def test_another_thread_has_no_clock_and_no_fault():
    done = []

    def work() -> None:
        with bounded(seconds=0.05):
            done.append(sum(range(10)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [45]


@pytest.mark.slow
def test_each_piece_has_the_whole_time():
    """Four pieces of 0.15 s within a limit of 0.4 s, and one that goes on for ever."""

    def work(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    with Bounds(seconds=0.4) as bounds:
        for _ in range(4):
            with bounds.piece:
                work(0.15)
        with pytest.raises(OutOfBounds, match=r"0\.4 s"), bounds.piece:
            work(4)
        with bounds.piece:
            work(0.15)
    assert not bounds.is_entered


def test_what_earlier_pieces_have_left_does_not_count():
    """Of 10 MiB each, 200 pieces keep 2 GiB, and each may take 1 GiB."""
    kept = []
    with Bounds(memory=1 << 30) as bounds:
        for _ in range(200):
            with bounds.piece:
                kept.append(mmap.mmap(-1, 10 << 20))
        with pytest.raises(OutOfBounds, match="1 GiB"), bounds.piece:
            bytearray(2 << 30)
    for region in kept:
        region.close()
