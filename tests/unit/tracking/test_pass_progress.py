"""Progress of a reference pass: a bar on a terminal, else a line each minute."""

import io
import logging

import pytest
from rich.console import Console

from dpo_lightning.tracking import progress
from dpo_lightning.tracking.progress import PassProgress


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_has_a_bar_from_what_is_there_to_all_that_is_needed():
    console = terminal()
    with PassProgress(console)(250, 1000) as say:
        say(600)
        say(1000)
    assert " 250/1000 responses" in shown(console)
    assert "1000/1000 responses" in shown(console)


def test_a_bar_is_taken_away_by_an_error():
    console = terminal()
    with pytest.raises(ZeroDivisionError), PassProgress(console)(0, 2):
        raise ZeroDivisionError
    assert shown(console).endswith("\x1b[?25h")  # the cursor is back


def test_a_log_has_a_line_a_minute_and_none_at_the_end(monkeypatch, caplog):
    """100 of 400 are there; after 61 s 150 are: 250 left at 50 in 61 s are 305 s."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), PassProgress(None)(100, 400) as say:
        for seconds, done in ((1.0, 110), (61.0, 150), (62.0, 151), (200.0, 400)):
            now[0] = seconds
            say(done)
    assert caplog.messages == ["reference: 150 of 400 responses, 305s left"]
