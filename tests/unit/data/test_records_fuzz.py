"""Whatever a line holds, it becomes a group or a bad row: nothing is raised, none is lost."""

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dpo_lightning.data.records import Rows
from tests.support.odd_rows import GOOD, GOOD_TURNS, check_read, lines, read, rows, values
from tests.support.properties import examples

# Of the public forms the usual row is none, so that the file is refused.
formats = st.sampled_from(["auto", "rows", "sharegpt"])


GOOD_ROWS = 30
"""So many that no fault is one of a fifth of the rows, which refuses the file."""


def many(count: int) -> settings:
    return settings(suppress_health_check=list(HealthCheck), max_examples=examples(count))


def good(format: str) -> dict[str, Any]:
    return GOOD_TURNS if format == "sharegpt" else GOOD


def read_whole(path: Path, format: str, total: int) -> Rows:
    """Reads a file that is not refused, and checks the number of its rows."""
    found = read(path, format)
    assert found is not None
    assert found.total == total
    check_read(found, path.parent)
    return found


@many(300)
@given(st.lists(lines, max_size=6), formats)
@example([b"\xef\xbb\xbf{}", b"\x0c", b"\xff\xfe"], "auto")
@example([b'{"": null}', b'{"\\ud800": 1, "chosen": "\\ud800"}'], "rows")
def test_every_line_of_a_file_is_a_group_or_a_bad_row(found, format):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_bytes(b"\n".join([json.dumps(good(format)).encode()] * GOOD_ROWS + found))
        written = path.read_bytes().split(b"\n")
        kept = [number for number, line in enumerate(written, 1) if line.strip()]
        whole = read_whole(path, format, len(kept))
        numbers = [int(x.source.rsplit(":", 1)[1]) for x in (*whole.groups, *whole.bad)]
        assert sorted(numbers) == kept


@many(200)
@given(st.lists(rows | values, max_size=6), formats)
def test_every_element_of_a_list_is_a_group_or_a_bad_row(found, format):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        path.write_text(json.dumps([good(format)] * GOOD_ROWS + found))
        read_whole(path, format, len(found) + GOOD_ROWS)


@many(100)
@given(st.binary(max_size=60) | lines, st.sampled_from(["jsonl", "json", "parquet"]))
def test_any_file_is_read_or_refused(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"rows.{suffix}")
        path.write_bytes(content)
        found = read(path)
        if found is not None:
            check_read(found, Path(folder))
