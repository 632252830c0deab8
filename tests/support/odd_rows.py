"""Rows, lines and files of every kind, and the outcome of each: a group, a bad row, a line."""

import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from dpo_lightning.data.records import (
    Message,
    PreferenceGroup,
    Rows,
    check_bad_rows,
    read_rows,
    write_quarantine,
)
from dpo_lightning.data.splits import PreparedData, prepare_rows
from dpo_lightning.errors import UserError

# So that the columns of a file as a whole are right.
GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}
GOOD_TURNS = {
    "conversations": [{"from": "human", "value": "p"}],
    "chosen": {"from": "gpt", "value": "a"},
    "rejected": {"from": "gpt", "value": "b"},
}

WORDS = ["p", "p a", "p b", "", " ", "\n", "\x00", "a\x00b", "é", "​", "﷽", "🤖", "</s>", "<s>"]
# JSON has lone surrogates, NaN and integers of any size, and so has Python's reader of it.
strings = (
    st.sampled_from(WORDS)
    | st.text(st.characters(), max_size=12)
    | st.sampled_from(["\n\nHuman: a\n\nAssistant: b", "\ud800", "a\udfff"])
    | st.sampled_from([("x", 5000), ("é", 3000)]).map(lambda long: long[0] * long[1])
)
numbers = st.integers(-3, 3) | st.integers() | st.floats() | st.sampled_from([10**400, -(10**400)])
messages = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool", ""]) | strings,
        "content": strings | st.none(),
        "from": st.sampled_from(["human", "gpt", "bot"]),
        "value": strings,
    },
) | st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": strings}
)
scalars = st.none() | st.booleans() | numbers | strings
values = st.recursive(
    scalars | messages,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=2),
    max_leaves=8,
)
texts = strings | st.lists(messages, max_size=3)
likely: dict[str, st.SearchStrategy[Any]] = {
    "responses": st.lists(texts, max_size=4),
    "ranks": st.lists(numbers, max_size=4),
    "scores": st.lists(numbers, max_size=4),
    "weight": numbers,
    "target_margin": numbers,
}
FIELDS = ("prompt", "chosen", "rejected", *likely, "conversations", "extra")
odd_rows = st.fixed_dictionaries(
    {}, optional={name: likely.get(name, texts) | values for name in FIELDS}
)
# Right but for a value or two, so that much of it reaches the tokenizer.
pairs = st.fixed_dictionaries(
    {"prompt": texts, "chosen": texts, "rejected": texts},
    optional={"weight": numbers, "target_margin": numbers},
)
many = st.integers(2, 4).flatmap(
    lambda k: st.fixed_dictionaries(
        {"prompt": strings, "responses": st.lists(strings, min_size=k, max_size=k)},
        optional={
            "ranks": st.lists(st.integers(1, k), min_size=k, max_size=k),
            "scores": st.lists(numbers, min_size=k, max_size=k),
        },
    )
)
labels: st.SearchStrategy[Any] = st.sampled_from(
    [True, False, None, 1, 0, -1, 2.5, "up", "down", "maybe", "", {}]
)
alone = st.fixed_dictionaries(
    {"prompt": texts, "response": texts},
    optional={"label": labels, "weight": numbers, "target_margin": numbers},
)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system"]), "content": strings},
    optional={"rating": labels, "feedback": labels},
)
logs = st.fixed_dictionaries(
    {"messages": st.lists(turns | messages, max_size=5)}, optional={"label": labels}
)
rows = pairs | many | odd_rows | alone | logs


def _as_line(row: Any) -> bytes:
    return json.dumps(row).encode()


def _twice(row: dict[str, Any]) -> bytes:
    """A row that names a key two times."""
    return b'{"prompt": 3, ' + _as_line(row)[1:]


lines = (
    rows.map(_as_line)
    | rows.filter(bool).map(_twice)
    | rows.map(lambda row: json.dumps(row, ensure_ascii=False).encode(errors="surrogatepass"))
    | rows.map(lambda row: _as_line(row)[:-1])
    | values.map(_as_line)
    | st.binary(max_size=40)
    | st.integers(1, 3000).map(lambda depth: b'{"prompt":' * depth)
    | st.sampled_from([b"", b" ", b"\t", b"\xef\xbb\xbf{}", b"\x0c", b"\xff\xfe", b"NaN", b"{}"])
)
columns = st.sampled_from(
    [
        pa.array(["p", None, "q"]),
        pa.array([b"\xff", b"a", None], pa.binary()),
        pa.array([1, 2, None], pa.int8()),
        pa.array([1.0, float("nan"), None]),
        pa.array([["a", "b"], None, []]),
        pa.array([[1, 2], [None, 1], None]),
        pa.array([[{"role": "user", "content": "a"}], [], None]),
        pa.array([{"role": "user", "content": "a"}, None, None]),
        pa.array([True, None, False]),
        pa.array([2**62, -1, None], pa.timestamp("ns")),
        pa.array([2**40, -(2**40), None], pa.timestamp("s")),
        pa.array([1, 2, None], pa.date64()),
        pa.array([None, None, None]),
        pa.array(["a", "b", "a"]).dictionary_encode(),
        pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64())),
        pa.array([1, None, 3], pa.decimal128(20, 3)),
        pa.array(["x", "y", None], pa.large_string()),
    ]
) | st.lists(st.text(max_size=5) | st.none(), min_size=3, max_size=3).map(
    lambda cells: pa.array(cells, pa.string())
)
tables = st.dictionaries(
    st.sampled_from([*FIELDS, "", "prompt"]) | st.text(max_size=4), columns, max_size=5
)


def write_table(path: Path, table: dict[str, Any]) -> None:
    """A parquet file of three rows; columns may have any name and type."""
    pq.write_table(pa.table(list(table.values()), names=list(table)), path)


def refusal(action: Callable[[], object]) -> str | None:
    """The one line by which something is refused; None if it is not."""
    try:
        action()
    except UserError as error:
        message = str(error)
    else:
        return None
    assert message
    assert message.isprintable(), repr(message)
    return message


def read(path: Path, format: str = "auto") -> Rows | None:
    """Reads the rows of a file; None where it is refused."""
    found = []

    def action() -> None:
        found.append(
            read_rows(str(path), format=format, columns={}, split=None, subset=None, revision=None)
        )

    message = refusal(action)
    assert message is None or str(path) in message or "data." in message
    return found[0] if found else None


def check_read(found: Rows, folder: Path) -> None:
    """Checks that rows are whole: each a right group, or a bad row that can be shown."""
    assert found.total == len(found.groups) + len(found.bad)
    for group in found.groups:
        _check_group(group)
    for bad in found.bad:
        assert f"{bad.field}{bad.problem}{bad.source}".isprintable()
    write_quarantine(folder / "quarantine.jsonl", found.bad)
    written = (folder / "quarantine.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line)["source"] for line in written[:-1]] == [b.source for b in found.bad]
    stops = refusal(lambda: check_bad_rows(found, on_bad_row="stop"))
    assert (stops is not None) == bool(found.bad)


def _check_group(group: PreferenceGroup) -> None:
    texts = (group.prompt, *group.responses)
    assert len({type(text) for text in texts}) == 1
    for text in texts:
        assert isinstance(text, str) or (text and all(isinstance(m, Message) for m in text))
    assert len(group.responses) == len(group.ranks)
    assert (len(group.responses) == 1) == (group.label is not None)
    assert group.ranks[0] == 1
    assert {b - a for a, b in itertools.pairwise(group.ranks)} <= {0, 1}
    assert 0 < group.weight < float("inf")
    group.prompt_key.encode()


def check_rows(found: Rows | None, tokenizer: Any, *, truncation: str) -> int:
    """Tokenizes the rows that were read; every row is accounted for.

    Returns:
        Number of rows that there were.
    """
    if found is None:
        return 0
    with tempfile.TemporaryDirectory() as folder:
        check_read(found, Path(folder))
        made: list[PreparedData] = []

        def prepare() -> None:
            made.append(
                prepare_rows(
                    found,
                    None,
                    tokenizer,
                    max_length=64,
                    truncation=truncation,
                    eval_fraction=0.2,
                    split_seed=0,
                    max_dropped=1.0,
                    cache=Path(folder, "tokens"),
                )
            )

        said = [refusal(prepare) for _ in range(2)]  # computed, and found again
        assert said[0] == said[1]
        assert len(made) == said.count(None)
        for data in made:
            _check_tokens(data, found.total, len(tokenizer))
    return found.total


def _check_tokens(data: PreparedData, total: int, vocabulary: int) -> None:
    groups = (*data.train, *data.eval)
    assert len(groups) + sum(data.dropped.values()) == total
    for group in groups:
        assert len(group.responses) == len(group.ranks)
        assert (len(group.responses) == 1) == (group.label is not None)
        assert len(group.prompt) + max(map(len, group.responses)) <= 64
        assert 0 < group.weight < float("inf")
        assert abs(group.target_margin) < float("inf")
        ids = [int(i) for part in (group.prompt, *group.responses) for i in part]
        assert 0 <= min(ids) <= max(ids) < vocabulary
