"""The tutorial, typed from its first line to its last in an empty folder."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.runs import ROOT

PAGE = (ROOT / "docs" / "tutorial.md").read_text()

OWN_MODEL = PAGE.index("## With a model of yours")
"""From here on the page is about a model that is downloaded; tests of pages compose it."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Kind and lines of each block of the page, in its order; those in lists too."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```", text, flags=re.S | re.M)
    return [(kind, re.sub(rf"^{indent}", "", body, flags=re.M)) for indent, kind, body in found]


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
    for kind, body in blocks(PAGE[:OWN_MODEL]):
        if kind == "python":
            name = body.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(body)
        elif kind == "sh":
            said += typed(tmp_path, body)
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


def test_blocks_are_read_in_order_and_out_of_lists():
    text = "```sh\na\n```\n\n- b:\n\n  ```sh\n  c\n    d\n  ```\n\n```text\ne\n```\n"
    assert blocks(text) == [("sh", "a\n"), ("sh", "c\n  d\n"), ("text", "e\n")]


def test_each_snippet_names_its_file_and_is_run():
    """A name that no line types would be a file that a reader makes for nothing."""
    snippets = [body for kind, body in blocks(PAGE) if kind == "python"]
    lines = "".join(body for kind, body in blocks(PAGE) if kind == "sh")
    assert len(snippets) == 3
    for body in snippets:
        name = body.partition("\n")[0].removeprefix("# ")
        compile(body, name, "exec")
        assert f"python {name}\n" in lines
