"""Whatever stands in a file: no row is lost, nothing but a line to the user is raised."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_lightning.models.source import set_chat_template
from tests.support.models import byte_tokenizer
from tests.support.odd_rows import check_rows, lines, read, rows, tables, write_table
from tests.support.properties import examples

quick = settings(suppress_health_check=list(HealthCheck), max_examples=examples(40))
truncations = st.sampled_from(["drop", "prompt", "response"])
endings = st.sampled_from([b"\n", b"\r\n"])


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = byte_tokenizer()
    set_chat_template(tokenizer, None, needed=True)
    return tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("rows")


@quick
@given(
    st.lists(lines, max_size=8),
    truncations,
    endings,
    st.booleans(),
    st.sampled_from(["auto", "rows", "sharegpt"]),
)
def test_lines(tokenizer, folder, found, truncation, ending, is_ended, format):
    path = folder / "rows.jsonl"
    path.write_bytes(ending.join(found) + (ending if is_ended else b""))
    check_rows(read(path, format), tokenizer, truncation=truncation)


@quick
@given(st.lists(rows, max_size=8), truncations)
def test_elements(tokenizer, folder, found, truncation):
    path = folder / "rows.json"
    path.write_text(json.dumps(found))
    check_rows(read(path), tokenizer, truncation=truncation)


@pytest.mark.slow
@quick
@given(tables, truncations)
def test_tables(tokenizer, folder, table, truncation):
    path = folder / "rows.parquet"
    write_table(path, table)
    check_rows(read(path), tokenizer, truncation=truncation)
