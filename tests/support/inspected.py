"""The command ``inspect`` in this process, and files that it is to leave alone."""

import json
from pathlib import Path
from typing import Any

from dpo_lightning.run.inspect.command import main


def inspect_json(capsys: Any, *words: str, code: int = 0) -> dict[str, Any]:
    """The JSON object of a command line, all of standard output."""
    capsys.readouterr()
    assert main(["--json", *words]) == code
    return json.loads(capsys.readouterr().out)


def files_below(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with the time of its last change and its content."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
