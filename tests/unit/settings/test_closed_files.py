"""Files and folders that this user may not read: refused by key and name."""

import os
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning import cli
from tests.support.runs import TINY

DENIED = "Permission denied; check its permissions"


@pytest.fixture
def closed(monkeypatch):
    """Closes a path to this process, whoever it is: root may read all."""

    def close(path: Path) -> None:
        opened, access, exists = Path.open, os.access, Path.exists

        def deny(where: Any) -> bool:
            return Path(where) == path or path in Path(where).parents

        def open_(self: Path, *arguments: Any, **options: Any) -> Any:
            if deny(self):
                raise PermissionError(13, "Permission denied", str(self))
            return opened(self, *arguments, **options)

        def exists_(self: Path, **options: Any) -> bool:
            if path in self.parents and path.is_dir():
                raise PermissionError(13, "Permission denied", str(self))
            return exists(self, **options)

        monkeypatch.setattr(Path, "open", open_)
        monkeypatch.setattr(Path, "exists", exists_)
        monkeypatch.setattr(
            os, "access", lambda where, mode, **options: not deny(where) and access(where, mode)
        )

    return close


def said(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> str:
    assert cli.main([*TINY, "logger=none", f"hydra.run.dir={folder / 'run'}", *words]) == 2
    assert not (folder / "run" / "metrics.jsonl").is_file()
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "inside/rows.jsonl"])
def test_rows(tmp_path, capsys, closed, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    closed(path.parent if "/" in name else path)
    words = (f"data.train={path}", "model.pretrained=some/model")
    assert said(capsys, tmp_path, *words).startswith(f"error: data.train={path}: {DENIED}")


def test_a_template(tmp_path, capsys, closed, tiny_model):
    rows, path = tmp_path / "rows.jsonl", tmp_path / "mine.jinja"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    path.write_text("{{ messages }}")
    closed(path)
    words = (f"data.train={rows}", f"model.pretrained={tiny_model}", f"data.chat_template={path}")
    assert said(capsys, tmp_path, *words).startswith(f"error: data.chat_template={path}: {DENIED}")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer_config.json", None])
def test_a_model(tmp_path, capsys, closed, tiny_model, name):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    closed(tiny_model if name is None else tiny_model / name)
    line = said(capsys, tmp_path, f"data.train={rows}", f"model.pretrained={tiny_model}")
    what = "the folder" if name is None else name
    assert line == f"error: model.pretrained={tiny_model}: {what} cannot be read: {DENIED}"


def test_recorded_settings(tmp_path, capsys, closed):
    path = tmp_path / "config.yaml"
    path.write_text("beta: 0.1")
    closed(path)
    assert said(capsys, tmp_path, "--config", str(path)) == f"error: {path}: {DENIED}"
