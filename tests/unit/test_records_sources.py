"""Files, tables and data sets of the hub as a whole; a fault of one is one line with its remedy."""

import json
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_lightning.data.records import Message, read_rows
from dpo_lightning.errors import UserError

GOOD = {"prompt": "Say hi.", "chosen": " Hello.", "rejected": " Go away."}
NAMES = ("prompt", "chosen", "rejected")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


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


# ------------------------------------------------------------------------------------------- jsonl


def test_bom_crlf_and_blank_lines_keep_the_line_numbers(tmp_path):
    line = json.dumps(GOOD).encode()
    content = b"\xef\xbb\xbf" + line + b"\r\n\r\n  \n" + line + b"\r\n" + b"{\r\n" + line
    rows = read(write(tmp_path / "a.jsonl", content))
    assert [group.source for group in rows.groups] == [f"{tmp_path}/a.jsonl:{n}" for n in (1, 4, 6)]
    assert [(bad.source, bad.row) for bad in rows.bad] == [(f"{tmp_path}/a.jsonl:5", "{")]
    assert rows.total == 4


def test_a_line_separator_in_a_text_ends_no_line(tmp_path):
    row = {**GOOD, "chosen": "a\u2028b\x85c"}
    content = json.dumps(row, ensure_ascii=False).encode() + b"\n" + json.dumps(GOOD).encode()
    rows = read(write(tmp_path / "a.jsonl", content))
    assert rows.groups[0].responses[0] == "a\u2028b\x85c"
    assert rows.groups[1].source.endswith(":2")


def test_suffix_and_home_are_understood(tmp_path, monkeypatch):
    write(tmp_path / "a.JSONL", GOOD)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/a.JSONL").groups[0].source == "~/a.JSONL:1"


# -------------------------------------------------------------------------------------------- json


def test_json_counts_elements(tmp_path):
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf" + json.dumps([GOOD, 3, GOOD]).encode())
    rows = read(path)
    assert [group.source for group in rows.groups] == [f"{path}:1", f"{path}:3"]
    assert [(bad.source, bad.field, bad.row) for bad in rows.bad] == [(f"{path}:2", "row", "3")]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no rows"),
        (b"[]", "no rows"),
        (b" \n", "no rows"),
        (b'{"data": []}', "the top level is an object of 'data', expected a list of rows"),
        (b'[{"a": 1},\n oops]', "invalid JSON at line 2 column 2"),
        (b'{"a": 1}\n{"a": 2}\n', "Extra data; a file of one object a line is a .jsonl"),
        (b'[\n"\xff"]', "not UTF-8: byte 0xff in line 2"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"1" * 5000 + b"]", "a number too long"),
    ],
)
def test_bad_json(tmp_path, content, problem):
    message = refused(write(tmp_path / "a.json", content))
    assert message.startswith(f"data.train={tmp_path}/a.json: ")
    assert problem in message


def test_a_row_too_deep_to_write_is_a_bad_row(tmp_path):
    deep = sys.getrecursionlimit() // 3
    content = f"[{json.dumps(GOOD)}, {'[' * deep}{']' * deep}]".encode()
    rows = read(write(tmp_path / "a.json", content))
    assert (len(rows.groups), len(rows.bad)) == (1, 1)


# ---------------------------------------------------------------------------------------- no file


def test_missing_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "politeness.jsonl", GOOD)
    assert refused("politness.jsonl") == (
        "data.train=politness.jsonl: no such file; did you mean politeness.jsonl?"
    )
    assert refused("other.jsonl", key="data.eval") == (
        f"data.eval=other.jsonl: no such file (here is {tmp_path}); name a file "
        "(.jsonl, .json or .parquet) in data.eval="
    )
    assert f"there is no directory {tmp_path}/x either" in refused(tmp_path / "x" / "a.jsonl")


@pytest.mark.parametrize(
    "source",
    ["./name", "../name", "/nowhere/name", "~/name", "~nobody-of-that-name/x", "a/b/c"]
    + ["name.csv", "name.jsonl.gz", "name.JSONL", "org/name.parquet", "", " ", "a\0b", "a" * 400]
    + ["a\nb", "a\ud800b"],
)
def test_what_cannot_be_a_data_set_is_no_hub_id(source, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    assert refused(source).startswith("data.train=")


def test_directory(tmp_path):
    assert refused(tmp_path) == f"data.train={tmp_path}: is a directory; name a file"
    write(tmp_path / "b.json", [GOOD])
    write(tmp_path / "c.txt", b"")
    assert refused(tmp_path).endswith("name a file in it: 'b.json'")


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "a"])
def test_unknown_suffix(tmp_path, name):
    path = write(tmp_path / name, GOOD)
    assert refused(path).endswith("expected .jsonl, .json or .parquet")


@pytest.mark.parametrize("content", [b"", b"\n \r\n", b"\xef\xbb\xbf"])
def test_empty_jsonl(tmp_path, content):
    assert "no rows" in refused(write(tmp_path / "a.jsonl", content))


def test_unreadable_file(tmp_path, monkeypatch):
    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.jsonl", GOOD)
    monkeypatch.setattr(Path, "open", denied)
    assert refused(path) == f"data.train={path}: cannot be read: Permission denied"


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
            "image": [b"\xff", b"\xfe"],
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


# ----------------------------------------------------------------------------------- data settings


def test_wrong_columns_everywhere_are_one_error(tmp_path):
    rows = [{"prompt": "p", "better": "a", "worse": "b"}] * 3
    message = refused(write(tmp_path / "a.json", rows))
    assert message == (
        f"data.train={tmp_path}/a.json: the columns of every row are wrong: 'chosen' is missing, "
        "and no 'responses'; found 'prompt', 'better', 'worse'; expected prompt, chosen, rejected; "
        "or prompt, responses (best first, or with ranks or scores); map other names, as in "
        "'data.columns={prompt: question, chosen: better, rejected: worse}'"
    )
    mapped = read(tmp_path / "a.json", columns={"chosen": "better", "rejected": "worse"})
    assert len(mapped.groups) == 3


def test_a_question_column_does_not_go_unnoticed(tmp_path):
    rows = [{"question": "q", "chosen": "Yes", "rejected": "No"}]
    message = refused(write(tmp_path / "a.json", rows))
    assert "'prompt' is missing, and the responses have no common beginning" in message
    assert "found 'question'" in message


def test_sharegpt_needs_its_columns(tmp_path):
    message = refused(write(tmp_path / "a.json", [GOOD]), format="sharegpt")
    assert "'conversations' is missing" in message
    assert "data.format=" in message


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"promt": "q"}, "'promt' is not a field of a row, did you mean prompt?"),
        ({"zzz": "q"}, "expected one of prompt, chosen"),
        ({"prompt": "promtp"}, "no row of {0} has this column, did you mean 'prompt'?"),
        ({"weight": "importance"}, "no row of {0} has this column; found 'prompt', 'chosen'"),
        ({"chosen": "rejected", "prompt": "rejected"}, "chosen and prompt are both 'rejected'"),
        ({"conversations": "prompt"}, "set data.format=sharegpt"),
    ],
)
def test_wrong_columns_setting(tmp_path, columns, problem):
    path = write(tmp_path / "a.jsonl", GOOD)
    message = refused(path, columns=columns)
    assert message.startswith("data.columns")
    assert problem.format(f"data.train={path}") in message


def test_wrong_format_setting(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    assert refused(path, format="alpaca") == (
        "data.format=alpaca: expected one of auto, rows, sharegpt"
    )
    assert "data.columns={prompt: q}" in refused(path, format="sharegpt", columns={"prompt": "q"})


def test_settings_of_the_hub_are_said_to_be_unused_by_a_file(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD)
    assert read(path).notes == []
    (note,) = read(path, subset="harmless-base").notes
    assert note.startswith("data.subset=harmless-base")


# ---------------------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Answers as the hub would: with what ``answers`` holds, raised if it is an exception."""
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


# --------------------------------------------------------------------------------------- real data


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data beside the project")
@pytest.mark.parametrize(
    ("name", "format", "count"),
    [
        ("politeness.jsonl", "auto", 1100),
        ("hh_harmless_raw.jsonl", "auto", 400),
        ("sharegpt_dpo.json", "sharegpt", 300),
        ("openassistant_ranked.jsonl", "rows", 212),
    ],
)
def test_real_files(name, format, count):
    rows = read(SHARED / name, format=format)
    assert (rows.total, len(rows.groups), rows.bad) == (count, count, [])
    assert rows.groups[-1].source == f"{SHARED / name}:{count}"
    if name.startswith("hh_"):
        assert all(group.prompt.endswith("\n\nAssistant:") for group in rows.groups)
        originals = [json.loads(line) for line in (SHARED / name).read_text().splitlines()]
        for group, row in zip(rows.groups, originals, strict=True):
            whole = [group.prompt + response for response in group.responses]
            assert whole == [row["chosen"], row["rejected"]]
    elif name.startswith("openassistant"):
        originals = [json.loads(line) for line in (SHARED / name).read_text().splitlines()]
        for group, row in zip(rows.groups, originals, strict=True):
            assert list(group.ranks) == sorted(group.ranks)
            best = row["responses"][row["ranks"].index(min(row["ranks"]))]
            assert group.responses[0] == (Message("assistant", best),)
            assert len(group.responses) == len(row["responses"])
    elif name.startswith("sharegpt"):
        assert {group.prompt[-1].role for group in rows.groups} == {"user"}
        roles = {message.role for group in rows.groups for message in group.prompt}
        assert roles == {"system", "user", "assistant"}
