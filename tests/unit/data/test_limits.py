"""Limits on the time and the memory of a chat template, which is a program."""

import resource
import signal
import threading

import pytest

from dpo_lightning.data.limits import OutOfBounds, bounded
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


@pytest.mark.parametrize(
    ("template", "what"),
    [(ENDLESS, "processor time"), (HUGE, "of memory"), ("{{ 'x' * 99999999999 }}", "of memory")],
)
def test_a_template_that_takes_too_much_is_stopped_and_named(template, what, monkeypatch):
    monkeypatch.setattr("dpo_lightning.data.rendering.bounded", lambda: bounded(seconds=0.5))
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
