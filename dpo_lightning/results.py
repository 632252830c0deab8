"""Files that other programs read, written whole or not at all. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

RESULT_FILE = "result.json"


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all: staged beside the target, synced, renamed."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    with staged.open("w") as file:
        json.dump(finite(value), file, indent=2, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    staged.replace(path)


def finite(value: Any) -> Any:
    """The value with null for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
