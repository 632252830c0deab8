"""Rows of a file, read as the run reads them."""

import json
from pathlib import Path
from typing import Any

from dpo_lightning.data.records import (
    BadRow,
    Rows,
    read_rows,
)

GOOD: dict[str, Any] = {"prompt": "Say hi.", "chosen": " Hello.", "rejected": " Go away."}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def read_lines(folder: Path, *lines: object, format="auto", columns=None) -> Rows:
    """Reads lines: bytes as they are, anything else as JSON."""
    path = folder / "rows.jsonl"
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    )
    return read_rows(
        str(path), format=format, columns=columns or {}, split=None, subset=None, revision=None
    )


def read_bad(folder: Path, row: object, **options) -> BadRow:
    """Reads a bad row as line 3, after a good one and a blank line."""
    good: dict[str, Any] = GOOD
    if options.get("format") == "sharegpt":
        turns = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
        good = {"conversations": [turns[0]], "chosen": turns[1], "rejected": turns[1]}
    rows = read_lines(folder, good, b"", row, **options)
    assert rows.total == 2
    assert [group.source for group in rows.groups] == [f"{folder}/rows.jsonl:1"]
    (bad,) = rows.bad
    assert bad.source == f"{folder}/rows.jsonl:3"
    assert "\n" not in bad.problem
    return bad
