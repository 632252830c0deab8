"""Columns that training does not read, found by the places of the rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_lightning.data.columns import column_values
from dpo_lightning.data.records import read_rows
from dpo_lightning.errors import UserError

OPTIONS: dict[str, Any] = {"split": "train", "subset": None, "revision": None, "key": "data.eval"}


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pair(number: int, **more: object) -> dict[str, Any]:
    return {"prompt": f"p{number}", "chosen": "a", "rejected": "b", **more}


def test_values_are_at_the_places_that_groups_have(tmp_path):
    """Of two files, one of which lacks the column in a row; blank lines count as lines."""
    one = write(tmp_path / "a.jsonl", [pair(0, source="x"), pair(1), pair(2, source=3)])
    (tmp_path / "b.csv").write_text("prompt,chosen,rejected,source\nq,c,d,y\n")
    source = [one, str(tmp_path / "b.csv")]
    found = column_values(source, "source", **OPTIONS)
    rows = read_rows(
        source,
        format="auto",
        columns={},
        split="train",
        subset=None,
        revision=None,
        ignore=["source"],
    )
    assert [found.get(group.source) for group in rows.groups] == ["x", None, 3, "y"]


def test_a_part_of_an_object_is_named_by_a_dot(tmp_path):
    rows = [pair(0, meta={"lang": "en"}), pair(1, **{"meta.lang": "de"}), pair(2, meta=3)]
    path = write(tmp_path / "a.jsonl", rows)
    found = column_values(path, "meta.lang", **OPTIONS)
    assert found == {f"{path}:1": "en", f"{path}:2": "de"}


def test_an_unknown_column_is_refused_with_those_that_are_there(tmp_path):
    path = write(tmp_path / "a.jsonl", [pair(0, source="x")])
    with pytest.raises(UserError) as caught:
        column_values(path, "sorce", **OPTIONS)
    said = str(caught.value)
    assert said == (
        f"--slice sorce: no row of data.eval={path} has that column; there are prompt, chosen, "
        "rejected, source"
    )
