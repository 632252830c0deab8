"""The tutorial, typed from its first line to its last in an empty folder."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.page_blocks import blocks
from tests.support.runs import ROOT

PAGE = (ROOT / "docs" / "tutorial.md").read_text()

OWN_MODEL = PAGE.index("## With a model of yours")
"""From here on the page is about a model that is downloaded; tests of pages compose it."""


def typed(folder: Path, lines: str) -> str:
    """Output of bash for lines, where `dpo-lightning` and `python` are those of this clone."""
    for name, words in (("python", ""), ("dpo-lightning", " -m dpo_lightning")):
        command = folder / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{words} "$@"\n')
        command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
    }
    done = subprocess.run(
        ["bash", "-eu", "-o", "pipefail", "-c", lines],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{lines}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.mark.long  # two runs, a sweep of four and what comes after it: minutes
@pytest.mark.timeout(3000)
def test_the_tutorial_from_its_first_line_to_its_last(tmp_path):
    said = ""
    for block in blocks(PAGE[:OWN_MODEL]):
        if block.file:
            (tmp_path / block.file).write_text(block.body)
        elif block.kind == "sh":
            said += typed(tmp_path, block.body)
    first, second = (
        json.loads((tmp_path / "outputs/runs" / name / "result.json").read_text())
        for name in ("first", "second")
    )
    # What the page says of the two runs.
    assert any("hardly moved" in sign["says"] for sign in first["signs"])
    assert "warning sign: the policy hardly moved" in said
    assert second["metrics"]["samples/kl"] > 1
    sweep = tmp_path / "outputs/sweeps/beta"
    assert len([*sweep.glob("beta-*/result.json")]) == 4
    assert json.loads((sweep / "sweep.json").read_text())["pick"]["label"].startswith("β ")
    assert "<html" in (tmp_path / "comparison.html").read_text().lower()
    [answer] = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert answer["response"]
    assert "Dry run: nothing was uploaded." in said
    # The exported folder answers as `generate` did, without this program.
    assert said.rstrip().endswith(answer["response"].strip())


def test_each_snippet_names_its_file_and_is_run():
    """A name that no line types would be a file that a reader makes for nothing."""
    snippets = [block for block in blocks(PAGE) if block.kind == "python"]
    lines = "".join(block.body for block in blocks(PAGE) if block.kind == "sh")
    assert len(snippets) == 3
    for block in snippets:
        assert block.file
        compile(block.body, block.file, "exec")
        assert f"python {block.file}\n" in lines
