"""Files, folders, patterns and lists of them, as people have them."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_lightning.data import record_files
from dpo_lightning.data.source_names import Entry, entries, row_suffix, source_label
from tests.support.rows import GOOD
from tests.support.sources import read, refused, write

LINE = json.dumps(GOOD).encode() + b"\n"


def prompts(rows) -> list[str]:
    return [group.prompt for group in rows.groups]


def lines(*names: str) -> bytes:
    return b"".join(json.dumps({**GOOD, "prompt": name}).encode() + b"\n" for name in names)


def parquet(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{**GOOD, "prompt": name} for name in names]), path)
    return path


# ------------------------------------------------------------------------------------------- lists


def test_a_list_of_files_is_read_in_its_order(tmp_path):
    paths = [str(write(tmp_path / name, lines(name))) for name in ("b.jsonl", "a.jsonl")]
    rows = read_list(paths)
    assert prompts(rows) == ["b.jsonl", "a.jsonl"]
    assert [group.source for group in rows.groups] == [f"{path}:1" for path in paths]


def read_list(source, **options):
    from dpo_lightning.data.records import read_rows

    known = {"format": "auto", "columns": {}, "split": "train", "subset": None, "revision": None}
    return read_rows(source, **(known | options))


def test_a_weight_takes_a_share_that_is_always_the_same(tmp_path):
    path = str(write(tmp_path / "a.jsonl", lines(*map(str, range(40)))))
    other = str(write(tmp_path / "b.jsonl", lines("b")))
    rows = read_list([{"path": path, "weight": 0.25}, other])
    assert len(rows.groups) == rows.total == 11
    assert prompts(rows)[:10] == sorted(prompts(rows)[:10], key=int) != list(map(str, range(10)))
    assert prompts(read_list([{"path": path, "weight": 0.25}])) == prompts(rows)[:10]
    assert f"data.train={path}: 10 of 40 rows are taken (weight 0.25)" in rows.notes


@pytest.mark.parametrize(
    "value",
    [[], "", [""], 5, [{"path": "a", "weight": 0}], [{"path": "a", "weight": 2}], [{"pth": "a"}]],
)
def test_what_is_no_source(value):
    with pytest.raises(ValueError):  # noqa: PT011
        entries(value)


def test_sources_are_shown_as_they_are_typed():
    value = ["a.jsonl", {"path": "b.jsonl", "weight": 0.5}]
    assert entries(value) == [Entry("a.jsonl"), Entry("b.jsonl", 0.5)]
    assert source_label(value) == "[a.jsonl,{path: b.jsonl, weight: 0.5}]"


def test_what_may_be_a_key_in_an_address_is_not_repeated():
    message = refused("https://me:word@host/x.jsonl?token=abc")
    assert message.startswith("data.train=https://host/x.jsonl: addresses are not read")


# --------------------------------------------------------------------------------------- patterns


def test_a_pattern_reads_its_files_by_name_and_says_which(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write(tmp_path / name, lines(name))
    rows = read("*.jsonl")
    assert prompts(rows) == ["a.jsonl", "b.jsonl"]
    assert rows.notes == ["data.train=*.jsonl: reads 2 files: 'a.jsonl', 'b.jsonl'"]
    assert "no file has a name like that" in refused("x*.jsonl")
    assert "but for 'c.txt'" in refused("*.txt")
    assert "'data.train=[a.jsonl,b.jsonl]'" in refused("a.jsonl,b.jsonl")


def test_a_missing_shard_is_refused(tmp_path):
    for number in (0, 2):
        parquet(tmp_path / f"train-{number:05d}-of-00003.parquet", "p")
    for source in (tmp_path, tmp_path / "*.parquet"):
        assert "1 of the 3 files train-*-of-*" in refused(source)
        assert "are missing, the first is number 1" in refused(source)


# ---------------------------------------------------------------------------------------- folders


def test_a_clone_is_read_by_the_names_of_its_splits(tmp_path):
    for number in range(2):
        parquet(tmp_path / "data" / f"train-{number:05d}-of-00002.parquet", f"train {number}")
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", "test")
    assert prompts(read(tmp_path)) == ["train 0", "train 1"]
    assert prompts(read(tmp_path, split="test")) == ["test"]
    assert refused(tmp_path, split="dev") == (
        f"data.train_split=dev: data.train={tmp_path} has no such split; there are 'test', 'train'"
    )


def test_a_split_that_may_be_two_is_named(tmp_path):
    for name in ("train_prefs", "train_sft", "test_prefs"):
        parquet(tmp_path / f"{name}-00000-of-00001.parquet", name)
    message = refused(tmp_path, split="train")
    assert "'train_prefs', 'train_sft'" in message
    assert prompts(read(tmp_path, split="train_prefs")) == ["train_prefs"]
    assert prompts(read(tmp_path, split="test")) == ["test_prefs"]


def test_a_readme_says_which_files_are_a_split(tmp_path):
    write(tmp_path / "one.jsonl", lines("one"))
    write(tmp_path / "two.jsonl", lines("two"))
    header = (
        "---\nconfigs:\n- config_name: {}\n  data_files:\n  - split: train\n    path: two*\n---\n"
    )
    (tmp_path / "README.md").write_text(header.format("default"))
    assert prompts(read(tmp_path)) == ["two"]
    assert prompts(read(tmp_path, subset="default")) == ["two"]
    assert "data.subset=x: " in refused(tmp_path, subset="x")


def test_a_folder_without_splits_is_read_whole_and_one_of_two_kinds_is_not(tmp_path):
    write(tmp_path / "a.jsonl", lines("a"))
    write(tmp_path / "b.jsonl", lines("b"))
    write(tmp_path / ".c.jsonl", lines("hidden"))
    assert prompts(read(tmp_path)) == ["a", "b"]
    parquet(tmp_path / "a.parquet", "a")
    message = refused(tmp_path)
    assert "several kinds (.jsonl, .parquet)" in message
    assert prompts(read(f"{tmp_path}/*.jsonl")) == ["a", "b"]


def test_folders_that_datasets_saved(tmp_path):
    data = datasets.Dataset.from_list([{**GOOD, "prompt": "saved"}])
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(str(tmp_path / "two"))
    assert prompts(read(tmp_path / "one")) == ["saved"]
    assert read(tmp_path / "two", split="test").groups[0].source == f"{tmp_path}/two[test]:1"
    assert "has 'train', 'test'; name one" in refused(tmp_path / "two", split="dev")
    assert "one saved data set, without splits" in refused(tmp_path / "one", split="test")


# ------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_packed_files(tmp_path, suffix, pack):
    path = write(tmp_path / f"a.jsonl{suffix}", pack(lines("p", "q")))
    assert prompts(read(path)) == ["p", "q"]
    path.write_bytes(pack(lines("p", "q"))[:-9])
    assert f"not readable as {suffix}" in refused(path)


def test_a_file_packed_with_zstandard(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    with pa.output_stream(str(path), compression="zstd") as file:
        file.write(lines("p"))
    assert prompts(read(path)) == ["p"]


def test_a_file_that_grows_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "_FREE_GROWTH", 1000)
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(LINE + b" " * 200_000))
    assert "more than 200 times its size" in refused(path)


def test_a_line_without_end_is_a_bad_row(tmp_path, monkeypatch):
    monkeypatch.setattr(record_files, "LONGEST_LINE", 1 << 20)
    long = b'{"prompt": "' + b"x" * (3 << 20) + b'"}\n'
    rows = read(write(tmp_path / "a.jsonl", LINE + long + LINE))
    assert [group.source[-2:] for group in rows.groups] == [":1", ":3"]
    assert [(bad.source[-2:], bad.problem) for bad in rows.bad] == [
        (":2", "a line of more than 1 MiB")
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps([GOOD, GOOD])),
        ("a.jsonl", json.dumps([GOOD, GOOD], indent=1)),
        ("a.jsonl", "\n".join(json.dumps(GOOD, indent=1) for _ in range(2))),
        ("a.json", "\n".join(json.dumps(GOOD) for _ in range(2))),
        ("a.ndjson", "\n".join(json.dumps(GOOD) for _ in range(2))),
    ],
)
def test_json_of_every_layout(tmp_path, name, content):
    rows = read(write(tmp_path / name, content.encode()))
    assert [group.source for group in rows.groups] == [f"{tmp_path}/{name}:{n}" for n in (1, 2)]


def test_a_first_line_that_is_cut_is_one_bad_row(tmp_path):
    rows = read(write(tmp_path / "a.jsonl", b'{"prompt": "x\n' + LINE))
    assert ([bad.source[-2:] for bad in rows.bad], len(rows.groups)) == ([":1"], 1)


def test_a_key_that_is_there_twice_is_a_bad_row(tmp_path):
    twice = b'{"prompt": "p", "prompt": "q", "chosen": "a", "rejected": "b"}\n'
    (bad,) = read(write(tmp_path / "a.jsonl", LINE + twice)).bad
    assert bad.problem == "the key 'prompt' is there twice in one object"
    assert "there twice" in refused(write(tmp_path / "a.json", b"[" + twice + b"]"))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_another_encoding_is_named(tmp_path, name, encoding):
    message = refused(write(tmp_path / name, LINE.decode().encode(encoding)))
    assert f"the file is {encoding[:6].upper()}" in message
    assert "'iconv -f UTF-" in message


def test_bytes_of_windows_are_named_by_what_they_are_there(tmp_path):
    content = json.dumps({**GOOD, "chosen": "\u00e9"}, ensure_ascii=False).encode("latin-1")
    (bad,) = read(write(tmp_path / "a.jsonl", LINE + content)).bad
    assert "in Windows-1252 it is '\u00e9': save the file as UTF-8" in bad.problem


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    assert "'git lfs pull'" in refused(write(tmp_path / name, pointer))


def test_an_arrow_file(tmp_path):
    table = pa.Table.from_pylist([GOOD])
    for opened in (pa.ipc.new_file, pa.ipc.new_stream):
        with opened(str(tmp_path / "a.arrow"), table.schema) as file:
            file.write_table(table)
        assert prompts(read(tmp_path / "a.arrow")) == [GOOD["prompt"]]


def test_a_table_with_one_name_twice_is_refused(tmp_path):
    columns = [pa.array(["x"])] * 4
    names = ["prompt", "chosen", "rejected", "chosen"]
    pq.write_table(pa.table(columns, names=names), tmp_path / "a.parquet")
    assert "the column 'chosen' is there twice" in refused(tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("prompt,chosen,chosen\na,b,c\n")
    assert "the column 'chosen' is there twice" in refused(tmp_path / "a.csv")


# --------------------------------------------------------------------------------------------- csv


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
def test_tables_of_cells(tmp_path, name, mark):
    head = mark.join(["prompt", "chosen", "rejected", "weight", "system"])
    row = mark.join(['"two\nlines"', "a", "b", "2", ""])
    (tmp_path / name).write_text(f"\ufeff{head}\n{row}\n")
    (group,) = read(tmp_path / name).groups
    assert (group.prompt, group.weight, group.source[-2:]) == ("two\nlines", 2.0, ":2")


def test_lists_and_numbers_in_cells(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,responses,scores\np,"[""3"",""4""]","[1, 2]"\n')
    assert read(tmp_path / "a.csv").groups[0].responses == ("4", "3")


def test_cells_that_are_too_many_or_not_closed(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\np,a,b\np,a\n")
    (bad,) = read(tmp_path / "a.csv").bad
    assert bad.problem == "2 cells, expected 3, one for each column"
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\np,a,"b\n')
    assert "line 2: not readable as CSV" in refused(tmp_path / "a.csv")


def test_endings_of_files():
    assert row_suffix("x.jsonl.gz") == (".jsonl", ".gz")
    assert row_suffix("x.gz") == row_suffix("x.parquet.gz") == ("", "")
