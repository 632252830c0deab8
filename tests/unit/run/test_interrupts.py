"""Ctrl-C that meets an import, which may swallow it or fail by it."""

import os
import signal
import time

import pytest

from dpo_lightning.errors import UserError
from dpo_lightning.processes.signals import stop_if_interrupted
from dpo_lightning.run import supervise
from dpo_lightning.run.guard import guarded
from tests.support.runs import TINY, run_train


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(5)


def swallow(argv: list[str]) -> int:
    try:
        interrupt()
    except KeyboardInterrupt:
        return 0
    raise AssertionError("nobody was interrupted")


@pytest.mark.parametrize("kind", [UserError, ImportError, RecursionError])
def test_an_error_made_of_an_interrupt_is_the_interrupt(capsys, kind):
    def command(argv: list[str]) -> int:
        swallow(argv)
        raise kind("no module of that name")

    assert guarded(command, []) == 130
    assert capsys.readouterr().err == ""


def test_an_error_without_one_is_said(capsys):
    def command(argv: list[str]) -> int:
        raise UserError("no such file")

    assert guarded(command, []) == 2
    assert capsys.readouterr().err == "error: no such file\n"


def test_a_swallowed_interrupt_is_raised_again():
    def command(argv: list[str]) -> int:
        swallow(argv)
        stop_if_interrupted()
        return 0

    before = signal.getsignal(signal.SIGINT)
    assert guarded(command, []) == 130
    assert guarded(lambda argv: 0, []) == 0
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_fails_by_an_interrupt_is_stopped(tmp_path, monkeypatch):
    def load_plugins(names: list[str]) -> None:
        try:
            interrupt()
        except SystemExit as error:
            raise UserError("plugins: no such module") from error

    monkeypatch.setattr(supervise, "load_plugins", load_plugins)
    run = run_train(tmp_path / "run", *TINY)
    assert run.code == 130
    assert (run.result["status"], run.result["error"]) == ("stopped", "stopped by SIGINT")
