"""Sources of rows, read or refused."""

import json
from pathlib import Path

import pytest

from dpo_lightning.data.records import read_rows
from dpo_lightning.errors import UserError


def read(source, *, format="auto", columns=None, split="train", subset=None, revision=None, **key):
    return read_rows(
        str(source),
        format=format,
        columns=columns or {},
        split=split,
        subset=subset,
        revision=revision,
        **key,
    )


def write(path: Path, content) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def refused(source, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(source, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    return message
