"""Questions over HTTP: deadline, size, waits and their end."""

import threading
import time

import pytest

from dpo_lightning.evaluation.posting import PostFailure, Server, open_poster
from tests.support.completions_server import completions


def server(url: str, **more) -> Server:
    facts = {"timeout": 5.0, "retries": 0, "concurrency": 2, "largest_reply": 1000}
    return Server(url, key_variable=None, timeout_setting="some.timeout", **(facts | more))


def drip(parts: int, size: int, sent: list[int]):
    for number in range(parts):
        sent.append(number)
        yield b"x" * size
        time.sleep(0.05)


def test_a_reply_that_comes_slowly_has_a_deadline_as_a_whole():
    """A byte each 0.05 s for three seconds: no pause is as long as the timeout of 0.3 s."""
    with (
        completions(lambda body, number: (200, drip(60, 1, []))) as sent,
        open_poster(server(sent.url, timeout=0.3)) as poster,
        pytest.raises(PostFailure, match=r"^no reply within some.timeout=0.3 s$") as caught,
    ):
        poster.post("/completions", {"prompt": [1]})
    assert caught.value.again


def test_a_reply_without_end_is_left_and_not_asked_for_again():
    """More than 1,000 bytes are the eleventh part of 100; the server had 100 to send."""
    parts: list[int] = []
    with (
        completions(lambda body, number: (200, drip(100, 100, parts))) as sent,
        open_poster(server(sent.url, retries=3)) as poster,
    ):
        with pytest.raises(PostFailure, match="without end"):
            poster.post("/completions", {"prompt": [1]})
        assert poster.requests == 1
    assert len(parts) < 50


def test_a_server_says_how_long_to_wait_and_not_too_long():
    waits: list[float] = []

    def busy(body, number):
        return 429, b"later", {"Retry-After": "7" if number == 0 else "301"}

    with (
        completions(busy) as sent,
        open_poster(server(sent.url, retries=3), waits.append) as poster,
        pytest.raises(PostFailure, match=r"answers 429 \(later\) and asks to wait 301 s"),
    ):
        poster.post("/completions", {"prompt": [1], "left_out": None})
    assert waits == [7.0]
    assert sent.bodies == [{"prompt": [1]}] * 2


def test_what_is_stopped_waits_no_longer():
    """The server asks for a minute; the thread ends at once when nothing more is to be asked."""
    failures: list[str] = []
    asked = threading.Event()

    def busy(body, number):
        asked.set()
        return 503, b"", {"Retry-After": "60"}

    with completions(busy) as sent, open_poster(server(sent.url, retries=3)) as poster:

        def ask() -> None:
            with pytest.raises(PostFailure) as caught:
                poster.post("/completions", {})
            failures.append(caught.value.why)

        thread = threading.Thread(target=ask)
        thread.start()
        assert asked.wait(10)
        poster.stop()
        thread.join(10)
        assert not thread.is_alive()
    assert failures == ["it answers 503"]


def test_the_first_error_ends_all_questions():
    def ask(number: int) -> int:
        if number == 2:
            raise ValueError("no")
        return number * 2

    with completions(lambda body, number: (200, {})) as sent:
        with open_poster(server(sent.url)) as poster, pytest.raises(ValueError, match="no"):
            poster.each(ask, range(1000))
        with open_poster(server(sent.url)) as poster:
            assert poster.each(ask, [0, 1, 5]) == [0, 2, 10]
