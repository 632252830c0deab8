"""Progress of long phases: a bar of one line on a terminal, else a line each half minute."""

import io
import logging
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import Progress as RichProgress

from dpo_lightning.processes.phases import unshown
from dpo_lightning.run.session import _shows
from dpo_lightning.run.session_steps import _show_within
from dpo_lightning.tracking import phases, progress
from dpo_lightning.tracking.phases import Phases
from dpo_lightning.tracking.progress import Progress


def terminal(width: int = 100) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)


def shown(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_terminal_has_a_bar_from_what_is_there_to_all_that_is_needed():
    console = terminal()
    with Phases(console)("reference", total=1000, unit="responses", done=250) as say:
        say(600)
        say(1000)
    assert " 250/1000 responses" in shown(console)
    assert "1000/1000 responses" in shown(console)


def test_a_bar_is_taken_away_by_an_error():
    console = terminal()
    with pytest.raises(ZeroDivisionError), Phases(console)("sampling", total=2, unit="answers"):
        raise ZeroDivisionError
    assert shown(console).endswith("\x1b[?25h")  # the cursor is back


def test_a_log_has_a_line_each_half_minute_and_none_at_the_end(monkeypatch, caplog):
    """100 of 400 are there; after 31 s 150 are: 250 left at 50 in 31 s are 155 s."""
    now = [0.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    show = Phases(None)("reference", total=400, unit="responses", done=100)
    with caplog.at_level(logging.INFO), show as say:
        for seconds, done in ((1.0, 110), (31.0, 150), (32.0, 151), (200.0, 400)):
            now[0] = seconds
            say(done)
    assert caplog.messages == ["reference: 150 of 400 responses, 155s left"]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_a_phase_is_one_line(width):
    """The longest: its name, two numbers of six digits, its unit, and hours."""
    console = terminal(width)
    with Phases(console)("tokenizing", total=999_999, unit="responses") as say:
        say(123_456)
    lines = console_lines(shown(console))
    assert {line.split()[0] for line in lines} == {"tokenizing"}
    assert all("999999 responses" in line and len(line) <= width for line in lines)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_rate_stands_beside_a_phase_on_its_one_line(width):
    console = terminal(width)
    with Phases(console)("sampling", total=99_999, unit="answers") as say:
        say(12_345, "12,345 tokens/s")
    lines = console_lines(shown(console))
    assert all(len(line) <= width for line in lines)
    assert "12345/99999 answers, 12,345 tokens/s" in lines[-1]


def test_a_rate_stands_in_the_line_of_a_log(monkeypatch, caplog):
    """31 s for 5 of 10: as many are left."""
    now = [0.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    with caplog.at_level(logging.INFO), Phases(None)("sampling", total=10, unit="answers") as say:
        now[0] = 31.0
        say(5, "7 tokens/s")
    assert caplog.messages == ["sampling: 5 of 10 answers, 7 tokens/s, 31s left"]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_training_is_one_line_with_loss_and_accuracy(width, monkeypatch):
    """At 60 columns the loss and the accuracy still stand there whole."""
    console = terminal(width)
    monkeypatch.setattr(progress, "get_console", lambda: console)
    bar = Progress(SimpleNamespace(speed="123.4 pairs/s"))
    columns = bar.configure_columns(SimpleNamespace())
    metrics = {"loss": 0.6931, "accuracy": 0.5625, "v_num": 0}
    monkeypatch.setattr(progress.RichProgressBar, "get_metrics", lambda *_: dict(metrics))
    assert bar.get_metrics(None, None) == {}  # Lightning's own column would be one more line
    with RichProgress(*columns, console=console, auto_refresh=False) as shown_bar:
        shown_bar.add_task("training", total=12_345, completed=1_234)
        shown_bar.refresh()
    lines = console_lines(shown(console))
    assert {line.split()[0] for line in lines} == {"training"}
    for line in lines:
        assert "1234/12345" in line
        assert "loss 0.693" in line
        assert ("accuracy 0.562" if width >= 100 else "acc 0.562") in line
        assert ("123.4 pairs/s" in line) == (width >= 100)
        assert len(line) <= width


def test_the_speed_is_of_examples_where_the_loss_is_one_on_single_responses(monkeypatch):
    """Three steps of a pair and two rows, 4 responses each, in two seconds."""
    kto = SimpleNamespace(objective=SimpleNamespace(is_unpaired=True))
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    throughput = progress.Throughput()
    throughput.on_train_start(None, kto)
    step = SimpleNamespace(pairs=1, examples=4, tokens=9)
    for number in range(3):
        throughput.on_train_batch_end(None, kto, None, step, number)
    throughput.on_train_end(None, kto)
    assert throughput.speed == "6.0 examples/s"
    throughput.by_example = False
    assert throughput.speed == "1.5 pairs/s"


@pytest.mark.parametrize("width", [60, 100])
def test_a_phase_inside_the_training_has_a_line_below_its_bar(width, monkeypatch):
    """8 of 32 answers; the line goes, with an error too, and the training's own bar stays."""

    def interrupted(say):
        say(8, "90 tokens/s")
        raise KeyboardInterrupt

    console = terminal(width)
    monkeypatch.setattr(progress, "get_console", lambda: console)
    bar = Progress(SimpleNamespace(speed="1.0 pairs/s"))
    with bar.beside("sampling", total=32, unit="answers") as say:
        say(1)  # before the training there is no bar to stand below
    assert shown(console) == ""
    columns = bar.configure_columns(SimpleNamespace())
    with RichProgress(*columns, console=console, auto_refresh=False) as bar.progress:
        bar.progress.add_task("training", total=12_345, completed=1_234)
        with pytest.raises(KeyboardInterrupt), bar.beside("sampling", total=32, unit="x") as say:
            interrupted(say)
        assert [(t.description, t.visible) for t in bar.progress.tasks] == [
            ("training", True), ("sampling", False)
        ]  # fmt: skip
    lines = console_lines(shown(console))
    assert {line.split()[0] for line in lines} == {"training", "sampling"}
    assert any("8/32" in line and "90 tokens/s"[: width // 10] in line for line in lines)
    assert max(map(len, lines)) <= width


def test_phases_inside_the_training_go_to_its_bar_else_where_all_go():
    bar = Progress(SimpleNamespace(speed="1.0 pairs/s"))
    session = SimpleNamespace(show="a log")
    assert _show_within(session, SimpleNamespace(all=[object(), bar])) == bar.beside
    assert _show_within(session, SimpleNamespace(all=[object()])) == "a log"


@pytest.mark.parametrize(
    ("variables", "shows"),
    [({}, True), ({"RANK": "0"}, True), ({"RANK": "1"}, False), ({"LOCAL_RANK": "1"}, False)],
)
def test_the_first_rank_alone_shows_phases(monkeypatch, variables, shows):
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    show = _shows(SimpleNamespace(progress=True))
    assert isinstance(show, Phases) == shows
    assert (show is unshown) == (not shows)


def console_lines(text: str) -> list[str]:
    """Lines that a terminal was shown, without what moves its cursor."""
    plain = text
    for code in ("\x1b[?25l", "\x1b[?25h", "\x1b[2K", "\x1b[1A"):
        plain = plain.replace(code, "")
    return [line for line in plain.replace("\r", "\n").split("\n") if line.strip()]
