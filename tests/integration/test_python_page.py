"""The Python page and the notebook: their code runs as it stands, in its order."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_lightning.settings.program import importing
from tests.support.runs import ROOT

PAGE = ROOT / "docs" / "python.md"
NOTEBOOK = ROOT / "examples" / "first_hour.ipynb"

# A notebook's cells have a running event loop about them.
IN_A_LOOP = """
import asyncio, json, sys

async def main():
    names = {"__name__": "__main__"}
    for cell in json.load(open(sys.argv[1])):
        exec(compile(cell, "<cell>", "exec"), names)

asyncio.run(main())
"""


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.S)


def run_cells(cells: list[str], folder: Path) -> str:
    """Output of the cells, run one after the other in a folder."""
    (folder / "cells.json").write_text(json.dumps(cells))
    done = subprocess.run(
        [sys.executable, "-c", IN_A_LOOP, str(folder / "cells.json")],
        cwd=folder,
        env=importing(os.environ) | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


# Long as it trains, and evaluates in processes of their own.
@pytest.mark.docs
@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_code_of_the_page_runs(tmp_path, tiny_model):
    [parts] = [own for own in blocks() if own.startswith("# my_parts.py")]
    (tmp_path / "my_parts.py").write_text(parts)
    rows = [
        {"ask": f"{n} + 2?", "first": f" {n + 2}", "second": " 5 or so", "verdict": "first"}
        for n in range(12)
    ]
    (tmp_path / "verdicts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    cells = [
        own.replace("Qwen/Qwen2.5-0.5B-Instruct", str(tiny_model))
        for own in blocks()
        if own != parts
    ]
    assert len(cells) == 6
    cells.append(
        "assert (strong.status, result.status, result.step) == ('finished', 'finished', 3)\n"
        "assert result.metrics['samples/kl'] is not None\n"
        "assert trainer.global_step == 40\n"
        "import json\n"
        "rows = [json.loads(line) for line in (weak.folder / 'metrics.jsonl').open()]\n"
        "theirs = [row['train/loss'] for row in rows if 'train/loss' in row][-1]\n"
        "trained = trainer.callback_metrics['eval/loss'].item()\n"
        "assert abs(trained - weak.metrics['eval/loss']) < 1e-6, (trained, weak.metrics)\n"
        "assert measured.groups and tested.differences and len(frontier.points) >= 3\n"
    )
    said = run_cells(cells, tmp_path)
    assert "bta: unknown key; did you mean `beta`?" in said
    assert (tmp_path / "my_policy" / "model.safetensors").is_file()
    # The callback's file ends a training after its first step.
    (tmp_path / "enough").touch()
    again = [cells[5], "assert (result.status, result.step) == ('finished', 1), result"]
    run_cells(again, tmp_path)


# Long for the same reason.
@pytest.mark.docs
@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_notebook_runs(tmp_path):
    found = json.loads(NOTEBOOK.read_text())
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    cells = ["".join(own["source"]) for own in found["cells"] if own["cell_type"] == "code"]
    [steps] = [line for line in cells[0].splitlines() if line.startswith("STEPS = ")]
    said = run_cells([cells[0].replace(steps, "STEPS = 8"), *cells[1:]], tmp_path)
    assert said.count("finished") == 3
    assert (tmp_path / "frontier.png").stat().st_size > 5000


def test_the_notebook_is_kept_without_outputs():
    found = json.loads(NOTEBOOK.read_text())
    code = [own for own in found["cells"] if own["cell_type"] == "code"]
    assert len(code) >= 6
    assert [(own["outputs"], own["execution_count"]) for own in code] == [([], None)] * len(code)


def test_code_of_the_page_compiles():
    for own in blocks():
        compile(own, "page", "exec")
    own_trainer = next(own for own in blocks() if "pl.Trainer(" in own)
    assert len([line for line in own_trainer.splitlines() if line]) <= 15
