"""Whatever a line holds, it becomes a group or a bad row: nothing is raised, none is lost."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dpo_lightning.data.records import (
    FORMATS,
    Message,
    PreferenceGroup,
    Rows,
    check_bad_rows,
    read_rows,
    write_quarantine,
)
from dpo_lightning.errors import UserError
from tests.support.properties import examples

# So that the columns of the file as a whole are right.
GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
GOOD_TURNS = {
    "conversations": [{"from": "human", "value": "p"}],
    "chosen": {"from": "gpt", "value": "a"},
    "rejected": {"from": "gpt", "value": "b"},
}
FIELDS = (*GOOD, "responses", "ranks", "scores", "weight", "target_margin", "conversations")

# JSON has lone surrogates, NaN and integers of any size, and so has Python's reader of it.
strings = st.text(st.characters(), max_size=6) | st.sampled_from(["p", "p a", "p b", ""])
numbers = st.integers(-3, 3) | st.integers() | st.floats() | st.just(10**400)
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | strings,
        "content": strings | st.none(),
        "from": st.sampled_from(["human", "gpt", "bot"]),
        "value": strings,
    },
)
scalars = st.none() | st.booleans() | numbers | strings
values = st.recursive(
    scalars | messages,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=2),
    max_leaves=8,
)
turns = st.lists(messages, max_size=3)
likely = {
    "responses": st.lists(strings | turns, max_size=4),
    "ranks": st.lists(numbers, max_size=4),
    "scores": st.lists(numbers, max_size=4),
    "weight": numbers,
    "target_margin": numbers,
}
rows_of_fields = st.fixed_dictionaries(
    {}, optional={name: likely.get(name, strings | turns) | values for name in FIELDS}
)
lines = (
    st.binary(max_size=40)
    | rows_of_fields.map(lambda row: json.dumps(row).encode())
    | rows_of_fields.map(lambda row: json.dumps(row).encode()[:-1])
    | values.map(lambda value: json.dumps(value).encode())
    | st.integers(1, 3000).map(lambda depth: b'{"prompt":' * depth)
)


def read(path: Path, format: str) -> Rows:
    return read_rows(str(path), format=format, columns={}, split=None, subset=None, revision=None)


def check(rows: Rows, total: int, folder: Path) -> None:
    assert rows.total == len(rows.groups) + len(rows.bad) == total
    for group in rows.groups:
        check_group(group)
    for bad in rows.bad:
        assert f"{bad.field}{bad.problem}{bad.source}".isprintable()
    write_quarantine(folder / "quarantine.jsonl", rows.bad)
    written = (folder / "quarantine.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line)["source"] for line in written[:-1]] == [b.source for b in rows.bad]
    if rows.bad:
        with pytest.raises(UserError) as caught:
            check_bad_rows(rows, on_bad_row="stop")
        assert str(caught.value).isprintable()
    else:
        check_bad_rows(rows, on_bad_row="stop")


def check_group(group: PreferenceGroup) -> None:
    texts = (group.prompt, *group.responses)
    assert len({type(text) for text in texts}) == 1
    for text in texts:
        assert isinstance(text, str) or (text and all(isinstance(m, Message) for m in text))
    assert len(group.responses) == len(group.ranks) >= 2
    assert group.ranks[0] == 1
    steps = [b - a for a, b in zip(group.ranks, group.ranks[1:], strict=False)]
    assert set(steps) <= {0, 1}
    assert 0 < group.weight < float("inf")
    group.prompt_key.encode()


@settings(suppress_health_check=list(HealthCheck), max_examples=examples(300))
@given(st.lists(lines, max_size=6), st.sampled_from(FORMATS))
@example([b"\xef\xbb\xbf{}", b"\x0c", b"\xff\xfe"], "auto")
@example([b'{"": null}', b'{"\\ud800": 1, "chosen": "\\ud800"}'], "rows")
def test_lines(found, format):
    good = json.dumps(GOOD_TURNS if format == "sharegpt" else GOOD).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.jsonl")
        path.write_bytes(b"\n".join([good, *found]))
        total = sum(bool(line.strip()) for line in path.read_bytes().split(b"\n"))
        rows = read(path, format)
        check(rows, total, Path(folder))
        numbers = [int(x.source.rsplit(":", 1)[1]) for x in (*rows.groups, *rows.bad)]
        kept = [n for n, line in enumerate(path.read_bytes().split(b"\n"), 1) if line.strip()]
        assert sorted(numbers) == kept


@settings(suppress_health_check=list(HealthCheck), max_examples=examples(200))
@given(st.lists(rows_of_fields | values, max_size=6), st.sampled_from(FORMATS))
def test_elements(found, format):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows.json")
        path.write_text(json.dumps([GOOD_TURNS if format == "sharegpt" else GOOD, *found]))
        check(read(path, format), len(found) + 1, Path(folder))


@settings(suppress_health_check=list(HealthCheck), max_examples=examples(100))
@given(st.binary(max_size=60) | lines, st.sampled_from(["jsonl", "json", "parquet"]))
def test_any_file_is_read_or_refused(content, suffix):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"rows.{suffix}")
        path.write_bytes(content)
        rows, refusal = None, ""
        try:
            rows = read(path, "auto")
        except UserError as error:
            refusal = str(error)
        assert refusal.isprintable()
        if rows is not None:
            check(rows, rows.total, Path(folder))
