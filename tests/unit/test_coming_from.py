"""The pages on coming from another program say what the code answers to a key of theirs."""

import dataclasses

import pytest

from dpo_lightning.settings.foreign_keys import KEYS
from dpo_lightning.settings.keys import is_known, settings
from tests.support.foreign_programs import FIRST_REPOSITORY, RECIPES, TRANSFORMERS, TRL
from tests.support.foreign_tables import (
    FOLDER,
    TableRow,
    check_settings,
    rows_of,
    settings_in,
    table_rows,
)

ROWS = table_rows()

CHOICES = {"loss.name": "loss", "model": "model.pretrained"}
"""Keys that are ours too, as the choice of a group or the key that it stands for."""


def faults(row: TableRow) -> list[str]:
    """Keys of a row whose settings are not those that the code answers with, each with both."""
    found = []
    for key in row.theirs:
        leaf = key.rpartition(".")[2]
        answer = None if is_known(key) else KEYS.get(key, KEYS.get(leaf))
        if key in CHOICES:
            least = most = {CHOICES[key]}
        elif is_known(key) and settings()[key].is_section:
            continue  # a group here, and another thing there
        elif is_known(key):
            least = most = {key}
        elif answer is None:
            least = most = {name for name in settings() if name.rpartition(".")[2] == leaf}
        else:
            texts = [answer.use, *answer.values.values()]
            least = {name for text in texts for name, _ in settings_in(text)}
            most = least or {name for name, _ in settings_in(answer.why)}
        if not least <= row.keys <= most or (answer is None and len(row.keys) != 1):
            found.append(f"{row.page}: {key}: {sorted(row.keys)}, not {sorted(most)}")
    return found


def test_settings_of_the_tables_exist_and_take_their_values():
    assert len(ROWS) > 200
    for row in ROWS:
        for text in row.ours:
            assert settings_in(text), row
            check_settings(text)


def test_tables_and_code_say_the_same():
    assert [fault for row in ROWS for fault in faults(row)] == []


@pytest.mark.parametrize(
    "row",
    [
        TableRow("p", ("lr",), ("optimizer.warmup=<steps>",), ""),
        TableRow("p", ("lr",), (), ""),
        TableRow("p", ("packing",), ("data.batch_size=<groups>",), ""),
        TableRow("p", ("discopop_tau",), ("loss.gamma=",), ""),
        TableRow("p", ("seed",), ("beta=",), ""),
        TableRow("p", ("nonesuch",), ("beta=",), ""),
        TableRow("p", ("bf16",), ("model.dtype=bfloat16",), ""),
    ],
    ids=lambda row: f"{row.theirs[0]}-{len(row.ours)}",
)
def test_a_row_that_differs_from_the_code_is_found(row: TableRow):
    assert len(faults(row)) == 1


def test_each_key_that_the_code_answers_is_in_a_page():
    shown = {key for row in ROWS for key in row.theirs}
    leaves = {key.rpartition(".")[2] for key in shown}
    assert {*KEYS} - shown - leaves == set()


def test_no_key_is_twice_in_one_page():
    for page in {row.page for row in ROWS}:
        keys = [key for row in ROWS if row.page == page for key in row.theirs]
        assert sorted(keys) == sorted({*keys}), page


@pytest.mark.parametrize(
    ("page", "keys"),
    [
        ("trl.md", {*TRL, *TRANSFORMERS} - {"args"}),
        ("original.md", {*FIRST_REPOSITORY}),
        *((page, {*keys}) for page, keys in RECIPES.items()),
    ],
)
def test_a_page_has_each_key_of_its_program(page: str, keys: set[str]):
    """TRL's and transformers' are read off their installed sources, so a new one is missed here."""
    assert keys - {key for row in ROWS if row.page == page for key in row.theirs} == set()


def test_a_table_is_read_with_its_values_and_bars():
    text = r"""
| TRL | here | remark |
|---|---|---|
| `a`, `b` | `peft=lora` for `true`, `peft=none` for `false` | Of `x=1` |
| `c` | `strategy=<auto\|ddp>` | |
| `d` | – | None |

| other | here |
|---|---|
| `e` | `beta=` |
"""
    rows = [dataclasses.astuple(row)[1:] for row in rows_of("p", text)]
    assert rows == [
        (("a", "b"), ("peft=lora", "peft=none"), "Of `x=1`"),
        (("c",), ("strategy=<auto|ddp>",), ""),
        (("d",), (), "None"),
    ]


def test_there_is_a_page_for_each_program():
    assert {path.stem for path in FOLDER.glob("*.md")} == {
        *("trl", "original", "llama_factory", "alignment_handbook", "others"),
    }
