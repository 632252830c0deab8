"""Files that other programs read, written whole or not at all. Imports nothing heavy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dpo_lightning.files import write_whole

RESULT_FILE = "result.json"
DIVERGED_FILE = "diverged.json"


def write_json(path: Path, value: Any) -> None:
    """Writes JSON whole or not at all; null stands for what is not finite."""
    write_whole(path, f"{json.dumps(finite(value), indent=2, allow_nan=False)}\n".encode())


def finite(value: Any) -> Any:
    """The value with null for what is not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
