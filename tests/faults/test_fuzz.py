"""Ten thousand rows and more than a thousand command lines, none of which raises anything."""

import json
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dpo_lightning.models.loading import load_tokenizer
from dpo_lightning.models.source import set_chat_template
from tests.support.commands import check_command, commands, files, own_place
from tests.support.models import byte_tokenizer
from tests.support.odd_rows import check_rows, lines, read, rows, tables, write_table
from tests.support.properties import examples

pytestmark = pytest.mark.faults

TRUNCATIONS = st.sampled_from(["drop", "prompt", "response"])


def thorough(count: int) -> settings:
    return settings(
        suppress_health_check=list(HealthCheck),
        max_examples=examples(count),
        derandomize=False,  # other ones each time
        database=None,
        phases=[Phase.generate, Phase.shrink],
    )


@pytest.fixture(scope="module", params=["bytes", "stories260k"])
def tokenizer(request):
    if request.param == "bytes":
        tokenizer = byte_tokenizer()
    else:
        folder = request.getfixturevalue("shared") / "models" / "stories260k"
        tokenizer = load_tokenizer(str(folder), key="model.pretrained")
    set_chat_template(tokenizer, None, needed=True)
    return tokenizer


def test_five_thousand_rows_of_each_tokenizer(tokenizer, tmp_path):
    """Two kinds of text file and tables: at least 5,000 rows come back, good or bad."""
    seen = 0

    @thorough(400)
    @given(st.lists(lines, min_size=8, max_size=12), TRUNCATIONS, st.sampled_from([b"\n", b"\r\n"]))
    def of_lines(found, truncation, ending):
        nonlocal seen
        path = tmp_path / "rows.jsonl"
        path.write_bytes(ending.join(found))
        seen += check_rows(read(path), tokenizer, truncation=truncation)

    @thorough(400)
    @given(st.lists(rows, min_size=8, max_size=12), TRUNCATIONS)
    def of_elements(found, truncation):
        nonlocal seen
        path = tmp_path / "rows.json"
        path.write_text(json.dumps(found))
        seen += check_rows(read(path), tokenizer, truncation=truncation)

    @thorough(200)
    @given(tables, TRUNCATIONS)
    def of_tables(table, truncation):
        nonlocal seen
        path = tmp_path / "rows.parquet"
        write_table(path, table)
        seen += check_rows(read(path), tokenizer, truncation=truncation)

    of_lines()
    of_elements()
    of_tables()
    assert seen >= 5_000


def test_a_thousand_command_lines(tmp_path: Path):
    with own_place(tmp_path):

        @thorough(1000)
        @given(commands)
        def check(line):
            check_command(line)

        check()


def test_three_hundred_files_of_ones_own(tmp_path: Path):
    with own_place(tmp_path):
        path = tmp_path / "own" / "experiment" / "mine.yaml"

        @thorough(300)
        @given(files)
        def check(content):
            text = yaml.safe_dump(content, allow_unicode=True)
            path.write_text(f"# @package _global_\n{text}")
            check_command(["--config-dir=own", "experiment=mine"])

        check()
