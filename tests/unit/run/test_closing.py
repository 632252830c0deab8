"""The last lines of a run: paths as they are typed here, commands as this user starts them."""

import sys
from pathlib import Path

import pytest

from dpo_lightning.run.closing import closing_lines


@pytest.mark.parametrize(
    ("argv0", "program"),
    [("train.py", "python -m dpo_lightning"), ("/usr/bin/dpo-lightning", "dpo-lightning")],
)
def test_the_commands_are_those_of_a_clone_or_of_the_installed_program(
    tmp_path, monkeypatch, argv0: str, program: str
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [argv0])
    run = tmp_path / "outputs" / "a run"
    assert closing_lines(run, merged=None, profile=None) == {
        "model": "outputs/a run/model",
        "try it": f"{program} chat 'outputs/a run'",
        "compare": f"{program} compare 'outputs/a run' OTHER_RUN",
    }


def test_what_lies_elsewhere_is_named_whole(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run = tmp_path / "run"
    lines = closing_lines(run, merged=run / "model-merged", profile=run / "profile")
    assert [*lines] == ["model", "merged", "try it", "compare", "profile"]
    assert Path(lines["model"]) == run / "model"
    assert Path(lines["profile"]) == run / "profile"
    assert str(run) in lines["try it"]
