"""Recordings of wandb, read by wandb's own inspector of its files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def inspected(path: Path, *flags: str) -> str:
    """The text that the inspector prints of a ``.wandb`` file."""
    command = [str(Path(sys.executable).with_name("wandb")), "leet", "inspect", *flags]
    if not Path(command[0]).is_file():
        command[:1] = [sys.executable, "-m", "wandb"]
    return subprocess.run(
        [*command, "--json", str(path)], capture_output=True, text=True, check=True
    ).stdout


def history(path: Path) -> list[dict[str, Any]]:
    """The rows of a run's history, by the name of what was logged."""
    records = [json.loads(line) for line in inspected(path).splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]
