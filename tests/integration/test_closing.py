"""The last lines of a run can be typed, and nothing is said twice."""

import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning.__main__ import main
from tests.support.runs import ROOT, TINY, run_train


@pytest.mark.slow  # two runs, and what they name
def test_the_last_lines_of_a_run_can_be_followed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = run_train(tmp_path / "other", *TINY, "trainer.max_steps=2", "seed=2")
    capsys.readouterr()
    run = run_train(tmp_path / "run", *TINY, "trainer.max_steps=2")
    assert run.code == other.code == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    last = {line[:9].strip(): line[10:] for line in lines[-3:]}
    assert [*last] == ["model", "try it", "compare"]
    assert (Path(last["model"]) / "model.safetensors").is_file()
    begin = ["python", "-m", "dpo_lightning"]

    def follow(line: str) -> str:
        words = shlex.split(line)
        assert words[:3] == begin
        assert main(words[3:]) == 0
        return capsys.readouterr().out

    monkeypatch.setattr(sys, "stdin", io.StringIO("fog snow\n"))
    assert len(follow(last["try it"]).splitlines()) >= 2
    told = follow(last["compare"].replace("OTHER_RUN", str(other.folder)))
    assert told.startswith("differences")
    assert said_twice(lines) == []


def said_twice(lines: list[str]) -> list[str]:
    """Lines that are there more than once, but for tables and answers."""
    drawn = "━┃│┏┗┡└┌┐╭╰"
    return [line for line in lines if line and line[0] not in drawn and lines.count(line) > 1]


@pytest.mark.long  # starts two processes
def test_two_ranks_say_things_once_and_no_library_warns(tmp_path):
    """Lightning warned of ``sync_dist`` in twelve lines a rank."""
    words = [*TINY, "trainer.max_steps=2", "logger=none", "hydra.run.dir=run", "trainer.devices=2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "trainer.accelerator=cpu", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    assert [line for line in said if "Warning" in line or "sync_dist" in line] == []
    assert said_twice(said) == []
