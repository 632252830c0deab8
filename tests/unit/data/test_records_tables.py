"""Rows of parquet files and of data sets of the hub."""

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_lightning.data.records import Message
from tests.support.rows import GOOD
from tests.support.sources import read, refused, write

NAMES = ("prompt", "chosen", "rejected")

# ---------------------------------------------------------------------------------------- parquet


def parquet(path: Path, columns: dict) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet(tmp_path):
    path = parquet(
        tmp_path / "a.parquet",
        {
            "question": ["q", "r"],
            "chosen": [[{"role": "assistant", "content": "a"}]] * 2,
            "rejected": [[{"role": "assistant", "content": "b"}], None],
            "weight": [None, 2.0],
            "hash": [b"\xff", b"\xfe"],
        },
    )
    rows = read(path, columns={"prompt": "question"})
    (group,) = rows.groups
    assert group.prompt == (Message("user", "q"),)
    assert group.responses[1] == (Message("assistant", "b"),)
    assert (group.weight, group.source) == (1.0, f"{path}:1")
    (bad,) = rows.bad
    assert (bad.source, bad.field) == (f"{path}:2", "rejected")
    assert bad.problem.startswith("missing or null; the row has 'question', 'chosen', 'weight'")
    assert json.loads(bad.row)["question"] == "r"


def test_parquet_counts_rows_over_batches(tmp_path):
    texts = [f"{i}" for i in range(3000)]
    nothing = ["", *texts[1:2999], None]
    path = parquet(tmp_path / "a.parquet", {"prompt": texts, "chosen": nothing, "rejected": texts})
    rows = read(path)
    assert rows.total == 3000
    assert [group.source for group in rows.groups[-1:]] == [f"{path}:2999"]
    assert [bad.source for bad in rows.bad] == [f"{path}:3000"]


def test_parquet_null_prompt_is_not_an_implicit_one(tmp_path):
    columns = {"prompt": ["q", None], "chosen": ["a b", "a b"], "rejected": ["a c", "a c"]}
    rows = read(parquet(tmp_path / "a.parquet", columns))
    assert [(bad.field, bad.problem[:5]) for bad in rows.bad] == [("prompt", "null,")]


def test_parquet_text_that_is_not_utf8(tmp_path):
    offsets, data = pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")
    broken = pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])
    columns = {"prompt": ["q", "q"], "chosen": broken, "rejected": ["b", "b"]}
    rows = read(parquet(tmp_path / "a.parquet", columns))
    assert [group.source[-2:] for group in rows.groups] == [":1"]
    assert [(bad.source[-2:], bad.problem) for bad in rows.bad] == [
        (":2", "not UTF-8: byte 0xff in a text")
    ]


def test_parquet_columns_of_other_kinds(tmp_path):
    good = {"prompt": ["q"], "chosen": ["a"], "rejected": ["b"]}
    for kind in (b"bytes", 3, {"a": 1}):
        path = parquet(tmp_path / "a.parquet", {**good, "rejected": [kind]})
        assert [bad.field for bad in read(path).bad] == ["rejected"]


@pytest.mark.parametrize("keep", [0, 3, 60, -9])
def test_corrupt_parquet(tmp_path, keep):
    path = parquet(tmp_path / "a.parquet", {name: ["a"] for name in NAMES})
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(path)
    assert ("no rows" if keep == 0 else "not readable as parquet") in message


def test_parquet_with_damaged_pages(tmp_path):
    path = parquet(tmp_path / "a.parquet", {name: ["a" * 50] * 50 for name in NAMES})
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(bytes(content))
    assert "not readable as parquet" in refused(path)


def test_parquet_without_rows_or_columns(tmp_path):
    assert "no rows" in refused(parquet(tmp_path / "a.parquet", {"prompt": pa.array([], "string")}))
    message = refused(parquet(tmp_path / "a.parquet", {"a": ["x"], "b": ["y"]}))
    assert "'chosen' is missing" in message
    assert "found 'a', 'b'" in message


# ---------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stand-in for the hub that answers from ``answers``; exceptions in it are raised."""
    answers, asked = {}, []

    def load_dataset(path, **options):
        asked.append((path, options))
        answer = answers[path]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return answers, asked


def test_hub(hub):
    answers, asked = hub
    user, bot = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    table = {
        "prompt": ["q"] * 2,
        "score_chosen": [1.0] * 2,
        "chosen": [[user, bot]] * 2,
        "rejected": [[user, {**bot, "content": "b"}], [bot]],
        "messages": [[user, bot]] * 2,
    }
    answers["org/some-data.v2"] = datasets.Dataset.from_dict(table)
    rows = read("org/some-data.v2", subset="default", split="train_prefs", revision="abc")
    options = {"name": "default", "split": "train_prefs", "revision": "abc"}
    assert asked == [("org/some-data.v2", options)]
    (group,) = rows.groups
    assert group.source == "org/some-data.v2[train_prefs]:1"
    assert group.prompt == (Message("user", "q"),)
    assert group.responses == ((Message("assistant", "a"),), (Message("assistant", "b"),))
    assert [bad.source for bad in rows.bad] == ["org/some-data.v2[train_prefs]:2"]
    assert "score_chosen" not in rows.bad[0].row


def test_hub_without_a_split(hub):
    answers, _ = hub
    dataset = datasets.Dataset.from_dict({name: [name] for name in NAMES})
    answers["one"] = datasets.DatasetDict({"test": dataset})
    answers["two"] = datasets.DatasetDict({"train": dataset, "test": dataset})
    assert read("one", split=None).groups[0].source == "one[test]:1"
    assert refused("two", split=None, key="data.eval") == (
        "data.eval_split=null: two has 'train', 'test'; name one of them"
    )


def test_hub_without_rows_or_columns(hub):
    answers, _ = hub
    answers["none"] = datasets.Dataset.from_dict({name: [] for name in NAMES})
    answers["other"] = datasets.Dataset.from_dict({"text": ["x"], "label": [1]})
    assert "no rows" in refused("none")
    assert "found 'text', 'label'" in refused("other")


@pytest.mark.parametrize(
    ("error", "problem"),
    [
        (ConnectionError("Couldn't reach\nthe hub"), "is not in the local cache and there is no"),
        (datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist"), "doesn't exist"),
        (ValueError("Unknown split 'x'.\nmore"), "Unknown split 'x'.; look at data.train_split=x"),
        (RuntimeError("Dataset scripts are no longer supported"), "no longer supported"),
        (KeyError(), "cannot be loaded: KeyError"),
    ],
)
def test_hub_that_fails(hub, error, problem):
    answers, _ = hub
    answers["org/data"] = error
    message = refused("org/data", split="x")
    assert message.startswith("data.train=org/data: ")
    assert problem in message
    assert message.endswith("name a local file in data.train=")


def test_a_local_path_comes_before_the_hub(hub, tmp_path):
    _, asked = hub
    (tmp_path / "org").mkdir()
    write(tmp_path / "org" / "data", GOOD)
    assert "a name without a suffix" in refused("org/data")
    assert asked == []
